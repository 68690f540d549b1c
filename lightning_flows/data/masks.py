"""Pictures with a mask each: the class of every pixel."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.folders import FileItems, PictureFolder, pictures
from lightning_flows.data.mask_ids import MaskIds


class PairedFolder(PictureFolder):
    """Base of the data modules of pictures with a mask each: a subclass says where both lie and what the ids mean.

    Batches have ``image`` and ``mask``; masks hold the ids 0..K-1, and 255 where a pixel is unlabelled.
    """

    names: tuple[str, ...] | None = None  # of the mask classes
    sizes_may_differ = False  # a mask may be a scaled one of its image, brought to one size with it

    @abstractmethod
    def places(self, split: str) -> tuple[Path, Path] | None:
        """Folders of the images and of the masks of a split, None where there is no such split."""

    @abstractmethod
    def reader(self) -> Callable[[Path], Tensor]:
        """Reads the file of a mask: class ids, (H, W)."""

    def images(self, split: str, folder: Path) -> list[Path]:
        """Image files of a split in their order."""
        return pictures(folder)

    def mask_of(self, image: Path) -> Path:
        """Path of an image's mask in the folder of masks, without suffix, from that of the image in its folder."""
        return image

    def masks(self, images: Sequence[Path], images_at: Path, masks_at: Path) -> list[Path]:
        """The mask file of each image.

        Raises:
            FileNotFoundError: an image has none; names the file that is missing.
        """
        found = {path.relative_to(masks_at).with_suffix(""): path for path in pictures(masks_at)}
        wanted = [self.mask_of(path.relative_to(images_at).with_suffix("")) for path in images]
        if missing := [name for name in wanted if name not in found]:
            raise FileNotFoundError(f"{masks_at / missing[0]}.* does not exist ({len(missing)} images without)")
        return [found[name] for name in wanted]

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        places = self.places(split)
        if places is None:
            return None
        images = self.images(split, places[0])
        if not images:
            raise self.empty(places[0])
        files = FileItems(images, [{}] * len(images), channels=self.channels, background=self.background)
        return MaskItems(files, self.masks(images, *places), self.reader(), self.sizes_may_differ)

    @property
    def classes(self) -> list[str] | None:
        """Names of the mask classes, None where they are not known."""
        return None if self.names is None else list(self.names)

    @property
    def mask_classes(self) -> list[str] | None:
        """The same: these data have no other classes."""
        return self.classes


class MaskFolder(PairedFolder):
    """Images with one mask each, ``images/NAME.*`` and ``masks/NAME.*``; grey levels of a mask are class ids.

    Of a palette picture (mode P) the indices are the ids. The id 255 is unlabelled.

    Args:
        root: folder with ``images`` and ``masks``, or with ``train``, ``val``, ``test`` that hold them.
        classes_key: where ``classes.json`` holds several lists of names: the key of the one to use.
        remap_key: key in ``classes.json`` of a table (list of integers): id i of the files becomes entry i of
            it.
        ids: such a table here: a list, or a mapping with the ids of the files as text keys, ``{"7": 0, "8": 1}``;
            255 as value makes an id unlabelled. An id of the files that is not in it is an error (255 stays).
        palette: RGB colours of masks that are painted: colour i is id i. Another colour is an error.
        num_classes: number of mask classes; None takes the length of the list of names, where there is one, else
            what ``ids`` or ``palette`` say.
        channels: 1, 3 or 4; image files are converted. None keeps what each file has.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no images, or an image without its mask.
        ValueError: image and mask of different sizes, or ids or colours that are not known; names the file.
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
        ids: dict[str, int] | list[int] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        num_classes: int | None = None,
        channels: int | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, channels=channels, **kwargs)
        if ids is not None and remap_key is not None:
            raise ValueError(f"ids and remap_key={remap_key!r} are two tables for the same thing: give one")
        self.classes_key, self.remap_key, self._num_classes = classes_key, remap_key, num_classes
        self.ids, self.palette = ids, palette
        MaskIds(ids, palette, num_classes)  # refuses wrong arguments before anything is read

    def places(self, split: str) -> tuple[Path, Path] | None:
        """See `PairedFolder.places`."""
        folder = self.folder(split)
        return None if folder is None else (folder / "images", folder / "masks")

    def reader(self) -> MaskIds:
        """See `PairedFolder.reader`."""
        return MaskIds(self._table(), self.palette, self.num_classes)

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
        known = self._num_classes if self._num_classes is not None else super().num_classes
        return known if known is not None else MaskIds(self._table(), self.palette).num_classes

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

    def _table(self) -> Mapping[str, int] | Sequence[int] | None:
        return self._entry(self._content(), self.remap_key, "remap_key") if self.remap_key else self.ids


class MaskItems(Dataset):
    """Images and their masks, checked when they are read.

    Args:
        images: the image files.
        masks: the mask file of each.
        reader: reads one: class ids, uint8 or int64, (H, W).
        sizes_may_differ: a mask may have another size than its image, though not another shape.
    """

    def __init__(
        self,
        images: FileItems,
        masks: Sequence[Path],
        reader: Callable[[Path], Tensor],
        sizes_may_differ: bool = False,
    ) -> None:
        self.images, self.paths, self.reader = images, list(masks), reader
        self.sizes_may_differ = sizes_may_differ

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (C, H, W) and ``mask`` (H, W), of 8 bits where its ids fit."""
        item, path = self.images[index], self.paths[index]
        mask = self.reader(path)
        (height, width), (rows, columns) = item["image"].shape[1:], mask.shape
        fits = rows * width == columns * height if self.sizes_may_differ else (rows, columns) == (height, width)
        if not fits:
            sizes = f"{(rows, columns)} and {(height, width)}"
            kind = "shape" if self.sizes_may_differ else "size"
            raise ValueError(f"mask {path} and image {self.images.files[index]} differ in {kind}: {sizes}")
        return {**item, "mask": mask}

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image, from the header of its file."""
        return self.images.size(index)
