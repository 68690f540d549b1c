"""LMDB databases in the three published layouts; nothing in a pickle is ever run."""

import io
import json
import os
import pickle

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.data import ImageLMDB
from lightning_flows.data.lmdb import Database, plain_value

RNG = np.random.default_rng(0)


def write(path, values, **options):
    """A database; keys of a list are its decimal indices."""
    entries = values if isinstance(values, dict) else {str(i).encode(): value for i, value in enumerate(values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 22, **options) as environment, environment.begin(write=True) as into:
        for key, value in entries.items():
            into.put(key, value)
    return path


def squares(n, side=6):
    return RNG.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def png(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def chw(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def raw(n, folder, split="train"):
    pixels = squares(n)
    write(folder / f"{split}.lmdb", [square.tobytes() for square in pixels])
    return pixels


def test_raw_squares_with_their_validation(tmp_path):
    pixels = raw(12, tmp_path)  # ten and more: key order is "0", "1", "10", "11", "2", ..., item order is not
    raw(3, tmp_path, "validation")
    data = ImageLMDB(str(tmp_path), layout="raw", batch_size=4)
    assert (len(data.dataset("train")), len(data.dataset("val")), data.shape) == (12, 3, (3, 6, 6))
    assert data.num_classes is None
    for i in (2, 11):
        assert torch.equal(data.dataset("train").items[i]["image"], chw(pixels[i]))
    assert len(ImageLMDB(str(tmp_path), layout="raw", first=5).dataset("train")) == 5
    grey = ImageLMDB(str(tmp_path / "train.lmdb"), layout="raw", channels=1, val_fraction=0.25)
    assert (grey.shape, len(grey.dataset("val"))) == ((1, 6, 6), 3)


def test_encoded_images_under_any_key(tmp_path):
    pixels = {key: squares(1)[0] for key in (b"ffe1", b"00a0", b"\xfe\x00")}
    write(tmp_path / "church_train_lmdb", {key: png(image) for key, image in pixels.items()})
    write(tmp_path / "church_val_lmdb", {b"aa": png(squares(1)[0])})
    data = ImageLMDB(str(tmp_path), layout="encoded")
    order = [b"00a0", b"ffe1", b"\xfe\x00"]
    for i, key in enumerate(order):
        assert torch.equal(data._read("train")[i]["image"], chw(pixels[key]))
    assert len(data.dataset("val")) == 1
    first = ImageLMDB(str(tmp_path), layout="encoded", first=2)._read("train")
    assert first.keys == order[:2]


def test_encoded_images_under_decimal_keys_keep_their_numbers(tmp_path):
    pixels = squares(11)
    write(tmp_path / "train.lmdb", [png(image) for image in pixels])
    items = ImageLMDB(str(tmp_path), layout="encoded")._read("train")
    assert torch.equal(items[2]["image"], chw(pixels[2]))


def test_key_cache_is_written_whole_read_again_and_renewed(tmp_path, monkeypatch):
    path = write(tmp_path / "train.lmdb", {key: png(squares(1)[0]) for key in (b"\xff\x00", b"b", b"a")})
    cache = tmp_path / "lists" / "keys.json"
    options = {"layout": "encoded", "key_cache": str(cache)}
    assert ImageLMDB(str(path), **options)._read("train").keys == [b"a", b"b", b"\xff\x00"]
    assert [file.name for file in cache.parent.iterdir()] == ["keys.json"]
    with monkeypatch.context() as patch:
        patch.setattr(Database, "keys", lambda *_: pytest.fail("the keys are listed again"))
        assert ImageLMDB(str(path), **options)._read("train").keys == [b"a", b"b", b"\xff\x00"]
    assert ImageLMDB(str(path), first=1, **options)._read("train").keys == [b"a"]
    assert json.loads(cache.read_text())["first"] == 1


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_values_with_labels(tmp_path, protocol):
    pixels = squares(3)
    values = [pickle.dumps((png(image), i % 2), protocol) for i, image in enumerate(pixels)]
    entries = {str(i).encode(): value for i, value in enumerate(values)}
    entries |= {b"__len__": pickle.dumps(3), b"classes": pickle.dumps(["cat", "dog"]), b"__keys__": pickle.dumps([])}
    write(tmp_path / "train.lmdb", entries, subdir=False)
    data = ImageLMDB(str(tmp_path / "train.lmdb"), layout="pickled", batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [i % 2 for i in batch["index"].tolist()]
    wanted = torch.stack([chw(pixels[i]) for i in batch["index"].tolist()])
    assert torch.equal(batch["image"], wanted.float() / 127.5 - 1)
    assert (data.classes, data.num_classes, data.shape) == (["cat", "dog"], 2, (3, 6, 6))


def test_pickled_bytes_alone_have_no_label(tmp_path):
    write(tmp_path / "train.lmdb", [pickle.dumps(png(image)) for image in squares(2)])
    assert set(ImageLMDB(str(tmp_path), layout="pickled")._read("train")[1]) == {"image"}


class Code:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("value", [Code(), np.zeros(2, np.uint8), io.BytesIO, (b"", Code())])
@pytest.mark.parametrize("protocol", [0, 4])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pickled value of here is refused: it names .*only plain values"):
        plain_value(pickle.dumps(value, protocol), "here")
    assert not list(tmp_path.iterdir())


def test_plain_values_are_read():
    value = {"a": [1, 2.5, None, True], "b": (b"\x00\xff", "text")}
    for protocol in range(6):
        assert plain_value(pickle.dumps(value, protocol), "here") == value
    with pytest.raises(ValueError, match="here is refused"):
        plain_value(b"\x80\x04nonsense", "here")


@pytest.mark.parametrize(
    ("layout", "value", "error"),
    [
        ("raw", b"12345", r"key '0' has 5 bytes, which are no square"),
        ("raw", b"", r"key '0' has 0 bytes"),
        ("encoded", b"no picture", r"key '0' cannot be read"),
        ("pickled", pickle.dumps((b"no picture", 1)), r"key '0' cannot be read"),
        ("pickled", pickle.dumps(("text", 1)), r"key '0' must be a pickle of"),
        ("pickled", pickle.dumps((b"", 1, 2)), r"key '0' must be a pickle of"),
    ],
)
def test_a_broken_value_names_database_and_key(tmp_path, layout, value, error):
    write(tmp_path / "train.lmdb", [value])
    loader = ImageLMDB(str(tmp_path), layout=layout, batch_size=1).train_dataloader()
    with pytest.raises(ValueError, match=rf"train\.lmdb, {error}"):
        next(iter(loader))


def test_a_gap_in_the_keys_is_named(tmp_path):
    write(tmp_path / "train.lmdb", {b"0": bytes(12), b"7": bytes(12)})
    with pytest.raises(ValueError, match=r"train\.lmdb, key '1' does not exist"):
        ImageLMDB(str(tmp_path), layout="raw")._read("train")[1]


def test_wrong_places_and_arguments_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected\n.*train\.lmdb"):
        ImageLMDB(str(tmp_path / "nowhere"), layout="raw").setup("fit")
    with pytest.raises(FileNotFoundError, match="no training database"):
        ImageLMDB(str(tmp_path), layout="raw").setup("fit")
    (tmp_path / "file").write_bytes(b"no database")
    with pytest.raises(ValueError, match="file cannot be opened"):
        ImageLMDB(str(tmp_path / "file"), layout="raw").setup("fit")
    raw(2, tmp_path)
    with pytest.raises(ValueError, match=r"first=3 needs as many items, but .* has 2"):
        ImageLMDB(str(tmp_path), layout="raw", first=3).setup("fit")
    raw(2, tmp_path / "both")
    write(tmp_path / "both" / "x_train_lmdb", [b""])
    with pytest.raises(ValueError, match="several databases of 'train'"):
        ImageLMDB(str(tmp_path / "both"), layout="raw").setup("fit")
    for options in ({"layout": "png"}, {"layout": "raw", "first": 0}, {"layout": "raw", "key_cache": "keys.pkl"}):
        with pytest.raises(ValueError, match=list(options)[-1]):
            ImageLMDB(str(tmp_path), **options)


def test_workers_open_the_database_themselves(tmp_path):
    pixels = raw(8, tmp_path)
    both = [ImageLMDB(str(tmp_path), layout="raw", batch_size=2, num_workers=1) for _ in range(2)]
    assert [data.shape for data in both] == [(3, 6, 6)] * 2  # opened here, twice, before the workers fork
    here = both[1]._read("train").database.environment
    for batch in both[0].train_dataloader():
        wanted = torch.stack([chw(pixels[i]) for i in batch["index"].tolist()])
        assert torch.equal(batch["image"], wanted.float() / 127.5 - 1)
    assert both[1]._read("train").database.environment is here  # still open, and one for the whole process
    assert both[0]._read("train").database.environment is here
    sent = pickle.loads(pickle.dumps(both[0]._read("train")))  # as to a worker that is spawned
    assert torch.equal(sent[5]["image"], chw(pixels[5]))


def test_a_forked_process_closes_what_it_inherits(tmp_path):
    raw(2, tmp_path)
    items = [ImageLMDB(str(tmp_path), layout="raw")._read("train") for _ in range(2)]
    first = items[0][0]["image"]
    inherited = items[0].database.environment
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        same = torch.equal(items[1][0]["image"], first) and items[1].database.environment is not inherited
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    assert torch.equal(items[0][0]["image"], first)


def test_a_resumed_loader_sees_the_very_next_items(tmp_path):
    raw(8, tmp_path)

    def loader():
        return ImageLMDB(str(tmp_path), layout="raw", batch_size=2, flip=True, seed=3).train_dataloader()

    whole = list(loader())
    stopped = loader()
    iterator = iter(stopped)
    next(iterator)
    rest = loader()
    rest.load_state_dict(stopped.state_dict())
    for a, b in zip(rest, whole[1:], strict=True):
        assert torch.equal(a["image"], b["image"])


def test_without_lmdb_the_extra_is_named(tmp_path, monkeypatch):
    raw(1, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-flows\[lmdb\]"):
        ImageLMDB(str(tmp_path), layout="raw").setup("fit")
