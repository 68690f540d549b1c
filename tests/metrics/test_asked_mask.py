"""The mask that was asked for against the one that is read from the image."""

import pytest
import torch
from torch import nn

from lightning_flows.metrics import AskedMask, MeanIoU


def bright(x):
    """1 where an image is light, a rule of two classes."""
    return (x.mean(1) > 0).long()


class Segmenter(nn.Module):
    """Scores of two classes from brightness; dropout would blur them in training mode."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
            self.head.bias.zero_()

    def forward(self, x):
        return self.drop(self.head(x))


class Threshold:
    """A rule with a setting."""

    def __init__(self, above: float = 0.9):
        self.above = above

    def __call__(self, x):
        return (x.mean(1) > self.above).long()


def asked():
    mask = torch.randint(2, (3, 6, 6), generator=torch.Generator().manual_seed(0))
    return mask, (mask * 2 - 1)[:, None].expand(-1, 3, -1, -1) * 0.7


@pytest.mark.parametrize("rule", [bright, Segmenter()])
def test_images_that_show_what_was_asked_for_score_one(rule):
    metric, (mask, images) = AskedMask(2, rule), asked()
    metric.update(images, mask)
    assert metric.compute()["mean"] == 1


def test_images_that_do_not_score_as_the_mask_that_is_read():
    (mask, images), metric, plain = asked(), AskedMask(2, bright), MeanIoU(2)
    other = images.roll(1, 3)
    metric.update(other, mask)
    plain.update(bright(other), mask)
    assert torch.equal(metric.compute()["per_class"], plain.compute()["per_class"])
    assert 0 < metric.compute()["mean"] < 0.6


def test_the_reader_is_frozen_and_sees_float32_in_range():
    seen, segmenter = [], Segmenter().train()
    segmenter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    metric, (mask, images) = AskedMask(2, segmenter), asked()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(images.bfloat16() * 3, mask)
    assert (seen[0].dtype, seen[0].max().item()) == (torch.float32, 1)
    assert not segmenter.training
    assert not any(weight.requires_grad for weight in segmenter.parameters())
    assert metric.compute()["mean"] == 1


def test_it_says_who_reads():
    assert AskedMask(2, bright).settings()["rule"].endswith("test_asked_mask.bright")
    assert AskedMask(2, Segmenter()).settings()["rule"].endswith("test_asked_mask.Segmenter")
    metric = AskedMask(2, bright)
    assert (metric.name, metric.consumes, metric.logged) == ("asked_miou", ("sample", "mask"), ("mean",))


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        (lambda x: x[:, 0] * 0, "rule must give masks"),
        (lambda x: x, r"scores \(B, 2, H, W\), got \(3, 3, 6, 6\)"),
        (lambda x: bright(x)[:, 1:], "one shape"),
        (lambda x: bright(x) + 1, "must hold class ids"),
    ],
)
def test_wrong_readers_are_named(rule, word):
    mask, images = asked()
    with pytest.raises(ValueError, match=word):
        AskedMask(2, rule).update(images, mask)


def test_a_reader_must_be_callable():
    with pytest.raises(ValueError, match=r"rule must be an nn\.Module or a function, got str"):
        AskedMask(2, "shapes")


def test_a_recipe_names_the_reader_by_its_path():
    from jsonargparse import ArgumentParser
    from torchmetrics import Metric

    parser = ArgumentParser()
    parser.add_argument("--metric", type=Metric)
    spelled = {"class_path": "lightning_flows.metrics.AskedMask"}
    threshold = {"class_path": f"{__name__}.Threshold", "init_args": {"above": 0.5}}
    for rule in (f"{__name__}.bright", {"class_path": f"{__name__}.Segmenter"}, threshold):
        asked_for = {**spelled, "init_args": {"num_classes": 2, "rule": rule}}
        metric = parser.instantiate_classes(parser.parse_object({"metric": asked_for})).metric
        mask, images = asked()
        metric.update(images, mask)
        assert metric.compute()["mean"] == 1
