"""Checkpoints that are whole or not there at all, and which of a folder to go on from.

A checkpoint is written under a hidden name in its own folder, flushed to the disk and renamed: renaming within a
folder is atomic, so that a process killed at any moment leaves the former file or the new one. (Lightning writes
into the system's temporary folder and moves the file; where that is another file system the move is a copy, and a
kill in its middle leaves a truncated checkpoint in the place of the former one.)

    trainer = L.Trainer(plugins=[AtomicCheckpointIO()])          # our command line does it by itself
    trainer.fit(model, data, ckpt_path=newest_checkpoint("runs/mine/checkpoints"))

`newest_checkpoint` reads every record of a file against its CRC-32, as fast as the disk or at about 2 GB/s, before it
is trusted.
"""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

TEMPORARY = ".partial"  # ends the names of files that are being written
CHUNK = 1 << 20  # bytes read at a time


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written so that a kill or a full disk never damages one.

    Temporary files that killed runs left in the folder are removed by the next save. Remote places
    (``scheme://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; the former file of that name stays until the new one is complete.

        Args:
            checkpoint: what `torch.save` accepts.
            path: of the file; its folder is made if needed.
            storage_options: not supported.

        Raises:
            OSError: it could not be written (disk full, no permission); names the file, the reason and what is intact.
            TypeError: ``storage_options`` are given.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            _write(checkpoint, Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer hides the reason behind errors of its own
            reason = _reason(error)
            if reason is None:
                raise
            raise OSError(reason.errno, _not_written(Path(path), reason)) from error


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            _lock(stream)  # until it is closed, or this process is killed
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync(target.parent)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove the temporary files of killed runs from a folder of checkpoints; those being written are left alone.

    Returns:
        The removed files.
    """
    removed = []
    for file in Path(folder).glob(f".*{TEMPORARY}"):
        with suppress(OSError), file.open("rb") as stream:
            if _lock(stream):
                file.unlink()
                removed.append(file)
    return removed


def _lock(stream: BinaryIO) -> bool:
    """Mark an open file as in use; False where another process has done so, or the file system knows no locks."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sync(folder: Path) -> None:
    """Make a renaming last beyond a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException | None) -> OSError | None:
    """The operating system's error in a chain of errors."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _not_written(target: Path, reason: OSError) -> str:
    names = [file.name for file in checkpoints_in(target.parent) if file.is_file()]
    intact = f"intact are {', '.join(names)}" if names else "there is no earlier one"
    return f"checkpoint {target} was not written: {reason.strerror or reason} ({intact})"


# ---- which checkpoint to go on from


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, newest first; links whose file is gone are among them."""
    files = [file for file in Path(folder).glob("*.ckpt") if file.is_file() or file.is_symlink()]
    return sorted(files, key=lambda file: (_time(file), file.stem.startswith("last")), reverse=True)


def newest_checkpoint(folder: str | Path, *, resumable: bool = True) -> Path | None:
    """The newest checkpoint of a folder that is whole.

    Args:
        folder: of the checkpoints.
        resumable: pass over those that hold weights alone (``save_weights_only``).

    Returns:
        Its path; None where the folder holds no checkpoint at all. A warning names the newer ones that are damaged.

    Raises:
        ValueError: there are checkpoints, but none can be used; names them and says why.
    """
    return first_usable(checkpoints_in(folder), resumable=resumable)


def first_usable(files: Iterable[Path], *, resumable: bool = True) -> Path | None:
    """The first of some checkpoints that is whole; see `newest_checkpoint`."""
    passed: list[str] = []
    for file in files:
        problem = damage(file) or (without_optimizer(file) if resumable else None)
        if problem is None:
            if passed:
                rank_zero_warn(f"{'; '.join(passed)}: {file} is used instead")
            return file
        passed.append(f"checkpoint {file} cannot be used ({problem})")
    if passed:
        raise ValueError(f"no usable checkpoint: {'; '.join(passed)}")
    return None


def damage(file: str | Path) -> str | None:
    """What is wrong with a checkpoint file; None where every record has the CRC-32 that it was written with."""
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0: written without (torch.serialization.set_crc32_options)
                    _read_through(archive, record)
            return None if _pickle_of(archive) else "it is no file of torch.save"
    except FileNotFoundError:
        return "it is a link to a file that is gone" if Path(file).is_symlink() else "it does not exist"
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        return f"it is truncated or damaged: {error}"


def without_optimizer(file: str | Path) -> str | None:
    """Why training cannot go on from a whole checkpoint; None where it can. Nothing is unpickled."""
    with zipfile.ZipFile(file) as archive:
        names = archive.read(_pickle_of(archive) or "")
    return None if b"optimizer_states" in names else "it holds weights alone, without the state of the optimizer"


def _read_through(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as stream:
        while stream.read(CHUNK):
            pass


def _pickle_of(archive: zipfile.ZipFile) -> str | None:
    return next((name for name in archive.namelist() if name.endswith("data.pkl")), None)


def _time(file: Path) -> int:
    """When a checkpoint was written; when the link was made where the file is gone."""
    return (file.stat() if file.exists() else file.lstat()).st_mtime_ns
