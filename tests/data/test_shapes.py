"""Drawn shapes: exact masks and labels, each picture a function of its number, and a rule that reads them back."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_flows.data import Shapes, shape_label, shape_mask
from lightning_flows.data.shape_drawing import REACH, colour_of, draw, inside
from lightning_flows.data.shape_rule import CHROMA_BETWEEN, HUES, KINDS, chroma_and_hue
from lightning_flows.flow.noise import generator_of
from lightning_flows.store import build


def stacked(data, split="test"):
    items = list(data.dataset(split))
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in ("image", "mask", "label")}


@pytest.mark.parametrize("size", [16, 32, (40, 56)])
def test_the_rule_reads_every_pixel_and_label_of_true_pictures(size):
    batch = stacked(Shapes(size=size, n_test=300, most=5))
    sides = (size, size) if isinstance(size, int) else size
    assert batch["image"].shape == (300, 3, *sides)
    assert batch["image"].abs().max() <= 1
    assert torch.equal(shape_mask(batch["image"]), batch["mask"])  # mean IoU 1
    assert torch.equal(shape_label(batch["mask"]), batch["label"])
    assert batch["mask"].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["label"].bincount(minlength=5).min() > 30


def test_the_rule_has_room_on_both_sides():
    batch = stacked(Shapes(n_test=500))
    chroma, hue = chroma_and_hue(batch["image"])
    background = batch["mask"] == 0
    assert chroma[background].max() < CHROMA_BETWEEN / 2
    assert chroma[~background].min() > 1.5 * CHROMA_BETWEEN
    away = (hue - torch.tensor([0.0, *HUES])[batch["mask"]]).abs()
    away = torch.minimum(away, 360 - away)[~background]
    assert away.max() < 15  # half of the smallest distance between two hues is 23


def test_the_rule_stands_what_a_model_may_do_to_a_picture():
    batch = stacked(Shapes(n_test=200))
    generator = torch.Generator().manual_seed(0)
    noisy = batch["image"] + 0.1 * torch.randn(batch["image"].shape, generator=generator)
    found = shape_mask(noisy)
    ious = [((found == k) & (batch["mask"] == k)).sum() / ((found == k) | (batch["mask"] == k)).sum() for k in range(6)]
    assert sum(ious) / 6 > 0.97


def test_the_rule_refuses_other_pictures_and_says_where_there_is_no_shape():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 4, 4\)"):
        shape_mask(torch.zeros(2, 1, 4, 4))
    assert torch.equal(shape_mask(torch.zeros(1, 3, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert shape_label(torch.zeros(1, 4, 4, dtype=torch.int64)).tolist() == [-1]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_shapes_have_unit_circle_area_and_lie_within_their_reach(kind):
    y, x = np.mgrid[-2:2:1001j, -2:2:1001j]
    covered = inside(kind, y, x)
    assert covered.mean() * 16 == pytest.approx(math.pi, rel=0.01)
    assert np.hypot(y, x)[covered].max() == pytest.approx(REACH[kind], abs=0.01)


@pytest.mark.parametrize(
    ("hue", "rgb"), [(0, (1, 0, 0)), (60, (1, 1, 0)), (120, (0, 1, 0)), (240, (0, 0, 1)), (300, (1, 0, 1))]
)
def test_colours_of_hues(hue, rgb):
    assert colour_of(hue, 1, 1) == pytest.approx(rgb)
    assert colour_of(hue, 0.5, 0.8) == pytest.approx([0.8 - 0.4 * (1 - c) for c in rgb])


def test_a_lone_shape_is_drawn_whole():
    for number in range(100):
        _, mask, kind = draw((32, 32), 1, generator_of(number))
        assert set(np.unique(mask)) == {0, kind + 1}
        assert 0.17 * 32 <= math.sqrt((mask > 0).sum() / math.pi) <= 0.27 * 32  # as large as was asked for


def test_edges_are_hard():
    image, mask, _ = draw((64, 64), 1, generator_of(3))
    chroma = (image.max(0).astype(int) - image.min(0)) / 255
    assert set(np.unique(chroma > CHROMA_BETWEEN)) == {False, True}
    assert ((chroma > 0.2) & (chroma < 0.45)).sum() == 0
    assert np.array_equal(chroma > CHROMA_BETWEEN, mask > 0)


def test_an_item_depends_on_seed_split_and_number_alone():
    few, many = Shapes(n_train=10, n_val=10), Shapes(n_train=1000, n_val=10, seed=5)
    torch.manual_seed(1)
    a, b = (data.read("train")[7] for data in (few, many))
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["mask"], b["mask"])
    others = [few.read("val")[7], few.read("train")[8], Shapes(n_train=10, data_seed=1).read("train")[7]]
    assert not any(torch.equal(a["image"], other["image"]) for other in others)


def test_pictures_differ_from_one_another():
    images = stacked(Shapes(n_test=200))["image"]
    assert len(images.flatten(1).unique(dim=0)) == 200


def same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() == {"image", "mask", "label", "index", "epoch"}
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("other", [{"num_workers": 2}, {"cache": True}])
def test_batches_do_not_depend_on_workers_or_the_cache(other):
    options = {"n_train": 40, "batch_size": 8, "flip": True}
    same(list(Shapes(**options).train_dataloader()), list(Shapes(**options, **other).train_dataloader()))


def test_a_run_resumed_inside_an_epoch_sees_the_rest_of_it():
    options = {"n_train": 40, "batch_size": 8, "flip": True}
    whole = list(Shapes(**options).train_dataloader())
    loader = Shapes(**options).train_dataloader()
    first = list(itertools.islice(loader, 2))
    again = Shapes(**options).train_dataloader()
    again.load_state_dict(loader.state_dict())
    again.sampler.set_epoch(0)
    same(first + list(again), whole)


def test_flips_take_the_mask_along():
    batch = next(iter(Shapes(n_train=64, batch_size=64, flip=True).train_dataloader()))
    assert torch.equal(shape_mask(batch["image"]), batch["mask"])
    assert batch["mask"].dtype == torch.int64


def test_splits_names_and_config():
    data = Shapes(size=24, n_train=30, n_val=0, n_test=7, val_fraction=0.2)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [24, 6, 7]
    assert data.classes == ["circle", "square", "triangle", "cross", "ring"]
    assert data.mask_classes == ["background", *data.classes]
    assert (data.shape, data.num_classes, data.levels) == ((3, 24, 24), 5, 256)
    again = build(data.config)
    assert torch.equal(again.dataset("test")[3]["image"], data.dataset("test")[3]["image"])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"size": 7}, "size of Shapes must be at least 8"),
        ({"size": None}, "size of Shapes"),
        ({"n_train": 0}, "n_train must be at least 1"),
        ({"n_val": -1}, "n_val and n_test at least 0"),
        ({"most": 0}, r"most must lie in 1\.\.5"),
        ({"most": 6}, r"most must lie in 1\.\.5"),
        ({"channels": 1}, "channels of Shapes must be 3 or None"),
        ({"resize": 64}, "resize has no use for Shapes"),
        ({"val_fraction": 0.1, "n_val": 4}, "data has a 'val' split of its own"),
    ],
)
def test_wrong_arguments_are_named(wrong, error):
    with pytest.raises(ValueError, match=error):
        Shapes(**wrong).setup("fit")
