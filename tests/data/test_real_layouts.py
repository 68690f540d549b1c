"""Real data in ordinary folders, as a user unpacks them; the folder is named by LIGHTNING_FLOWS_DATA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_flows.data import Arrays, CaptionFolder, ImageFolder, MaskFolder

SOURCE = os.environ.get("LIGHTNING_FLOWS_DATA")
pytestmark = pytest.mark.skipif(not SOURCE, reason="LIGHTNING_FLOWS_DATA does not name a folder of data sets")


def unpacked(name, out, limit=12):
    script = Path(SOURCE) / "unpack.py"
    command = [sys.executable, "-B", str(script), name, str(out), "--limit", str(limit)]
    subprocess.run(command, check=True, capture_output=True)
    return str(out / name)


def first(data):
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    assert {"index", "epoch"} <= set(batch)
    return batch


def test_garments_in_class_folders(tmp_path):
    data = ImageFolder(unpacked("fashion_mnist", tmp_path, 60), channels=1, size=32, val_fraction=0.1, batch_size=8)
    batch = first(data)
    assert batch["image"].shape == (8, 1, 32, 32) == (8, *data.shape)
    assert data.num_classes == 10
    assert len(data.dataset("test")) == 60


@pytest.mark.parametrize("keys", [("labels59", None, 59), ("groups16", "group_of_label", 16)])
def test_people_with_masks(tmp_path, keys):
    classes_key, remap_key, count = keys
    data = MaskFolder(
        unpacked("ccp_parsing", tmp_path), classes_key=classes_key, remap_key=remap_key,
        size=(96, 64), resize=(108, 72), crop="random", flip=True, batch_size=4,
    )  # fmt: skip
    batch = first(data)
    assert batch["image"].shape == (4, 3, 96, 64)
    assert batch["mask"].shape == (4, 96, 64)
    assert data.num_classes == count
    assert 0 <= batch["mask"].min() <= batch["mask"].max() < count


@pytest.mark.parametrize("channels", [3, 4])
def test_emoji_with_captions(tmp_path, channels):
    data = CaptionFolder(unpacked("noto_emoji64", tmp_path), channels=channels, batch_size=6)
    batch = first(data)
    assert batch["image"].shape == (6, channels, 64, 64)
    assert all(isinstance(caption, str) and caption for caption in batch["caption"])
    corners = batch["image"][:, -1, 0, 0]
    assert torch.equal(corners, torch.full((6,), 1.0 if channels == 3 else -1.0))  # white, or transparent
    assert len(data.dataset("val")) > 0


def test_packed_arrays_load_as_they_are():
    data = Arrays(str(Path(SOURCE) / "mnist"), layout="NHW", batch_size=8)
    batch = first(data)
    assert batch["image"].shape == (8, 1, 28, 28)
    assert data.num_classes == 10
    assert [len(data.dataset(split)) for split in ("train", "test")] == [60000, 10000]


CELLS = {
    "classes": ["neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil"],
    "mask_classes": ["background", "cytoplasm", "nucleus"],
}
STREETS = {"image_key": "jpeg", "mask_ids": [*range(11), 255], "mask_classes": [str(i) for i in range(11)]}
PEOPLE = {"image_key": "jpeg", "mask_ids": "group_of_label", "mask_classes": [str(i) for i in range(16)]}


@pytest.mark.parametrize(
    ("name", "options", "shape", "counts", "unlabelled"),
    [
        ("wbc96", CELLS, (96, 96), [320, 30], False),
        ("camvid128", STREETS, (96, 128), [367, 101], True),
        ("ccp_parsing", PEOPLE, (192, 128), [804, 80], False),
    ],
)
def test_packed_masks_load_as_they_are(name, options, shape, counts, unlabelled):
    data = Arrays(str(Path(SOURCE) / name), test_split="val", batch_size=16, **options)
    batch = first(data)
    assert batch["image"].shape == (16, 3, *shape)
    assert batch["mask"].shape == (16, *shape)
    assert ("label" in batch) == (name == "wbc96")
    assert [len(data.dataset(split)) for split in ("train", "val")] == counts
    ids = set(batch["mask"].unique().tolist())
    assert (255 in ids) == unlabelled
    assert ids - {255} <= set(range(data.num_mask_classes))
    assert len(ids) > 2


@pytest.mark.parametrize(
    ("name", "packed", "unpacked_options"),
    [
        ("camvid128", STREETS, {"ids": [*range(11), 255]}),
        ("ccp_parsing", PEOPLE, {"classes_key": "groups16", "remap_key": "group_of_label"}),
    ],
)
def test_packed_and_unpacked_masks_are_the_same(tmp_path, name, packed, unpacked_options):
    options = {"size": 48, "resize": 56, "crop": "random"}
    a = Arrays(str(Path(SOURCE) / name), **packed, **options)
    b = MaskFolder(unpacked(name, tmp_path, 3), **unpacked_options, **options)
    for split in ("val", "train"):
        for i in range(3):
            one, other = a.dataset(split)[i], b.dataset(split)[i]
            assert torch.equal(one["mask"], other["mask"])
            assert torch.equal(one["image"], other["image"])
