"""A checkpoint file is whole or not there, whatever happens while it is written; a damaged one is passed over."""

import errno
import os
import shutil
import signal
import zipfile

import lightning as L
import pytest
import torch

from lightning_flows.strategies import AtomicCheckpointIO, newest_checkpoint
from lightning_flows.strategies.checkpoint_io import damage, remove_leftovers
from tests.faults.test_disk import full_disk

CONTENT = {"state_dict": {"w": torch.arange(5000.0)}, "optimizer_states": [{}], "global_step": 3}


def save(path, content=CONTENT, at=0):
    AtomicCheckpointIO().save_checkpoint(content, path)
    os.utime(path, (at, at))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_what_torch_save_writes(tmp_path):
    path = save(tmp_path / "new" / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert names(path.parent) == ["a.ckpt"]
    assert damage(path) is None


def test_remote_places_are_left_to_lightning():
    import fsspec

    AtomicCheckpointIO().save_checkpoint(CONTENT, "memory://room/a.ckpt")
    with fsspec.open("memory://room/a.ckpt", "rb") as stream:
        assert torch.load(stream, weights_only=True)["global_step"] == 3
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, "a.ckpt", storage_options={})


def killed_while_writing(path):
    """Start a process that is killed after half of the file."""

    def half(content, stream):
        stream.write(b"PK\x03\x04 and so on")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        torch.save = half
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_leaves_the_former_file_and_the_next_save_cleans_up(tmp_path):
    path = save(tmp_path / "last.ckpt")
    killed_while_writing(path)
    left = [name for name in names(tmp_path) if name.endswith(".partial")]
    assert len(left) == 1
    assert left[0].startswith(".last.ckpt.")
    assert damage(path) is None
    assert newest_checkpoint(tmp_path) == path
    save(tmp_path / "other.ckpt")
    assert names(tmp_path) == ["last.ckpt", "other.ckpt"]


def test_a_file_that_is_being_written_is_no_leftover(tmp_path, monkeypatch):
    seen, original = [], torch.save

    def looking(content, stream):
        original(content, stream)
        seen.append((remove_leftovers(tmp_path), names(tmp_path)))

    monkeypatch.setattr(torch, "save", looking)
    save(tmp_path / "a.ckpt")
    ((removed, there),) = seen
    assert removed == []
    assert len(there) == 1
    assert names(tmp_path) == ["a.ckpt"]


def test_a_full_disk_names_the_file_the_reason_and_what_is_intact(tmp_path):
    path = save(tmp_path / "last.ckpt")
    before, said = path.read_bytes(), r"last\.ckpt was not written: File too large \(intact are last\.ckpt\)"
    with full_disk():  # no longer than needed: pytest may write its own report to a file
        with pytest.raises(OSError, match=said) as caught:
            AtomicCheckpointIO().save_checkpoint(CONTENT, path)
        with pytest.raises(OSError, match="there is no earlier one"):
            AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "new" / "a.ckpt")
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert names(tmp_path) == ["last.ckpt", "new"]
    assert names(tmp_path / "new") == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.ckpt was not written: (Not a directory|File exists)"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "file" / "a.ckpt")


def test_another_error_keeps_its_own_words(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "a.ckpt")
    assert names(tmp_path) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of the weights."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + record.file_size // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def unlink(path):
    path.unlink()
    path.symlink_to("gone.ckpt")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(truncate, "truncated"), (flip, "CRC"), (empty, "not a zip file"), (unlink, "link to a file that is gone")],
)
def test_a_damaged_checkpoint_is_passed_over_with_both_names(tmp_path, harm, reason):
    older, newest = save(tmp_path / "step=3.ckpt", at=10), save(tmp_path / "last.ckpt", at=20)
    assert newest_checkpoint(tmp_path) == newest
    harm(newest)
    with pytest.warns(UserWarning, match=rf"last\.ckpt cannot be used \(.*{reason}.*step=3\.ckpt is used instead"):
        assert newest_checkpoint(tmp_path) == older
    truncate(older)
    with pytest.raises(ValueError, match=r"no usable checkpoint.*step=3\.ckpt"):
        newest_checkpoint(tmp_path)


def test_weights_alone_are_for_use_and_not_for_resuming(tmp_path):
    older = save(tmp_path / "step=3.ckpt", at=10)
    weights = save(tmp_path / "step=6.ckpt", {"state_dict": {}}, at=20)
    with pytest.warns(UserWarning, match=r"step=6\.ckpt cannot be used \(it holds weights alone"):
        assert newest_checkpoint(tmp_path) == older
    assert newest_checkpoint(tmp_path, resumable=False) == weights


def test_a_folder_without_checkpoints_is_no_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / ".last.ckpt.12345678.partial").touch()
    assert newest_checkpoint(tmp_path) is None


def test_files_written_without_checksums_are_accepted(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert damage(path) is None
    truncate(path)
    assert damage(path) is not None


def test_a_trainer_writes_with_it(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "replace", lambda a, b: written.append((str(a), str(b))) or shutil.move(a, b))
    model = L.LightningModule()
    model.training_step = lambda batch: None
    model.configure_optimizers = lambda: None
    trainer = L.Trainer(
        accelerator="cpu", plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False, barebones=False
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ((temporary, target),) = written
    assert target == str(tmp_path / "a.ckpt")
    assert os.path.dirname(temporary) == str(tmp_path)
