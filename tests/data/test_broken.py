"""An item that cannot be read is named, or replaced by the next one, as the user asks; a dead worker is explained."""

import io
import os
import re
import signal
import tarfile
import warnings

import pytest
from PIL import Image
from torch.utils.data import dataloader

from lightning_flows.data import CaptionFolder, ImageFolder, WebDataset
from lightning_flows.data.broken import SkipBroken
from tests.data.test_resume import Probe, digits, trainer

N, BROKEN = 12, (3, 4, 11)


@pytest.fixture
def folder(tmp_path):
    """Twelve grey pictures, each of its own level; three are no pictures."""
    for i in range(N):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:02d}.png")
    for i in BROKEN:
        (tmp_path / f"{i:02d}.png").write_bytes(b"\x89PNG, and then nothing")
    return tmp_path


def data(folder, **options):
    usual = {"batch_size": 4, "channels": 1, "on_broken": "skip", "max_broken": 0.5}
    return ImageFolder(str(folder), **{**usual, **options})


def levels(batches):
    """Grey level of each item of some batches: the item that was read."""
    return [round((x + 1) * 127.5) for batch in batches for x in batch["image"][:, 0, 0, 0].tolist()]


@pytest.mark.filterwarnings("ignore:image:UserWarning")
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"cache": True}], ids=["plain", "workers", "cache"])
def test_the_next_readable_item_takes_the_place(folder, options):
    module = data(folder, **options)
    batches = list(module.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 4, 4]
    stand_in = {3: 5, 4: 5, 11: 0}
    asked = [i for batch in batches for i in batch["index"].tolist()]
    assert levels(batches) == [stand_in.get(i, i) for i in asked]
    assert sorted(asked) == list(range(N))
    assert module.broken("train") == list(BROKEN)  # counted over the workers


def test_a_broken_file_is_warned_of_once_and_counted_at_the_end(folder):
    module = data(folder)
    loader = module.train_dataloader()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(loader)
        list(loader)
    names = sorted(str(w.message).split()[1].rpartition("/")[2] for w in caught)
    assert names == [f"{i:02d}.png" for i in BROKEN]
    with pytest.warns(UserWarning, match=r"3 of 12 train items could not be read and were replaced.*\[3, 4, 11\]"):
        module.teardown("fit")


@pytest.mark.filterwarnings("ignore:image:UserWarning")
def test_a_stopped_epoch_goes_on_with_the_same_items(folder):
    whole = levels(data(folder).train_dataloader())
    first, rest = data(folder).train_dataloader(), data(folder).train_dataloader()
    begun = iter(first)
    head = levels([next(begun)])
    rest.load_state_dict(first.state_dict())
    assert head + levels(rest) == whole


@pytest.mark.filterwarnings("ignore:image:UserWarning")
def test_a_replaced_item_never_comes_from_another_split(folder):
    module = data(folder, val_fraction=0.25, batch_size=3)
    own = {name: set(module.dataset(name).items.items.indices) for name in ("train", "val")}
    assert not own["train"] & own["val"]
    for name, loader in (("train", module.train_dataloader()), ("val", module.val_dataloader())):
        assert set(levels(loader)) <= own[name] - set(BROKEN)


@pytest.mark.filterwarnings("ignore:image:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_allowed_share_is_an_error(folder, workers):
    loader = data(folder, max_broken=0.2, num_workers=workers).train_dataloader()
    with pytest.raises(ValueError, match=r"3 of the 12 train items cannot be read, more than max_broken=0\.2 .*\.png"):
        list(loader)
    with pytest.raises(ValueError, match="none of the 2 val items"):
        SkipBroken(Nothing(), 1.0, "val")[1]


class Nothing:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError("gone")


def test_the_default_is_an_error_and_wrong_words_are_named(folder):
    with pytest.raises(ValueError, match=r"(03|04|11)\.png cannot be read"):
        list(ImageFolder(str(folder), batch_size=4).train_dataloader())
    with pytest.raises(ValueError, match="on_broken must be 'raise' or 'skip', got 'ignore'"):
        data(folder, on_broken="ignore")
    with pytest.raises(ValueError, match=r"max_broken must lie in \[0, 1\], got 2"):
        data(folder, max_broken=2)


def tar(path, items):
    with tarfile.open(path, "w") as archive:
        for name, content in items.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["webdataset", "lmdb", "captions"])
def test_an_item_of_an_archive_is_named_inside_a_worker(tmp_path, kind):
    if kind == "webdataset":
        tar(tmp_path / "train-0.tar", {"a7.png": b"no picture"})
        module, name = WebDataset(str(tmp_path), batch_size=1, num_workers=1), r"train-0\.tar.*a7"
    elif kind == "lmdb":
        import lmdb

        from lightning_flows.data import ImageLMDB

        with lmdb.open(str(tmp_path / "train.lmdb")) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"a7", b"no picture")
        module = ImageLMDB(str(tmp_path), layout="encoded", batch_size=1, num_workers=1)
        name = r"train\.lmdb, key 'a7'"
    else:
        (tmp_path / "a7.png").write_bytes(b"no picture")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a7.png", "text": "a"}\n')
        module, name = CaptionFolder(str(tmp_path), batch_size=1, num_workers=1), r"a7\.png"
    with pytest.raises(ValueError, match=name + ".* cannot be read"):
        next(iter(module.train_dataloader()))


class Deadly:
    """Items of which one ends the worker that reads it."""

    def __init__(self, items):
        self.items, self.parent = items, os.getpid()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if index == 7 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.items[index]


@pytest.mark.timeout(60)
def test_a_dead_worker_ends_the_run_and_says_what_to_do(tmp_path):
    module = digits(workers=2)
    module.dataset("train").items = Deadly(module.dataset("train").items)
    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as caught:  # it may hand over a batch
        trainer(tmp_path, steps=8).fit(Probe(), module)
    if isinstance(caught.value, RuntimeError):
        assert re.search(r"DataLoader worker .*(killed|exited)", str(caught.value))
    assert "num_workers (now 2" in caught.value.__notes__[0]
    other = RuntimeError("something else")
    module.on_exception(other)
    assert not hasattr(other, "__notes__")


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), False),  # of the items
        (OSError("something else"), False),
    ],
)
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_explained(monkeypatch, error, explained):
    def broken_off(*args, **kwargs):
        raise error

    module = digits(workers=1)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_try_get_data", broken_off)
    with pytest.raises(type(error)) as caught:
        next(iter(module.train_dataloader()))
    module.on_exception(caught.value)
    assert hasattr(caught.value, "__notes__") == explained
    outside = ConnectionResetError(104, "Connection reset by peer")  # of a logger, say
    module.on_exception(outside)
    assert not hasattr(outside, "__notes__")
