"""Masks that were read: counts by hand, unlabelled pixels, absent classes, and the rule of the paper."""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_flows.codecs import IGNORE
from lightning_flows.metrics import MeanIoU, PixelAccuracy, class_iou

TRUTH = torch.tensor([[[0, 0, 1], [1, 2, IGNORE]]])
GUESS = torch.tensor([[[0, 1, 1], [1, 0, 2]]])


def value(metric, guess=GUESS, truth=TRUTH):
    metric.update(guess, truth)
    return metric.compute()


def masks(classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (4, 8, 9), generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < 0.3
    return torch.where(wrong, torch.randint(classes, truth.shape, generator=generator), truth), truth


def test_intersection_over_union_by_hand():
    found = value(MeanIoU(3))
    # class 0: 1 hit, 2 true, 2 called; class 1: 2 hits, 2 true, 3 called; class 2: no hit, 1 true (1 called unlabelled)
    assert found["per_class"].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert found["mean"].item() == pytest.approx(1 / 3)


def test_accuracy_by_hand_leaves_out_what_nobody_labelled():
    assert value(PixelAccuracy(3)).item() == pytest.approx(3 / 5)


def test_a_class_with_no_pixel_is_left_out_and_one_that_is_only_called_is_not():
    found = value(MeanIoU(5), torch.tensor([[[0, 3]]]), torch.tensor([[[0, 0]]]))
    assert found["per_class"][:4].tolist() == pytest.approx([0.5, math.nan, math.nan, 0], nan_ok=True)
    assert found["per_class"][4].isnan()
    assert found["mean"].item() == 0.25


def test_pixels_are_pooled_over_the_set_and_not_averaged_over_batches():
    metric, (guess, truth) = MeanIoU(5), masks()
    whole = value(MeanIoU(5), guess, truth)
    metric.update(guess[:1], truth[:1])
    metric.update(guess[1:], truth[1:])
    assert torch.equal(metric.compute()["per_class"], whole["per_class"])
    expected = multiclass_jaccard_index(guess, truth, 5, average=None)
    assert torch.allclose(whole["per_class"].float(), expected)


def test_perfect_masks_give_one_and_masks_without_a_hit_zero():
    _, truth = masks()
    assert value(MeanIoU(5), truth, truth)["mean"] == 1
    assert value(PixelAccuracy(5), truth, truth) == 1
    assert value(MeanIoU(5), (truth + 1) % 5, truth)["mean"] == 0
    assert value(PixelAccuracy(5), (truth + 1) % 5, truth) == 0


def test_a_prediction_of_no_class_is_a_miss_and_no_false_alarm():
    guess = torch.tensor([[[0, IGNORE, 1, 1]]])
    found = value(MeanIoU(2), guess, torch.tensor([[[0, 0, 1, 1]]]))
    assert found["per_class"].tolist() == [0.5, 1]
    assert value(PixelAccuracy(2), guess, torch.tensor([[[0, 0, 1, 1]]])) == 0.75


@pytest.mark.parametrize("ignored", [0, 4])
def test_the_rule_of_the_paper_is_the_official_evaluation(ignored):
    guess, truth = masks()
    found = value(MeanIoU(5, "paper", ignored), guess, truth)
    overwritten = guess.masked_fill(truth == ignored, ignored)
    official = multiclass_jaccard_index(overwritten, truth, 5, ignore_index=ignored)
    assert found["mean"].item() == pytest.approx(official.item(), abs=1e-6)
    assert found["per_class"][ignored].isnan()
    assert found["per_class"].isnan().sum() == 1


def test_false_alarms_on_the_ignored_class_cost_nothing_and_misses_into_it_do():
    truth = torch.tensor([[[0, 0, 1, 1]]])
    alarm, miss = torch.tensor([[[1, 1, 1, 1]]]), torch.tensor([[[0, 0, 0, 1]]])
    assert value(MeanIoU(2, "paper", 0), alarm, truth)["mean"] == 1
    assert value(MeanIoU(2), alarm, truth)["mean"] == 0.25
    assert value(MeanIoU(2, "paper", 0), miss, truth)["mean"] == 0.5


def test_computing_does_not_change_what_was_counted():
    metric, (guess, truth) = MeanIoU(5, "paper", 2), masks()
    first = value(metric, guess, truth)
    assert torch.equal(value(metric, guess, truth)["mean"], first["mean"])  # twice the counts, the same shares


def test_unlabelled_pixels_alone_are_an_error_and_so_is_a_set_of_the_ignored_class():
    with pytest.raises(ValueError, match="no labelled pixel"):
        value(MeanIoU(3), GUESS, torch.full_like(TRUTH, IGNORE))
    with pytest.raises(ValueError, match="other than ignored=1"):
        value(MeanIoU(3, "paper", 1), torch.ones_like(TRUTH), torch.ones_like(TRUTH))


def test_bytes_are_ids_too_up_to_the_last():
    truth = torch.tensor([[[254, 254, IGNORE]]], dtype=torch.uint8)
    guess = torch.tensor([[[254, IGNORE, 3]]], dtype=torch.uint8)
    assert value(MeanIoU(255), guess, truth)["per_class"][254] == 0.5


@pytest.mark.parametrize(
    ("guess", "truth", "word"),
    [
        (GUESS.float(), TRUTH, "segmented must be integer"),
        (GUESS[0], TRUTH, r"segmented must be integer class ids \(B, H, W\)"),
        (GUESS, TRUTH[:, :1], "one shape"),
        (GUESS + 1, TRUTH, r"segmented must hold class ids 0\.\.2 or 255, got 3"),
        (GUESS, TRUTH - 1, r"mask must hold class ids 0\.\.2 or 255, got -1"),
    ],
)
def test_wrong_masks_are_named(guess, truth, word):
    with pytest.raises(ValueError, match=word):
        MeanIoU(3).update(guess, truth)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0,), "num_classes must lie in 1..255"),
        ((256,), "num_classes must lie in 1..255"),
        ((3, "loose"), "rule must be 'strict' or 'paper'"),
        ((3, "strict", 0), "ignored must be None"),
        ((3, "paper"), r"ignored must be a class 0\.\.2"),
        ((3, "paper", 3), r"ignored must be a class 0\.\.2"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        MeanIoU(*arguments)


def test_names_say_the_rule_and_outputs_can_be_chosen():
    assert (MeanIoU(3).name, MeanIoU(3, "paper", 0).name, PixelAccuracy(3).name) == (
        "miou", "miou[paper]", "pixel_accuracy"
    )  # fmt: skip
    metric = MeanIoU(3, reads="segmented_25", name="miou[25]")
    assert (metric.name, metric.consumes) == ("miou[25]", ("segmented_25", "mask"))
    assert MeanIoU(3, "paper", 2).settings() == {"num_classes": 3, "rule": "paper", "ignored": 2}


def test_shares_of_counts():
    counts = torch.tensor([[2.0, 1.0, 1.0], [0.0, 4.0, 0.0]])
    assert class_iou(counts).tolist() == pytest.approx([0.5, 0.8])
