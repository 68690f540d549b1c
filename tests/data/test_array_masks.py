"""Masks in numpy files, beside images that are arrays or packed JPEG and PNG files."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.codecs import IGNORE
from lightning_flows.data import Arrays
from lightning_flows.store import build

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 8, 3), dtype=np.uint8)
MASKS = RNG.integers(0, 4, (6, 4, 8), dtype=np.uint8)
LABELS = np.arange(6, dtype=np.uint8) % 3


def packed(pictures, kind="PNG"):
    files = []
    for picture in pictures:
        Image.fromarray(picture).save(buffer := BytesIO(), kind)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return {"images": np.concatenate(files), "offsets": np.cumsum([0, *map(len, files)])}


def saved(folder, **arrays):
    np.savez(folder / "train.npz", **arrays)
    return str(folder)


@pytest.mark.parametrize("images", [{"images": PIXELS}, packed(PIXELS)], ids=["arrays", "packed"])
def test_image_mask_and_label_come_out_together(tmp_path, images):
    data = Arrays(saved(tmp_path, **images, masks=MASKS, labels=LABELS), batch_size=6, mask_classes=list("abcd"))
    batch = next(iter(data.train_dataloader()))
    order = batch["index"].numpy()
    assert set(batch) == {"image", "mask", "label", "index", "epoch"}
    assert batch["image"].dtype == torch.float32
    assert np.allclose((batch["image"].numpy() + 1) * 127.5, PIXELS[order].transpose(0, 3, 1, 2), atol=1e-3)
    assert batch["mask"].dtype == batch["label"].dtype == torch.int64
    assert np.array_equal(batch["mask"], MASKS[order])
    assert np.array_equal(batch["label"], LABELS[order])
    assert (data.num_classes, data.num_mask_classes, data.mask_classes) == (3, 4, ["a", "b", "c", "d"])


def test_several_parts_become_one_split(tmp_path):
    for i, part in enumerate((slice(0, 4), slice(4, 6))):
        np.savez(tmp_path / f"train-{i:02d}.npz", **packed(PIXELS[part]), masks=MASKS[part])
    data = Arrays(str(tmp_path))
    assert len(data.dataset("train")) == 6
    assert np.array_equal(data.dataset("train")[5]["mask"], MASKS[5])
    assert np.allclose((data.dataset("train")[5]["image"].numpy() + 1) * 127.5, PIXELS[5].transpose(2, 0, 1), atol=1e-3)


@pytest.mark.parametrize("ids", [[0, 0, 1, 255], {"0": 0, "1": 0, "2": 1, "3": 255}, "table"])
def test_ids_are_mapped(tmp_path, ids):
    root = saved(tmp_path, images=PIXELS, masks=MASKS, table=np.array([0, 0, 1, 255], np.uint8))
    data = Arrays(root, mask_ids=ids, mask_classes=["a", "b"])
    for items in (data.dataset("train"), build(data.config).dataset("train")):
        assert np.array_equal(items[2]["mask"], np.array([0, 0, 1, IGNORE])[MASKS[2]])
    known = Arrays(root, mask_ids=ids).num_mask_classes
    assert known == (None if ids == "table" else 2)


def test_crops_and_workers_treat_masks_like_images(tmp_path):
    values = np.repeat(MASKS[..., None] * 60, 3, 3)
    root = saved(tmp_path, **packed(values), masks=MASKS)
    options = {"size": 4, "crop": "random", "flip": True, "batch_size": 3}
    loaders = [Arrays(root, num_workers=k, **options).train_dataloader() for k in (0, 2)]
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(((a["image"][:, 0] + 1) * 127.5 / 60).round().long(), a["mask"])
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])


def test_grey_or_coloured_as_asked(tmp_path):
    assert Arrays(saved(tmp_path, **packed(PIXELS, "JPEG")), channels=1).shape == (1, 4, 8)
    assert Arrays(saved(tmp_path, **packed(PIXELS[..., 0])), channels=3).shape == (3, 4, 8)


@pytest.mark.parametrize(
    ("arrays", "options", "error"),
    [
        ({"masks": MASKS[:5]}, {}, r"mask_key='masks' in .*train\.npz must be 6 masks as large .*\(5, 4, 8\)"),
        ({"masks": MASKS[:, :3]}, {}, r"must be 6 masks .* got uint8 \(6, 3, 8\), image 0 is \(4, 8\)"),
        ({"masks": MASKS.astype(float)}, {}, r"must be 6 masks .* got float64"),
        ({"masks": MASKS}, {"mask_classes": ["a"]}, r"mask_key='masks' in .*train\.npz holds class id 3, .* 1 classes"),
        ({"masks": MASKS}, {"mask_ids": [0, 1]}, r"mask_key='masks' in .*train\.npz holds id 3, which is not in ids"),
        (
            {"masks": MASKS},
            {"mask_ids": "of"},
            r"mask_ids='of' is not in .*train\.npz, which has \['images', 'masks'\]",
        ),
        ({"masks": MASKS}, {"mask_ids": [0, -1]}, "ids must map ids >= 0"),
        ({"offsets": np.array([0, 5])}, {}, r"packed pictures of .*train\.npz must be uint8 bytes"),
        ({**packed(PIXELS), "offsets": np.array([0, 9, 7])}, {}, "rising offsets"),
        ({**packed(PIXELS), "masks": MASKS[:, :3]}, {}, r"got uint8 \(6, 3, 8\), image 0 is \(4, 8\)"),
        ({**packed(PIXELS), "labels": LABELS[:2]}, {}, "label_key='labels' in .* must be 6 integers"),
    ],
)
def test_what_does_not_fit_names_the_file(tmp_path, arrays, options, error):
    with pytest.raises(ValueError, match=error):
        Arrays(saved(tmp_path, **{"images": PIXELS, **arrays}), **options).setup("fit")


def test_a_broken_packed_picture_is_named(tmp_path):
    broken = {"images": np.zeros(20, np.uint8), "offsets": np.array([0, 10, 20])}
    with pytest.raises(ValueError, match=r"image 1 of .*train\.npz cannot be read"):
        Arrays(saved(tmp_path, **broken)).dataset("train")[1]


@pytest.mark.parametrize("key", ["masks", "labels", "offsets"])
def test_what_only_some_parts_have_is_an_error(tmp_path, key):
    first = {"images": PIXELS, "masks": MASKS, "labels": LABELS} | (packed(PIXELS) if key == "offsets" else {})
    np.savez(tmp_path / "train-0.npz", **first)
    second = first if key != "offsets" else {**first, "images": PIXELS}
    np.savez(tmp_path / "train-1.npz", **{name: value for name, value in second.items() if name != key})
    with pytest.raises(ValueError, match=rf"_key='{key}' is in some of the files only: .*train-1\.npz"):
        Arrays(str(tmp_path)).setup("fit")
