"""Ordinary folders become batches; what is missing or broken is named, with the layout that was expected."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.data import CaptionFolder, ImageFolder, MaskFolder


def save(path, value, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def classes(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", (k * 255, i, 0))
    return tmp_path


def test_class_folders_with_splits(classes):
    data = ImageFolder(str(classes), batch_size=8)
    assert (data.classes, data.num_classes, data.shape) == (["cat", "dog"], 2, (3, 8, 8))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 8, 8)
    assert torch.equal(batch["label"], (batch["image"][:, 0, 0, 0] > 0).long())
    assert set(batch) == {"image", "label", "index", "epoch"}
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [8, 4, 2]


def test_class_folders_without_splits_are_divided_by_fractions(classes):
    data = ImageFolder(str(classes / "train"), val_fraction=0.25, batch_size=2)
    assert [len(data.dataset(split)) for split in ("train", "val")] == [6, 2]
    assert data.classes == ["cat", "dog"]


def test_a_fraction_beside_a_split_folder_is_an_error(classes):
    with pytest.raises(ValueError, match=r"val_fraction=0\.1 but the data has a 'val' split"):
        ImageFolder(str(classes), val_fraction=0.1).setup("fit")


def test_images_without_classes_have_no_label(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.jpg", (i, i, i))
    data = ImageFolder(str(tmp_path), batch_size=3, channels=1)
    assert (data.classes, data.num_classes) == (None, None)
    batch = next(iter(data.train_dataloader()))
    assert "label" not in batch
    assert batch["image"].shape == (3, 1, 8, 8)


def test_a_folder_called_train_among_classes_is_not_taken_for_a_split(tmp_path):
    for name in ("train", "plane"):
        save(tmp_path / name / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"folders of splits and others with images \['plane'\]"):
        ImageFolder(str(tmp_path)).setup("fit")


def test_a_class_that_training_lacks_is_named(classes):
    save(classes / "val" / "fox" / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"fox.* is not one of training's \['cat', 'dog'\]"):
        ImageFolder(str(classes)).setup("fit")


def test_an_image_outside_of_the_classes_is_named(classes):
    save(classes / "train" / "stray.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"stray\.png lies beside class folders"):
        ImageFolder(str(classes)).setup("fit")


@pytest.mark.parametrize(
    ("data", "inside"), [(ImageFolder, ""), (MaskFolder, "images"), (CaptionFolder, "metadata.jsonl")]
)
def test_empty_folders_show_the_expected_layout(tmp_path, data, inside):
    with pytest.raises(FileNotFoundError, match=r"expected\n") as error:
        data(str(tmp_path)).setup("fit")
    assert inside in str(error.value)
    assert f"{tmp_path}/[train/]" in str(error.value)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        data(str(tmp_path / "nowhere")).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_names_its_file(classes, workers):
    (classes / "train" / "cat" / "0.png").write_bytes(b"")
    loader = ImageFolder(str(classes), batch_size=8, num_workers=workers).train_dataloader()
    with pytest.raises(ValueError, match=r"cat/0\.png cannot be read"):
        next(iter(loader))


def test_images_of_different_sizes_ask_for_a_size(classes):
    save(classes / "train" / "cat" / "9.png", (0, 0, 0), size=(8, 16))
    with pytest.raises(ValueError, match=r"one shape.*size="):
        list(ImageFolder(str(classes), batch_size=9).train_dataloader())
    batch = next(iter(ImageFolder(str(classes), batch_size=9, size=4).train_dataloader()))
    assert batch["image"].shape == (9, 3, 4, 4)


def captions(folder, rows):
    for row in rows:
        save(folder / row["file_name"], (1, 2, 3, 0), mode="RGBA")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("key", ["text", "caption", "headline"])
def test_captions_follow_their_images(tmp_path, key):
    for split in ("train", "validation"):
        captions(tmp_path / split, [{"file_name": f"{i}.png", key: f"picture {i}"} for i in range(4)])
    data = CaptionFolder(str(tmp_path), caption_key=key if key == "headline" else None, channels=4, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["caption"] == [f"picture {i}" for i in batch["index"].tolist()]
    assert batch["image"].shape == (4, 4, 8, 8)
    assert len(data.dataset("val")) == 4


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", r"metadata\.jsonl:2 is not JSON"),
        ('{"file_name": "0.png"}', r"metadata\.jsonl:2 must have 'file_name' and 'text' or 'caption'"),
        ('{"file_name": "9.png", "text": ""}', r"9\.png is in .* but does not exist"),
    ],
)
def test_wrong_metadata_names_file_and_line(tmp_path, line, error):
    captions(tmp_path, [{"file_name": "0.png", "text": "a"}])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        CaptionFolder(str(tmp_path)).setup("fit")


@pytest.fixture
def masks(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        ids = rng.integers(0, 3, (6, 8), dtype=np.uint8)
        for kind, pixels in (("images", np.repeat(ids[..., None] * 100, 3, 2)), ("masks", ids)):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "train" / kind / f"{i}.png")
    return tmp_path


def test_masks_follow_their_images(masks):
    data = MaskFolder(str(masks), size=(4, 4), resize=(6, 8), crop="random", flip=True, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].shape == (4, 4, 4)
    assert batch["mask"].dtype == torch.int64
    assert torch.equal(batch["mask"], ((batch["image"][:, 0] + 1) * 127.5 / 100).round().long())
    assert data.num_classes is None


@pytest.mark.parametrize(
    ("content", "options", "names"),
    [
        (["a", "b", "c"], {}, ["a", "b", "c"]),
        ({"0": "a", "1": "b", "2": "c"}, {}, ["a", "b", "c"]),
        ({"fine": ["a", "b", "c"], "other": ["x"]}, {"classes_key": "fine"}, ["a", "b", "c"]),
        ({"fine": ["a"]}, {}, None),
    ],
)
def test_mask_classes_from_the_file(masks, content, options, names):
    (masks / "classes.json").write_text(json.dumps(content))
    data = MaskFolder(str(masks), batch_size=4, **options)
    assert data.classes == names
    assert data.num_classes == (None if names is None else len(names))
    next(iter(data.train_dataloader()))


def test_mask_ids_are_remapped_by_a_table(masks):
    (masks / "classes.json").write_text(json.dumps({"groups": ["x", "y"], "of": [0, 1, 1]}))
    plain = next(iter(MaskFolder(str(masks), batch_size=4).train_dataloader()))
    data = MaskFolder(str(masks), batch_size=4, classes_key="groups", remap_key="of")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["mask"], plain["mask"].clamp(max=1))
    assert data.num_classes == 2
    with pytest.raises(ValueError, match="remap_key='off' is not a list"):
        MaskFolder(str(masks), remap_key="off").setup("fit")


def test_mask_errors_name_the_file(masks):
    with pytest.raises(ValueError, match=r"masks/\d\.png holds class id 2, but there are 2 classes"):
        list(MaskFolder(str(masks), num_classes=2, batch_size=4).train_dataloader())
    save(masks / "train" / "masks" / "0.png", 0, size=(5, 5), mode="L")
    with pytest.raises(ValueError, match=r"masks/0\.png and image .*0\.png differ in size"):
        list(MaskFolder(str(masks), batch_size=4).train_dataloader())
    (masks / "train" / "masks" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/0\.\* does not exist"):
        MaskFolder(str(masks)).setup("fit")
