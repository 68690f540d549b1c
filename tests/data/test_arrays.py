"""Arrays of numpy and torchvision's sets give the same kind of batches as folders."""

import pickle

import numpy as np
import pytest
import torch

from lightning_flows.data import CIFAR10, MNIST, Arrays, FashionMNIST

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def expected(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(
    ("layout", "stored"),
    [("NHWC", PIXELS), ("NCHW", PIXELS.transpose(0, 3, 1, 2)), ("NHW", PIXELS[..., 0])],
)
def test_layouts_give_the_same_images(tmp_path, layout, stored):
    np.savez(tmp_path / "a.npz", images=stored, labels=np.array([0, 1, 2, 0, 1, 2], np.uint8))
    data = Arrays(str(tmp_path / "a.npz"), layout=layout, batch_size=6)
    batch = next(iter(data.train_dataloader()))
    want = expected(PIXELS if layout != "NHW" else PIXELS[..., :1])
    assert torch.allclose(batch["image"], want[batch["index"]])
    assert batch["label"].tolist() == [i % 3 for i in batch["index"].tolist()]
    assert batch["label"].dtype == torch.int64
    assert data.num_classes == 3


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_float_arrays_are_scaled_from_their_range(tmp_path, value_range):
    low, high = value_range
    np.save(tmp_path / "a.npy", (PIXELS / 255 * (high - low) + low).astype(np.float32))
    data = Arrays(str(tmp_path / "a.npy"), value_range=value_range, batch_size=6)
    batch = next(iter(data.train_dataloader()))
    assert torch.allclose(batch["image"], expected(PIXELS)[batch["index"]], atol=1e-5)
    assert "label" not in batch
    assert data.num_classes is None


def test_folder_of_split_files_in_parts(tmp_path):
    for name, n in (("train-00", 4), ("train-01", 2), ("val", 3)):
        np.savez(tmp_path / f"{name}.npz", images=PIXELS[:n], labels=np.arange(n))
    data = Arrays(str(tmp_path), batch_size=6, classes=["a", "b", "c", "d"])
    assert [len(data.dataset(split)) for split in ("train", "val")] == [6, 3]
    assert data.dataset("train")[5]["label"] == 1
    assert data.classes == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("arrays", "options", "error"),
    [
        ({"x": PIXELS}, {}, r"image_key='images' is not in .*a\.npz, which has \['x'\]"),
        ({"images": PIXELS}, {"layout": "NHW"}, r"layout='NHW' does not fit .*a\.npz"),
        ({"images": PIXELS}, {"layout": "CHW"}, "layout must be one of"),
        ({"images": PIXELS}, {"channels": 1}, r"channels=1, but the images of .*a\.npz have 3"),
        ({"images": PIXELS.astype(np.float32)}, {}, "value_range is needed"),
        ({"images": PIXELS.astype(np.float32)}, {"value_range": (0, 1)}, "does not hold the values"),
        ({"images": np.full((2, 2, 2, 3), np.nan)}, {"value_range": (0, 1)}, "does not hold the values"),
        ({"images": PIXELS}, {"value_range": (1, 0)}, "lowest < highest"),
        ({"images": PIXELS.astype(np.int32)}, {}, "must be uint8 or float"),
        ({"images": PIXELS, "labels": np.zeros(5, int)}, {}, "label_key='labels'"),
        ({"images": PIXELS, "labels": np.zeros(6)}, {}, "label_key='labels'"),
    ],
)
def test_arrays_that_do_not_fit_are_explained(tmp_path, arrays, options, error):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=error):
        Arrays(str(tmp_path / "a.npz"), **options).setup("fit")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Arrays(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no training arrays; expected\n.*train\.npz"):
        Arrays(str(tmp_path)).setup("fit")
    (tmp_path / "train.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"train\.npz cannot be read"):
        Arrays(str(tmp_path)).setup("fit")


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


@pytest.mark.parametrize("data", [MNIST, FashionMNIST])
def test_torchvision_greys(tmp_path, data):
    raw = tmp_path / data.__name__ / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 4), ("t10k", 2)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8)))
    items = data(str(tmp_path), batch_size=4)
    assert (items.shape, items.num_classes) == ((1, 28, 28), 10)
    batch = next(iter(items.train_dataloader()))
    assert batch["image"].shape == (4, 1, 28, 28)
    assert batch["label"].tolist() == batch["index"].tolist()
    assert len(items.dataset("test")) == 2
    assert data(str(tmp_path), size=32).dataset("test")[0]["image"].shape == (1, 32, 32)


def test_torchvision_colours(tmp_path, monkeypatch):
    source = CIFAR10.source
    monkeypatch.setattr(source, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(source, "test_list", [])
    monkeypatch.setattr(source, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    folder = tmp_path / source.base_folder
    folder.mkdir()
    pixels = RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    rows = {"data": pixels.reshape(3, -1), "labels": [7, 8, 9]}
    (folder / "data_batch_1").write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"] * 10}))
    data = CIFAR10(str(tmp_path), batch_size=3)
    assert data.shape == (3, 32, 32)
    batch = next(iter(data.train_dataloader()))
    assert torch.allclose(batch["image"], (torch.from_numpy(pixels).float() / 127.5 - 1)[batch["index"]])
    assert batch["label"].tolist() == [7 + i for i in batch["index"].tolist()]


@pytest.mark.parametrize("data", [MNIST, FashionMNIST, CIFAR10])
def test_absent_torchvision_data_name_root_and_the_way_out(tmp_path, data):
    with pytest.raises(FileNotFoundError, match=rf"{data.__name__} is not under root=.*download=True"):
        data(str(tmp_path)).setup("fit")
    assert len(data(str(tmp_path)).classes) == 10
    with pytest.raises(ValueError, match="channels of"):
        data(str(tmp_path), channels=4)
