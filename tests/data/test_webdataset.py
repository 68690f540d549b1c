"""Tar shards are read by an index: items have numbers, so that order and resume are those of all other data."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.data import WebDataset, webdataset

RNG = np.random.default_rng(0)


def png(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def pack(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def shards(folder, split="train", n=3, per=4, **kinds):
    """``n`` shards of ``per`` items; the first pixel says the item's number."""
    for s in range(n):
        files = {}
        for i in range(s * per, (s + 1) * per):
            files[f"{i:04d}.png"] = png(np.full((5, 5, 3), i, np.uint8))
            files |= {f"{i:04d}.{kind}": text(i).encode() for kind, text in kinds.items()}
        pack(folder / f"{split}-{s:06d}.tar", files)


def numbers(batch):
    return ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().long()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_labels_and_captions(tmp_path, workers):
    shards(tmp_path, cls=lambda i: str(i % 3) + "\n", txt=lambda i: f"Bild {i} \u00e4", json=lambda i: "{}")
    shards(tmp_path, "val", n=1, per=2, cls=lambda i: "0", txt=lambda i: "x")
    data = WebDataset(str(tmp_path), batch_size=4, num_workers=workers)
    assert (data.shape, data.classes, len(data.dataset("val"))) == ((3, 5, 5), ["0", "1", "2"], 2)
    seen = []
    for batch in data.train_dataloader():
        found = numbers(batch)
        assert torch.equal(found, batch["index"])
        assert torch.equal(batch["label"], found % 3)
        assert batch["caption"] == [f"Bild {i} \u00e4" for i in found.tolist()]
        seen += found.tolist()
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)  # shuffled over all shards


def test_images_alone_in_folders_of_shards_and_in_one_shard(tmp_path):
    shards(tmp_path / "train", "00", n=2)
    data = WebDataset(str(tmp_path), channels=1)
    assert (data.shape, data.classes) == ((1, 5, 5), None)
    assert "label" not in data.dataset("train")[0]
    one = WebDataset(str(tmp_path / "train" / "00-000001.tar"))
    assert int(numbers({"image": one.dataset("train")[3]["image"][None]})) == 7
    assert WebDataset(str(tmp_path), classes=["a", "b"]).num_classes == 2
    assert len(WebDataset(str(tmp_path / "train")).dataset("train")) == 8


def test_names_are_items_up_to_the_first_dot_of_the_file(tmp_path):
    image = png(np.zeros((2, 2, 3), np.uint8))
    files = {"./a.b/x.png": image, "./a.b/x.cls": b"4", "./a.b/x.depth.png": b"", "./.x.png": b"", "readme": b""}
    pack(tmp_path / "train.tar", files)
    data = WebDataset(str(tmp_path))
    assert data.dataset("train")[0]["label"] == 4
    assert (len(data.dataset("train")), data.num_classes) == (1, 5)


def test_the_index_is_kept_read_again_and_renewed(tmp_path, monkeypatch):
    shards(tmp_path / "data", cls=str)
    options = {"root": str(tmp_path / "data"), "index": str(tmp_path / "index")}
    before = WebDataset(**options).table("train")
    assert [file.name for file in (tmp_path / "index").iterdir()] == ["train.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_index_shard", lambda *_: pytest.fail("the headers are read again"))
        assert np.array_equal(WebDataset(**options).table("train"), before)
    shards(tmp_path / "data", n=1, per=2, cls=str)
    assert len(WebDataset(**options).table("train")) == 10


def test_a_resumed_loader_sees_the_very_next_items(tmp_path):
    shards(tmp_path)

    def loader():
        return WebDataset(str(tmp_path), batch_size=2, flip=True, seed=3).train_dataloader()

    whole = [numbers(batch).tolist() for batch in loader()]
    stopped = loader()
    iterator = iter(stopped)
    next(iterator), next(iterator)
    rest = loader()
    rest.load_state_dict(stopped.state_dict())
    assert [numbers(batch).tolist() for batch in rest] == whole[2:]


IMAGE = png(np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"0.png": IMAGE, "1.cls": b"1"}, r"s\.tar has no image for the item '1' \(1 such\)"),
        ({"0.png": IMAGE, "0.cls": b"x"}, r"s\.tar, 0\.cls must be a decimal number, got 'x'"),
        ({"0.png": IMAGE, "0.jpg": IMAGE}, r"s\.tar has a second image '0\.jpg' for the item '0'"),
        ({"0.png": IMAGE, "1.png": IMAGE, "1.cls": b"1"}, r"s\.tar, 0\.png has no label \(\.cls\), but 1 items"),
        ({"0.png": IMAGE, "0.txt": b"a", "1.png": IMAGE}, r"s\.tar, 1\.png has no caption"),
        ({"0.json": b""}, r"s\.tar holds no images"),
    ],
)
def test_shards_that_do_not_fit_are_explained(tmp_path, files, error):
    pack(tmp_path / "s.tar", files)
    with pytest.raises(ValueError, match=error):
        WebDataset(str(tmp_path)).setup("fit")


def test_a_broken_image_names_shard_and_file(tmp_path):
    pack(tmp_path / "s.tar", {"0.png": IMAGE, "sub/1.png": b"broken"})
    with pytest.raises(ValueError, match=r"s\.tar, sub/1\.png cannot be read"):
        WebDataset(str(tmp_path))._read("train")[1]


def test_compressed_and_cut_shards_and_missing_roots_are_named(tmp_path):
    pack(tmp_path / "z" / "s.tar", {"0.png": IMAGE}, "w:gz")
    with pytest.raises(ValueError, match=r"s\.tar is no uncompressed tar file"):
        WebDataset(str(tmp_path / "z")).setup("fit")
    whole = pack(tmp_path / "cut" / "s.tar", {"0.png": bytes(4096)})
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"s\.tar .* is cut off"):
        WebDataset(str(tmp_path / "cut")).setup("fit")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        WebDataset(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no training shard; expected\n"):
        WebDataset(str(tmp_path)).setup("fit")
