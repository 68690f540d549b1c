"""Pictures in ordinary folders: by class, or with captions (with masks: `lightning_flows.data.masks`).

Each data module looks for the subfolders ``train``, ``val`` and ``test`` of its root; without them the root
is the training split, and fractions of it can be set aside. Anything missing or broken is reported with its
file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightning_flows.data.base import SPLITS, FlowDataModule
from lightning_flows.data.transforms import IMAGE_SUFFIXES, picture_size, read_image


def pictures(folder: Path) -> list[Path]:
    """Image files anywhere under a folder, sorted; hidden ones are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


class FileItems(Dataset):
    """Image files and, for each, the other fields of its item."""

    def __init__(
        self,
        files: Sequence[Path],
        fields: Sequence[dict[str, Any]],
        *,
        channels: int | None,
        background: int,
    ) -> None:
        self.files, self.fields = list(files), list(fields)
        self.channels, self.background = channels, background

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (C, H, W) and the fields."""
        image = read_image(self.files[index], self.channels, self.background)
        return {"image": image, **self.fields[index]}

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image, from the header of its file."""
        return picture_size(self.files[index], str(self.files[index]))


class PictureFolder(FlowDataModule):
    """Base of the folder data modules: finds the splits.

    Args:
        root: folder with the data.
        channels: 1, 3 or 4; files are converted.
        **kwargs: see `FlowDataModule`.
    """

    layout: str

    def __init__(self, root: str, *, channels: int | None = 3, **kwargs: Any) -> None:
        super().__init__(channels=channels, **kwargs)
        self.root = Path(root)

    def folder(self, split: str) -> Path | None:
        """Folder of a split, None where there is none.

        Raises:
            FileNotFoundError: there is no root.
        """
        self.require_root()
        found = {name: self._subfolder(name) for name in SPLITS}
        return found[split] if any(found.values()) else {"train": self.root}.get(split)

    def require_root(self) -> None:
        """Refuses a root that is not there.

        Raises:
            FileNotFoundError: there is no root; shows the layout.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"root {self.root} is not a folder; expected\n{self.expected()}")

    def _subfolder(self, split: str) -> Path | None:
        names = ("val", "validation", "valid") if split == "val" else (split,)
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    def expected(self) -> str:
        """The layout that this data module reads, for error messages."""
        return self.layout.format(root=self.root)

    def empty(self, folder: Path) -> FileNotFoundError:
        """The error for a folder without anything to read."""
        return FileNotFoundError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); expected\n{self.expected()}")


class ImageFolder(PictureFolder):
    """Images sorted into one subfolder for each class, or images alone (then there is no ``label``).

    Classes are the subfolders of the training split in the order of their names; other splits may lack some
    of them but may not have others.

    Args:
        root: folder with the class folders, or with ``train``, ``val`` (``validation``), ``test``
            that hold them.
        channels: 1, 3 or 4; files are converted. None keeps what each file has.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, or nothing in it.
        ValueError: a broken image, a class that training does not have, or folders of splits beside
            those of classes.
    """

    layout = """\
    {root}/[train/]shirt/0001.png     (one folder for each class; train/, val/, test/ are optional)
    {root}/[train/]shoe/0002.png
  or, without labels,
    {root}/[train/]0001.png"""

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        folder = self.folder(split)
        if folder is None:
            return None
        self._check_root()
        files = pictures(folder)
        if not files:
            raise self.empty(folder)
        fields = [self._label(path, folder) for path in files]
        return FileItems(files, fields, channels=self.channels, background=self.background)

    @property
    def classes(self) -> list[str] | None:
        """Names of the class folders of training (or of the first split there is), None without any."""
        folder = next(filter(None, map(self.folder, SPLITS)))
        parts = (path.relative_to(folder).parts for path in pictures(folder))
        return sorted({first for first, *rest in parts if rest}) or None

    def _check_root(self) -> None:
        """A class may be called "train" (a vehicle): do not take it for a split."""
        if self.folder("train") == self.root:
            return
        folders = [p for p in self.root.iterdir() if p.is_dir() and p not in map(self.folder, SPLITS)]
        if others := sorted(p.name for p in folders if not p.name.startswith(".") and pictures(p)):
            raise ValueError(
                f"root {self.root} holds folders of splits and others with images {others}; expected\n{self.expected()}"
            )

    def _label(self, path: Path, folder: Path) -> dict[str, int]:
        if not self._places_of_classes:
            return {}
        (name, *rest) = path.relative_to(folder).parts
        if not rest:
            raise ValueError(f"image {path} lies beside class folders, in none of them; expected\n{self.expected()}")
        if name not in self._places_of_classes:
            raise ValueError(f"class folder {folder / name} is not one of training's {list(self._places_of_classes)}")
        return {"label": self._places_of_classes[name]}

    @cached_property
    def _places_of_classes(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes or [])}


class CaptionFolder(PictureFolder):
    """Images with captions, as the Hub's ``imagefolder`` has them: ``metadata.jsonl`` beside the images.

    Args:
        root: folder with ``metadata.jsonl``, or with ``train``, ``val``, ``test`` that hold one each.
        caption_key: key of the caption; None takes ``text``, or else ``caption``.
        channels: 1, 3 or 4; files are converted. None keeps what each file has.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no ``metadata.jsonl``, or an image that it names.
        ValueError: a line that is not JSON or lacks a key; names file and line.
    """

    layout = """\
    {root}/[train/]metadata.jsonl     ({{"file_name": "0001.png", "text": "a red shoe"}}, a line an image)
    {root}/[train/]0001.png"""

    def __init__(self, root: str, *, caption_key: str | None = None, channels: int | None = 3, **kwargs: Any) -> None:
        super().__init__(root, channels=channels, **kwargs)
        self.caption_key = caption_key

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        folder = self.folder(split)
        if folder is None:
            return None
        table = folder / "metadata.jsonl"
        if not table.is_file():
            raise FileNotFoundError(f"{table} does not exist; expected\n{self.expected()}")
        lines = table.read_text(encoding="utf-8").splitlines()
        rows = [self._row(line, f"{table}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise self.empty(table)
        files = [folder / name for name, _ in rows]
        if missing := [path for path in files if not path.is_file()]:
            raise FileNotFoundError(f"image {missing[0]} is in {table} but does not exist ({len(missing)} such)")
        fields = [{"caption": caption} for _, caption in rows]
        return FileItems(files, fields, channels=self.channels, background=self.background)

    def _row(self, line: str, where: str) -> tuple[str, str]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        keys = [self.caption_key] if self.caption_key else ["text", "caption"]
        key = next((key for key in keys if key in row), None)
        if "file_name" not in row or key is None:
            raise ValueError(f"{where} must have 'file_name' and {' or '.join(map(repr, keys))}, has {sorted(row)}")
        return row["file_name"], str(row[key])
