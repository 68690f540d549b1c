"""Images in tar shards, as the WebDataset tools write them (``img2dataset``, ``tarp``, plain ``tar``).

Shards are made to be streamed, with a shuffle buffer whose content nobody can name afterwards. Here they are read
by an index instead: where each file lies in its (uncompressed) tar. So every item has a number, the order of
training is a function of (seed, epoch) as for all other data, and a run resumed inside an epoch sees the very next
item. The index needs one pass over the headers and can be kept in a file; the standard library reads both.

Inside a shard, files with one name up to the first dot are one item:

=====================================  ===============================================
``0001.jpg`` (``.png``, ``.webp``...)  the image
``0001.cls``                           its label, a decimal number (then every item has one)
``0001.txt``                           its caption (then every item has one)
anything else                          is left out
=====================================  ===============================================
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ContainerIO import ContainerIO
from torch.utils.data import Dataset

from lightning_flows.data.base import SPLITS, FlowDataModule
from lightning_flows.data.transforms import IMAGE_SUFFIXES, F, convert_channels, picture_of, picture_size

EXPECTED = """\
    {root}/train-000000.tar          (or {root}/train/000000.tar; val and test are optional)
    {root}/val-000000.tar
  or, without splits, {root}/000000.tar
  each with  0001.jpg  and, optionally,  0001.cls (a number),  0001.txt (a caption)"""

# Columns of an index: shard, first byte and length of image and of caption, label; -1 for what is not there.
SHARD, IMAGE, CAPTION, LABEL, COLUMNS = 0, slice(1, 3), slice(3, 5), 5, 6


class WebDataset(FlowDataModule):
    """Images in tar shards with random access; see `lightning_flows.data.webdataset` for what a shard holds.

    Args:
        root: folder with ``train*.tar``, ``val*.tar``, ``test*.tar``, or with folders of shards of such names, or
            with shards of other names (then all are the training split), or one shard.
        index: folder for the indices of the splits (``train.npz``, ...), made when missing or when a shard has
            changed; None reads the headers anew each time.
        classes: names of the classes; None numbers them up to the largest label of the training items.
        channels: 1, 3 or 4; images are converted. None keeps what each image has.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, or no training shard.
        ValueError: a broken or compressed shard, an item without image, or without the label or caption that
            others have; names shard and item.
    """

    def __init__(
        self,
        root: str,
        *,
        index: str | None = None,
        classes: list[str] | None = None,
        channels: int | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(channels=channels, **kwargs)
        self.root, self.index, self._classes = Path(root), None if index is None else Path(index), classes
        self._tables: dict[str, np.ndarray] = {}

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        shards = self.shards(split)
        return ShardItems(shards, self.table(split), self.channels, self.background) if shards else None

    @property
    def classes(self) -> list[str] | None:
        """Given names, or ``"0"`` to the largest label of the training items; None without labels."""
        if self._classes is None:
            largest = int(self.table("train")[:, LABEL].max())
            self._classes = [str(i) for i in range(largest + 1)] or None
        return self._classes

    def shards(self, split: str) -> list[Path]:
        """Shards of a split in the order of their names.

        Raises:
            FileNotFoundError: no root, or no training shard.
        """
        expected = EXPECTED.format(root=self.root)
        if not self.root.exists():
            raise FileNotFoundError(f"root {self.root} does not exist; expected\n{expected}")
        found = {name: self._found(name) for name in SPLITS}
        if not any(found.values()):
            found["train"] = [self.root] if self.root.is_file() else sorted(self.root.glob("*.tar"))
        if not found["train"]:
            raise FileNotFoundError(f"root {self.root} has no training shard; expected\n{expected}")
        return found[split]

    def _found(self, split: str) -> list[Path]:
        return sorted([*self.root.glob(f"{split}*.tar"), *self.root.glob(f"{split}*/*.tar")])

    def table(self, split: str) -> np.ndarray:
        """Index of the items of a split, int64, shape (N, 6); see `index_of`."""
        if split not in self._tables:
            kept = None if self.index is None else self.index / f"{split}.npz"
            self._tables[split] = index_of(self.shards(split), kept)
        return self._tables[split]


# ---- the index


def index_of(shards: Sequence[Path], kept: Path | None = None) -> np.ndarray:
    """Where the items of shards lie: shard, offset and size of image and caption, label; int64, shape (N, 6).

    Args:
        shards: uncompressed tar files.
        kept: file (``.npz``) that keeps the index; read if it is of these shards as they are now, else written.

    Raises:
        ValueError: see `WebDataset`.
    """
    stamps = json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards])
    if kept is not None and kept.is_file():
        with np.load(kept, allow_pickle=False) as content:
            if str(content["stamps"]) == stamps:
                return content["table"]
    table = np.concatenate([_index_shard(path, number) for number, path in enumerate(shards)])
    _check_alike(table, shards)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{os.getpid()}.{kept.name}")
        np.savez(partial, table=table, stamps=np.array(stamps))
        partial.replace(kept)
    return table


def _index_shard(path: Path, number: int) -> np.ndarray:
    """Rows of one shard in the order in which its items begin, int64, shape (n, 6)."""
    rows: dict[str, np.ndarray] = {}
    for name, kind, member, data in _members(path):
        row = rows.setdefault(name, np.full(COLUMNS, -1, dtype=np.int64))
        row[SHARD] = number
        if kind == "label":
            row[LABEL] = _label(data, f"{path}, {member.name}")
            continue
        place = IMAGE if kind == "image" else CAPTION
        if row[place][0] >= 0:
            raise ValueError(f"shard {path} has a second {kind} {member.name!r} for the item {name!r}")
        row[place] = member.offset_data, member.size
    if without := [name for name, row in rows.items() if row[IMAGE][0] < 0]:
        raise ValueError(f"shard {path} has no image for the item {without[0]!r} ({len(without)} such)")
    if not rows:
        raise ValueError(f"shard {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return np.stack(list(rows.values()))


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """Item, kind, header and, for a label, the content of every file of a shard that is read."""
    try:
        with tarfile.open(path, mode="r:") as tar:  # "r:": uncompressed, the only kind with random access
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                kind = _kind(f".{suffix.lower()}")
                if member.isfile() and stem and kind:
                    content = tar.extractfile(member) if kind == "label" else None
                    yield f"{folder}/{stem}".lstrip("/"), kind, member, content.read() if content else b""
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"shard {path} is no uncompressed tar file, or is cut off: {error}") from error


def _kind(suffix: str) -> str | None:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return {".cls": "label", ".txt": "caption"}.get(suffix)


def _label(data: bytes, where: str) -> int:
    text = data.decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise ValueError(f"label {where} must be a decimal number, got {text[:20]!r}")
    return int(text)


def _check_alike(table: np.ndarray, shards: Sequence[Path]) -> None:
    """Every item has a label or none has; the same for captions."""
    for column, what in ((LABEL, "label (.cls)"), (CAPTION.start, "caption (.txt)")):
        without = table[:, column] < 0
        if without.any() and not without.all():
            row = table[without][0]
            raise ValueError(f"{_name(shards, row)} has no {what}, but {int((~without).sum())} items have one")


def _name(shards: Sequence[Path], row: np.ndarray) -> str:
    """Shard and file name of an item's image, for errors: names are looked up, not kept for millions of items."""
    path = shards[row[SHARD]]
    headers = (member for _, kind, member, _ in _members(path) if kind == "image")
    name = next((member.name for member in headers if member.offset_data == row[IMAGE][0]), "?")
    return f"{path}, {name}"


# ---- the items


class ShardItems(Dataset):
    """The items of tar shards. A shard is opened for each read, so that nothing is shared between processes.

    Args:
        shards: the tar files.
        table: their index, see `index_of`.
        channels: 1, 3, 4, or None to keep what there is.
        background: grey level under transparent pixels.
    """

    def __init__(self, shards: Sequence[Path], table: np.ndarray, channels: int | None, background: int) -> None:
        self.shards, self.table = list(shards), table
        self.channels, self.background = channels, background

    def __len__(self) -> int:
        """Number of items."""
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (C, H, W) and, where there are some, ``label`` and ``caption``.

        Raises:
            ValueError: the image cannot be read; names shard and file.
        """
        row = self.table[index]
        with self.shards[row[SHARD]].open("rb") as shard:
            item: dict[str, Any] = {"image": self._image(_part(shard, row[IMAGE]), row)}
            if row[LABEL] >= 0:
                item["label"] = int(row[LABEL])
            if row[CAPTION][0] >= 0:
                item["caption"] = _part(shard, row[CAPTION]).decode("utf-8").strip()
        return item

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image, from the header of its file in the shard.

        Raises:
            ValueError: the image cannot be read; names shard and file.
        """
        row = self.table[index]
        with self.shards[row[SHARD]].open("rb") as shard:
            member = ContainerIO(shard, *row[IMAGE].tolist())  # reads no further than the header
            return self._named(row, lambda: picture_size(member, "in a shard"))

    def _image(self, data: bytes, row: np.ndarray) -> Any:
        picture = self._named(row, lambda: picture_of(io.BytesIO(data), "in a shard"))
        return F.pil_to_tensor(convert_channels(picture, self.channels, self.background))

    def _named(self, row: np.ndarray, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ValueError as error:  # its name is looked up now: an index of millions keeps none
            raise ValueError(f"image {_name(self.shards, row)} cannot be read: {error.__cause__}") from error


def _part(file: io.BufferedReader, place: np.ndarray) -> bytes:
    file.seek(int(place[0]))
    return file.read(int(place[1]))
