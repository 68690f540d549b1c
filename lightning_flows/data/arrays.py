"""Images in ``.npz`` or ``.npy`` files of numpy, with their labels and masks."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.mask_ids import Ids, MaskIds
from lightning_flows.data.packed import PackedPictures
from lightning_flows.data.torchvision_sets import TensorItems

Layout = Literal["NHW", "NHWC", "NCHW"]

LAYOUT = """\
    {root}/train.npz   (keys {images!r} and, optionally, {labels!r} and {masks!r}; or train.npy with the images alone;
    {root}/val.npz      large splits in several files: train-00.npz, train-01.npz, ...)
    {root}/test.npz    (val and test are optional)"""


class Part(NamedTuple):
    """What one file holds: images (N, C, H, W) or packed ones, labels (N,), masks (N, H, W)."""

    images: Tensor | PackedPictures
    label: np.ndarray | None
    mask: Tensor | None


class Arrays(FlowDataModule):
    """Images stored as arrays: one file for training, or a folder with one or several files for each split.

    Args:
        root: a ``.npz`` or ``.npy`` file, or a folder with ``train*.npz``, ``val*.npz``, ``test*.npz`` (or
            ``.npy``).
        layout: meaning of the axes: ``"NHW"`` (grey), ``"NHWC"`` or ``"NCHW"``.
        value_range: lowest and highest value of float images, which become -1 and 1; needed for float arrays.
            uint8 always means 0..255.
        image_key: name of the images in a ``.npz``.
        label_key: name of the labels in a ``.npz``, int (N,); files without it have no labels.
        mask_key: name of the masks in a ``.npz``, int (N, H, W); files without it have no masks.
        offsets_key: where a ``.npz`` has this key, its images are JPEG or PNG files laid end to end, uint8 (bytes,),
            and this says where each begins, (N + 1,); ``layout`` and ``value_range`` do not matter then.
        classes: names of the classes; None numbers them up to the largest label of the training items.
        mask_classes: names of the mask classes; ids of masks must lie below their number, or be 255 (unlabelled).
        mask_ids: new id of each id in the masks: a list, a mapping with the ids as text keys, or the name of such a
            list in the ``.npz``. 255 as new id makes an id unlabelled; one that is not there is an error (255 stays).
        **kwargs: see `FlowDataModule`.

    Raises:
        ValueError: an unknown layout, a missing key, arrays whose shape or type does not fit, an unknown id in a mask;
            names file and argument.
        FileNotFoundError: there is no such file, or no file for the training split.
    """

    def __init__(
        self,
        root: str,
        *,
        layout: Layout = "NHWC",
        value_range: tuple[float, float] | None = None,
        image_key: str = "images",
        label_key: str = "labels",
        mask_key: str = "masks",
        offsets_key: str = "offsets",
        classes: list[str] | None = None,
        mask_classes: list[str] | None = None,
        mask_ids: dict[str, int] | list[int] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be (lowest, highest) with lowest < highest, got {value_range}")
        self.root, self.layout, self.value_range = Path(root), layout, value_range
        self.image_key, self.label_key, self._classes = image_key, label_key, classes
        self.mask_key, self.offsets_key, self.mask_classes, self.mask_ids = (
            mask_key,
            offsets_key,
            mask_classes,
            mask_ids,
        )
        self._reader(None if isinstance(mask_ids, str) else mask_ids)  # refuses wrong tables before anything is read
        self._largest = -1  # largest label of the training items, once they are read

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        files = self._files(split)
        if not files:
            return None
        parts = [self._load(path) for path in files]
        images = self._joined([part.images for part in parts], files)
        labels = self._everywhere([part.label for part in parts], "label_key", self.label_key, files)
        masks = self._everywhere([part.mask for part in parts], "mask_key", self.mask_key, files)
        listed = np.concatenate(labels).tolist() if labels else None
        if split == "train" and listed:
            self._largest = max(listed)
        return TensorItems(images, listed, torch.cat(masks) if masks else None)

    @property
    def num_mask_classes(self) -> int | None:
        """Number of mask classes, None where neither ``mask_classes`` nor a table in ``mask_ids`` says it."""
        return self._reader(None if isinstance(self.mask_ids, str) else self.mask_ids).num_classes

    @property
    def classes(self) -> list[str] | None:
        """Given names, or ``"0"`` to the largest label; None without labels."""
        if self._classes is None:
            self._read("train")
            self._classes = [str(i) for i in range(self._largest + 1)] or None
        return self._classes

    def _files(self, split: str) -> list[Path]:
        if not self.root.exists():
            raise FileNotFoundError(f"root {self.root} does not exist")
        if self.root.is_file():
            return [self.root] if split == "train" else []
        files = sorted(p for suffix in ("npz", "npy") for p in self.root.glob(f"{split}*.{suffix}"))
        if not files and split == "train":
            keys = {"images": self.image_key, "labels": self.label_key, "masks": self.mask_key}
            expected = LAYOUT.format(root=self.root, **keys)
            raise FileNotFoundError(f"root {self.root} has no training arrays; expected\n{expected}")
        return files

    def _load(self, path: Path) -> Part:
        """What one file holds, checked."""
        arrays = _open(path, self.image_key)
        if self.image_key not in arrays:
            raise ValueError(f"image_key={self.image_key!r} is not in {path}, which has {sorted(arrays)}")
        images, labels = self._pictures(arrays, path), arrays.get(self.label_key)
        if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"label_key={self.label_key!r} in {path} must be {len(images)} integers, "
                f"got {labels.dtype} {labels.shape}"
            )
        masks = self._masks(arrays, images, path) if self.mask_key in arrays else None
        return Part(images, None if labels is None else labels.astype(np.int64), masks)

    def _pictures(self, arrays: dict[str, np.ndarray], path: Path) -> Tensor | PackedPictures:
        """The images of one file."""
        stored = arrays[self.image_key]
        if self.offsets_key not in arrays:
            return self._images(stored, path)
        return PackedPictures.split(stored, arrays[self.offsets_key], path, self.channels, self.background)

    def _masks(self, arrays: dict[str, np.ndarray], images: Tensor | PackedPictures, path: Path) -> Tensor:
        """Masks (N, H, W) of one file with their new ids."""
        masks, sizes = arrays[self.mask_key], _sizes(images)
        fit = masks.ndim == 3 and masks.dtype.kind in "iu" and len(masks) == len(sizes)
        if not fit or (wrong := [i for i, size in enumerate(sizes) if size != masks.shape[1:]]):
            got = f"got {masks.dtype} {masks.shape}" + (f", image {wrong[0]} is {sizes[wrong[0]]}" if fit else "")
            raise ValueError(
                f"mask_key={self.mask_key!r} in {path} must be {len(sizes)} masks as large as the images, {got}"
            )
        ids = self.mask_ids
        if isinstance(ids, str):
            if ids not in arrays:
                raise ValueError(f"mask_ids={ids!r} is not in {path}, which has {sorted(arrays)}")
            ids = arrays[ids].tolist()
        return self._reader(ids).map(masks, f"mask_key={self.mask_key!r} in {path}")

    def _reader(self, ids: Ids | None) -> MaskIds:
        return MaskIds(ids, num_classes=None if self.mask_classes is None else len(self.mask_classes))

    def _images(self, images: np.ndarray, path: Path) -> Tensor:
        if images.ndim != len(self.layout):
            raise ValueError(
                f"layout={self.layout!r} does not fit the images of {path}, which have shape {images.shape}"
            )
        axes = {"NHW": lambda x: x[:, None], "NHWC": lambda x: x.transpose(0, 3, 1, 2), "NCHW": lambda x: x}
        tensor = torch.from_numpy(np.ascontiguousarray(axes[self.layout](images)))  # (N, C, H, W)
        if tensor.dtype == torch.uint8:
            return tensor
        if not tensor.is_floating_point():
            raise ValueError(f"images of {path} must be uint8 or float, got {images.dtype}")
        return self._scale(tensor.float(), path)

    def _scale(self, images: Tensor, path: Path) -> Tensor:
        """Float images from ``value_range`` to [-1, 1]."""
        if self.value_range is None:
            raise ValueError(f"value_range is needed for the float images of {path}, for example [0, 1] or [-1, 1]")
        low, high = self.value_range
        found = (images.min().item(), images.max().item())
        slack = 1e-4 * (high - low)
        if not (low - slack <= found[0] and found[1] <= high + slack):  # also false for NaN
            raise ValueError(f"value_range={list(self.value_range)} does not hold the values {found} of {path}")
        return ((images - low) * (2 / (high - low)) - 1).clamp(-1, 1)

    def _joined(self, parts: list[Any], files: list[Path]) -> Tensor | PackedPictures:
        """The images of all files of a split."""
        packed = [part for part in parts if isinstance(part, PackedPictures)]
        if 0 < len(packed) < len(parts):
            raise ValueError(f"offsets_key={self.offsets_key!r} is in some of the files only: {files}")
        if packed:
            encoded = [entry for part in packed for entry in part.encoded]
            return PackedPictures(encoded, [n for part in packed for n in part.names], self.channels, self.background)
        images = torch.cat(parts)
        if self.channels not in (None, images.shape[1]):
            raise ValueError(f"channels={self.channels}, but the images of {files[0]} have {images.shape[1]}")
        return images

    @staticmethod
    def _everywhere(parts: list[Any], argument: str, key: str, files: list[Path]) -> list[Any]:
        """What the files have of a field; an error where some have it and some not."""
        found = [part for part in parts if part is not None]
        if 0 < len(found) < len(parts):
            raise ValueError(f"{argument}={key!r} is in some of the files only: {files}")
        return found


def _sizes(images: Tensor | PackedPictures) -> list[tuple[int, int]]:
    """(height, width) of every image of a file."""
    if isinstance(images, PackedPictures):
        return [images.size(i) for i in range(len(images))]
    return [(images.shape[-2], images.shape[-1])] * len(images)


def _open(path: Path, image_key: str) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"array file {path} cannot be read: {error}") from error
    if isinstance(loaded, np.ndarray):
        return {image_key: loaded}
    with loaded:
        return {name: loaded[name] for name in loaded.files}
