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
