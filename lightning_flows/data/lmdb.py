"""Images in LMDB databases, in the three layouts that published training runs use.

=========  ================================  =======================================  =========================
layout     keys                              values                                   written by
=========  ================================  =======================================  =========================
raw        "0", "1", ... (decimal)           RGB bytes of a square, row by row        scripts of NVAE
encoded    anything (then in byte order)     a PNG, JPEG, WebP ... file               LSUN
pickled    "0", "1", ... and bookkeeping     pickle of a file's bytes, or of (bytes,  torchtoolbox (WaveDiff)
                                             label)
=========  ================================  =======================================  =========================

A pickle can run any code when it is read, so pickled values are read by an unpickler that knows plain values
only. The database is opened when an item is first read, once in each process: data workers never share it.

References:
    NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz, 2020).
    LSUN: Construction of a Large-scale Image Dataset using Deep Learning with Humans in the Loop (Yu et al., 2015).
    Wavelet Diffusion Models are fast and scalable Image Generators (Phung, Dao, Tran, 2023).
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.transforms import F, convert_channels, picture_of

Layout = Literal["raw", "encoded", "pickled"]

EXPECTED = """\
    {root}/train.lmdb            (or {root}/*_train_lmdb, as LSUN names them)
    {root}/validation.lmdb       (val and test are optional; val.lmdb, *_val_lmdb, test.lmdb, *_test_lmdb)
  or a database itself: {root}/data.mdb, or a file {root}"""


class ImageLMDB(FlowDataModule):
    """Images in LMDB databases, one for each split; needs the extra ``lightning-flows[lmdb]``.

    Args:
        root: folder with the databases ``train.lmdb`` (or ``*_train_lmdb``), ``validation.lmdb``, ``test.lmdb``,
            or a database, which is then the training split.
        layout: what the values are: ``"raw"``, ``"encoded"`` or ``"pickled"`` (see `lightning_flows.data.lmdb`).
        first: use the first that many training items only, in the order of their keys.
        key_cache: file (``.json``) that keeps the list of a training database's keys where they are no decimal
            numbers: listing millions takes minutes. Written when missing or out of date; None keeps nothing.
        channels: 1, 3 or 4; images are converted. None keeps what each image has.
        **kwargs: see `FlowDataModule`.

    Raises:
        ModuleNotFoundError: lmdb is not installed; names the extra.
        FileNotFoundError: no root, or no training database.
        ValueError: an unknown layout, ``first`` beyond the items, a value that cannot be read; names database and key.
    """

    def __init__(
        self,
        root: str,
        *,
        layout: Layout,
        first: int | None = None,
        key_cache: str | None = None,
        channels: int | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(channels=channels, **kwargs)
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
        if first is not None and first < 1:
            raise ValueError(f"first must be at least 1 or None, got {first}")
        if key_cache is not None and not key_cache.endswith(".json"):
            raise ValueError(f"key_cache must be a .json file, got {key_cache!r}")
        self.root, self.layout, self.first = Path(root), layout, first
        self.key_cache = None if key_cache is None else Path(key_cache)

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        path = self.database(split)
        if path is None:
            return None
        training = split == "train"
        keys = keys_of(
            Database(path),
            decimal=self.layout != "encoded",
            first=self.first if training else None,
            cache=self.key_cache if training else None,
        )
        return DatabaseItems(Database(path), keys, self.layout, self.channels, self.background)

    @property
    def classes(self) -> list[str] | None:
        """Names that a pickled database keeps under ``classes``; None where there are none."""
        path = self.database("train")
        value = Database(path).get(b"classes") if self.layout == "pickled" and path is not None else None
        return None if value is None else [str(name) for name in plain_value(value, f"{path}, key 'classes'")]

    def database(self, split: str) -> Path | None:
        """Database of a split, None where there is none.

        Raises:
            FileNotFoundError: no root, or no training database.
        """
        if not self.root.exists():
            raise FileNotFoundError(f"root {self.root} does not exist; expected\n{EXPECTED.format(root=self.root)}")
        if self.root.is_file() or (self.root / "data.mdb").is_file():
            return self.root if split == "train" else None
        names = ("val", "validation", "valid") if split == "val" else (split,)
        found = [p for name in names for p in (self.root / f"{name}.lmdb", *self.root.glob(f"*_{name}_lmdb"))]
        found = [path for path in found if path.exists()]
        if len(found) > 1:
            raise ValueError(f"root {self.root} holds several databases of {split!r}: {[p.name for p in found]}")
        if not found and split == "train":
            expected = EXPECTED.format(root=self.root)
            raise FileNotFoundError(f"root {self.root} has no training database; expected\n{expected}")
        return found[0] if found else None


# ---- the database


class Database:
    """Read-only access to one LMDB database, opened when it is used and apart in each process.

    LMDB allows one opening of a database in a process, and none of them may pass a fork; so the objects of one
    process share it, and a data worker (forked or spawned) opens its own.

    Args:
        path: folder with ``data.mdb``, or a single file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._environment: Any = None

    @property
    def environment(self) -> Any:
        """The opened `lmdb.Environment` of this process.

        Raises:
            ValueError: the files are no database; names them.
        """
        place, process = str(self.path.resolve()), os.getpid()
        opened = _OPENED.get((place, process))
        if opened is None:
            for (path, owner), inherited in list(_OPENED.items()):
                if path == place and owner != process:
                    inherited.close()  # came through a fork: LMDB refuses to open a second one beside it
            opened = _OPENED[place, process] = _open(self.path)
        self._environment = opened  # alive as long as somebody reads from it
        return opened

    def __len__(self) -> int:
        """Number of entries, bookkeeping included."""
        return int(self.environment.stat()["entries"])

    def get(self, key: bytes) -> bytes | None:
        """Value of a key, None where there is none."""
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def keys(self, first: int | None = None) -> list[bytes]:
        """All keys, or the first few, in byte order."""
        with self.environment.begin() as transaction:
            every = transaction.cursor().iternext(keys=True, values=False)
            return [key for key, _ in zip(every, range(len(self) if first is None else first), strict=False)]

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which opens the database itself."""
        return {**self.__dict__, "_environment": None}


_OPENED: weakref.WeakValueDictionary[tuple[str, int], Any] = weakref.WeakValueDictionary()


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading LMDB databases needs lmdb: pip install 'lightning-flows[lmdb]'") from error
    try:
        # No lock file and no reader table: several processes read, nobody writes. No read-ahead: access is random.
        return lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=4
        )
    except lmdb.Error as error:
        raise ValueError(f"LMDB database {path} cannot be opened: {error}") from error


# ---- its keys


def keys_of(database: Database, *, decimal: bool, first: int | None = None, cache: Path | None = None) -> Sequence:
    """The keys of the items in their order: ``range`` stands for decimal keys, which need no list.

    Args:
        database: whose items are meant.
        decimal: the keys are "0", "1", ..., beside bookkeeping.
        first: how many of them; all by default.
        cache: JSON file that keeps a list.

    Raises:
        ValueError: fewer items than ``first``, or none.
    """
    decimal = decimal or _is_decimal(database)
    count = _count(database) if decimal else len(database)
    if count < max(1, first or 1):
        raise ValueError(f"first={first} needs as many items, but LMDB database {database.path} has {count}")
    if decimal:
        return range(first or count)
    return _listed(database, first) if cache is None else _kept(database, first, cache)


def _listed(database: Database, first: int | None) -> list[bytes]:
    return database.keys(first)


def _kept(database: Database, first: int | None, cache: Path) -> list[bytes]:
    """The list from ``cache`` if it is of this database, else a new one, which is written there."""
    of = {"entries": len(database), "first": first}
    if cache.is_file():
        kept = json.loads(cache.read_text())
        if {name: kept.get(name) for name in of} == of:
            return [key.encode("latin-1") for key in kept["keys"]]
    keys = _listed(database, first)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f".{cache.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({**of, "keys": [key.decode("latin-1") for key in keys]}))
    partial.replace(cache)
    return keys


def _is_decimal(database: Database) -> bool:
    last = str(len(database) - 1).encode()
    return database.get(b"0") is not None and database.get(last) is not None


def _count(database: Database) -> int:
    """Number of items of decimal keys: what ``__len__`` says (torchtoolbox), or all entries."""
    value = database.get(b"__len__")
    return len(database) if value is None else int(plain_value(value, f"{database.path}, key '__len__'"))


# ---- its items


class DatabaseItems(Dataset):
    """The items of one database.

    Args:
        database: where they lie.
        keys: of the items, or a range that stands for decimal ones.
        layout: what the values are.
        channels: 1, 3, 4, or None to keep what there is.
        background: grey level under transparent pixels.
    """

    def __init__(
        self, database: Database, keys: Sequence, layout: Layout, channels: int | None, background: int
    ) -> None:
        self.database, self.keys, self.layout = database, keys, layout
        self.channels, self.background = channels, background

    def __len__(self) -> int:
        """Number of items."""
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (C, H, W) and, where the value has one, ``label``.

        Raises:
            ValueError: there is no such key, or its value cannot be read; names database and key.
        """
        key = self.keys[index]
        key = str(key).encode() if isinstance(key, int) else key
        where = f"{self.database.path}, key {key.decode('latin-1')!r}"
        value = self.database.get(key)
        if value is None:
            raise ValueError(f"image {where} does not exist")
        return READERS[self.layout](value, where, self)

    def decoded(self, data: bytes, where: str) -> Tensor:
        """An image file's bytes as uint8 (C, H, W)."""
        return F.pil_to_tensor(convert_channels(picture_of(io.BytesIO(data), where), self.channels, self.background))


def _read_raw(value: bytes, where: str, items: DatabaseItems) -> dict[str, Any]:
    side = math.isqrt(len(value) // 3)
    if len(value) == 0 or 3 * side * side != len(value):
        raise ValueError(f"image {where} has {len(value)} bytes, which are no square of RGB pixels (layout='raw')")
    pixels = torch.frombuffer(bytearray(value), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)
    if items.channels in (None, 3):
        return {"image": pixels}
    return {"image": F.pil_to_tensor(convert_channels(F.to_pil_image(pixels), items.channels))}


def _read_encoded(value: bytes, where: str, items: DatabaseItems) -> dict[str, Any]:
    return {"image": items.decoded(value, where)}


def _read_pickled(value: bytes, where: str, items: DatabaseItems) -> dict[str, Any]:
    content = plain_value(value, where)
    data, *label = content if isinstance(content, (tuple, list)) else (content,)
    if not isinstance(data, (bytes, bytearray)) or len(label) > 1 or not all(isinstance(n, int) for n in label):
        raise ValueError(f"image {where} must be a pickle of an image file's bytes, or of (bytes, label)")
    item: dict[str, Any] = {"image": items.decoded(bytes(data), where)}
    return {**item, "label": label[0]} if label else item


READERS: dict[str, Callable[[bytes, str, DatabaseItems], dict[str, Any]]] = {
    "raw": _read_raw,
    "encoded": _read_encoded,
    "pickled": _read_pickled,
}


class PlainUnpickler(pickle.Unpickler):
    """Reads bytes, text, numbers, lists, tuples and dictionaries; anything else, above all code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The one global that plain values use: old protocols spell bytes as ``_codecs.encode(text, "latin1")``."""
        if (module, name) == ("_codecs", "encode"):
            return _latin_bytes
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values (bytes, numbers) are read")


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin-1")


def plain_value(pickled: bytes, where: str) -> Any:
    """Content of a pickle of plain values; no code of the file is run.

    Raises:
        ValueError: it holds anything else, or is broken; names ``where``.
    """
    try:
        return PlainUnpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(f"pickled value of {where} is refused: {error}") from error
