"""Images in ``.npz`` or ``.npy`` files of numpy."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.torchvision_sets import TensorItems

Layout = Literal["NHW", "NHWC", "NCHW"]

LAYOUT = """\
    {root}/train.npz   (keys {images!r} and, optionally, {labels!r}; or train.npy with the images alone;
    {root}/val.npz      large splits in several files: train-00.npz, train-01.npz, ...)
    {root}/test.npz    (val and test are optional)"""


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
        classes: names of the classes; None numbers them up to the largest label of the training items.
        **kwargs: see `FlowDataModule`.

    Raises:
        ValueError: an unknown layout, a missing key, arrays whose shape or type does not fit; names file and
            argument.
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
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be (lowest, highest) with lowest < highest, got {value_range}")
        self.root, self.layout, self.value_range = Path(root), layout, value_range
        self.image_key, self.label_key, self._classes = image_key, label_key, classes
        self._largest = -1  # largest label of the training items, once they are read

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        files = self._files(split)
        if not files:
            return None
        parts = [self._load(path) for path in files]
        labelled = [labels for _, labels in parts if labels is not None]
        if 0 < len(labelled) < len(parts):
            raise ValueError(f"label_key={self.label_key!r} is in some of the files of {split!r} only: {files}")
        images = torch.cat([images for images, _ in parts])
        self._check_channels(images, files[0])
        labels = np.concatenate(labelled).tolist() if labelled else None
        if split == "train" and labels:
            self._largest = max(labels)
        return TensorItems(images, labels)

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
            expected = LAYOUT.format(root=self.root, images=self.image_key, labels=self.label_key)
            raise FileNotFoundError(f"root {self.root} has no training arrays; expected\n{expected}")
        return files

    def _load(self, path: Path) -> tuple[Tensor, np.ndarray | None]:
        """Images (N, C, H, W), uint8 or float32 in [-1, 1], and labels (N,) of one file."""
        arrays = _open(path, self.image_key)
        if self.image_key not in arrays:
            raise ValueError(f"image_key={self.image_key!r} is not in {path}, which has {sorted(arrays)}")
        images, labels = arrays[self.image_key], arrays.get(self.label_key)
        if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"label_key={self.label_key!r} in {path} must be {len(images)} integers, "
                f"got {labels.dtype} {labels.shape}"
            )
        return self._images(images, path), None if labels is None else labels.astype(np.int64)

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

    def _check_channels(self, images: Tensor, path: Path) -> None:
        if self.channels not in (None, images.shape[1]):
            raise ValueError(f"channels={self.channels}, but the images of {path} have {images.shape[1]}")


def _open(path: Path, image_key: str) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"array file {path} cannot be read: {error}") from error
    if isinstance(loaded, np.ndarray):
        return {image_key: loaded}
    with loaded:
        return {name: loaded[name] for name in loaded.files}
