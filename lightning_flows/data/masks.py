"""Pictures with a mask each: the class of every pixel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.folders import FileItems, PictureFolder, pictures
from lightning_flows.data.transforms import read_mask


class MaskFolder(PictureFolder):
    """Images with one mask each, ``images/NAME.*`` and ``masks/NAME.*``; grey levels of a mask are class ids.

    Args:
        root: folder with ``images`` and ``masks``, or with ``train``, ``val``, ``test`` that hold them.
        classes_key: where ``classes.json`` holds several lists of names: the key of the one to use.
        remap_key: key in ``classes.json`` of a table (list of integers): id i of the files becomes entry i of
            it.
        num_classes: number of mask classes; None takes the length of the list of names, where there is one.
        channels: 1, 3 or 4; image files are converted. None keeps what each file has.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no images, or an image without its mask.
        ValueError: image and mask of different sizes, or ids that are out of range; names the file.
    """

    layout = """\
    {root}/[train/]images/0001.png
    {root}/[train/]masks/0001.png     (one channel: class ids; same size as the image)
    {root}/classes.json               (optional: ["background", "skin", ...], or several lists by name)"""

    def __init__(
        self,
        root: str,
        *,
        classes_key: str | None = None,
        remap_key: str | None = None,
        num_classes: int | None = None,
        channels: int | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, channels=channels, **kwargs)
        self.classes_key, self.remap_key, self._num_classes = classes_key, remap_key, num_classes

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        folder = self.folder(split)
        if folder is None:
            return None
        images = pictures(folder / "images")
        if not images:
            raise self.empty(folder / "images")
        masks = {path.relative_to(folder / "masks").with_suffix(""): path for path in pictures(folder / "masks")}
        names = [path.relative_to(folder / "images").with_suffix("") for path in images]
        if missing := [name for name in names if name not in masks]:
            raise FileNotFoundError(f"{folder / 'masks' / missing[0]}.* does not exist ({len(missing)} images without)")
        files = FileItems(images, [{}] * len(images), channels=self.channels, background=self.background)
        return MaskItems(files, [masks[name] for name in names], self._table(), self.num_classes)

    @property
    def classes(self) -> list[str] | None:
        """Names of the mask classes, None where ``classes.json`` does not say."""
        content = self._content()
        if isinstance(content, dict) and self.classes_key is None and self._numbered(content):
            return [content[str(i)] for i in range(len(content))]
        if isinstance(content, dict):
            content = self._entry(content, self.classes_key, "classes_key") if self.classes_key else None
        return None if content is None else [str(name) for name in content]

    @property
    def num_classes(self) -> int | None:
        """Number of mask classes, None where nothing says it."""
        return self._num_classes if self._num_classes is not None else super().num_classes

    def _content(self) -> Any:
        path = self.root / "classes.json"
        if not path.is_file():
            if self.classes_key or self.remap_key:
                raise FileNotFoundError(f"{path} does not exist, but classes_key or remap_key asks for it")
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None

    @staticmethod
    def _numbered(content: dict[str, Any]) -> bool:
        return set(content) == {str(i) for i in range(len(content))}

    def _entry(self, content: Any, key: str, argument: str) -> list:
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list):
            names = sorted(content) if isinstance(content, dict) else "one list of names"
            raise ValueError(f"{argument}={key!r} is not a list in {self.root / 'classes.json'}, which has {names}")
        return found

    def _table(self) -> Tensor | None:
        return torch.tensor(self._entry(self._content(), self.remap_key, "remap_key")) if self.remap_key else None


class MaskItems(Dataset):
    """Images and their masks, checked when they are read."""

    def __init__(self, images: FileItems, masks: Sequence[Path], table: Tensor | None, num_classes: int | None) -> None:
        self.images, self.masks, self.table, self.num_classes = images, list(masks), table, num_classes

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (C, H, W) and ``mask`` (H, W)."""
        item, path = self.images[index], self.masks[index]
        mask = read_mask(path)
        if mask.shape != item["image"].shape[1:]:
            sizes = f"{tuple(mask.shape)} and {tuple(item['image'].shape[1:])}"
            raise ValueError(f"mask {path} and image {self.images.files[index]} differ in size: {sizes}")
        if self.table is not None:
            mask = self.table[self._in_range(mask, len(self.table), path)]
        if self.num_classes is not None:
            self._in_range(mask, self.num_classes, path)
        return {
            **item,
            "mask": mask.to(torch.uint8) if mask.max() < 256 else mask,
        }  # small where it is cached

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image, from the header of its file."""
        return self.images.size(index)

    @staticmethod
    def _in_range(mask: Tensor, count: int, path: Path) -> Tensor:
        if mask.max() >= count:
            raise ValueError(f"mask {path} holds class id {mask.max()}, but there are {count} classes (0..{count - 1})")
        return mask
