"""Labels that were read: accuracy with ties, calibration against torchmetrics and against a known truth."""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from lightning_flows.codecs import IGNORE
from lightning_flows.metrics import Calibration, LabelAccuracy


def scored(n=200, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(n, classes, generator=generator)).softmax(1)
    return scores, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_accuracy_is_the_usual_one(top_k):
    scores, label = scored()
    metric = LabelAccuracy(6, top_k)
    metric.update(scores[:50], label[:50])
    metric.update(scores[50:], label[50:])
    expected = multiclass_accuracy(scores, label, 6, average="micro", top_k=top_k)
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)


def test_scores_that_say_nothing_are_right_for_the_first_class_only():
    metric = LabelAccuracy(4)
    metric.update(torch.full((4, 4), 0.25), torch.arange(4))
    assert metric.compute() == 0.25
    metric = LabelAccuracy(4, 2)
    metric.update(torch.full((4, 4), 0.25), torch.arange(4))
    assert metric.compute() == 0.5


def test_calibration_by_hand():
    metric = Calibration(bins=4)
    metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [1.0, 0.0]]), torch.tensor([0, 0, 0, 0]))
    found = metric.compute()
    assert found["bins"]["count"].tolist() == [0, 0, 1, 3]
    assert found["bins"]["confidence"].tolist() == pytest.approx([math.nan, math.nan, 0.6, 0.9], nan_ok=True)
    assert found["bins"]["accuracy"].tolist() == pytest.approx([math.nan, math.nan, 1, 2 / 3], nan_ok=True)
    assert found["error"].item() == pytest.approx((0.4 + abs(2 - 2.7)) / 4, abs=1e-7)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_that_of_torchmetrics(bins):
    scores, label = scored()
    metric = Calibration(bins)
    metric.update(scores[:20], label[:20])
    metric.update(scores[20:], label[20:])
    expected = multiclass_calibration_error(scores, label, 6, n_bins=bins)
    assert metric.compute()["error"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_labels_drawn_from_the_scores_are_calibrated_and_sharper_scores_are_not():
    scores, _ = scored(20000)
    label = torch.multinomial(scores, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    honest, sure = Calibration(), Calibration()
    honest.update(scores, label)
    sure.update((3 * scores.log()).softmax(1), label)
    assert honest.compute()["error"] < 0.015
    assert sure.compute()["error"] > 0.15


def test_calibration_of_masks_pools_labelled_pixels():
    scores, label = scored(60)
    truth = label.reshape(3, 4, 5).clone()
    truth[0, 0] = IGNORE
    metric, flat = Calibration(of="mask"), Calibration()
    metric.update(scores.reshape(3, 4, 5, 6).permute(0, 3, 1, 2), truth)
    flat.update(scores[5:], label[5:])
    assert metric.compute()["bins"]["count"].sum() == 55
    assert torch.allclose(metric.compute()["error"], flat.compute()["error"])
    assert (metric.name, metric.consumes) == ("calibration[mask]", ("mask_scores", "mask"))


@pytest.mark.parametrize("metric", [LabelAccuracy(6), Calibration(), Calibration(of="mask")])
def test_nothing_seen_is_an_error(metric):
    with pytest.raises(ValueError, match="were never given"):
        metric.compute()


def test_masks_without_a_labelled_pixel_are_nothing():
    metric = Calibration(of="mask")
    metric.update(torch.full((1, 2, 3, 3), 0.5), torch.full((1, 3, 3), IGNORE))
    with pytest.raises(ValueError, match="never given beside a true class"):
        metric.compute()


SCORES, LABEL = scored(8)


@pytest.mark.parametrize(
    ("metric", "scores", "label", "word"),
    [
        (LabelAccuracy(5), SCORES, LABEL, r"class_scores must be \(B, 5\)"),
        (LabelAccuracy(6), SCORES, LABEL + 6, r"label must hold classes 0\.\.5, got"),
        (LabelAccuracy(6), SCORES, LABEL.float(), r"label must be integers \(8,\)"),
        (LabelAccuracy(6), SCORES / 0, LABEL, "class_scores must be finite"),
        (Calibration(), SCORES, LABEL[:3], r"label must be integers \(8,\)"),
        (Calibration(), SCORES, LABEL.clamp(max=0) - 1, r"label must hold classes 0\.\.5, got -1"),
        (Calibration(), SCORES, torch.full_like(LABEL, IGNORE), "label must hold classes"),
        (Calibration(), SCORES * 2, LABEL, "class_scores must be probabilities"),
        (Calibration(), SCORES - 1 / 6 + torch.eye(8, 6), LABEL, "class_scores must be probabilities"),
        (Calibration(of="mask"), SCORES, LABEL + 6, "mask must hold classes"),
    ],
)
def test_wrong_scores_are_named(metric, scores, label, word):
    with pytest.raises(ValueError, match=word):
        metric.update(scores, label)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: LabelAccuracy(0), "num_classes must be at least 1"),
        (lambda: LabelAccuracy(3, 4), r"top_k must lie in 1\.\.3"),
        (lambda: Calibration(0), "bins must be at least 1"),
        (lambda: Calibration(of="pixel"), "of must be 'label' or 'mask'"),
    ],
)
def test_wrong_arguments_are_named(build, word):
    with pytest.raises(ValueError, match=word):
        build()
