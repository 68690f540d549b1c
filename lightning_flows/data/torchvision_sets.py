"""MNIST, FashionMNIST and CIFAR10 through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.packed import PackedPictures


class TensorItems(Dataset):
    """Images and, if there are any, their labels and masks.

    Args:
        images: (N, C, H, W) uint8 (or float32 in [-1, 1]), or packed pictures.
        labels: (N,).
        masks: integers (N, H, W).
    """

    def __init__(
        self, images: Tensor | PackedPictures, labels: list[int] | None = None, masks: Tensor | None = None
    ) -> None:
        self.images, self.labels, self.masks = images, labels, masks

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` (C, H, W), ``label`` and ``mask`` (H, W)."""
        fields = {"image": self.images, "label": self.labels, "mask": self.masks}
        return {name: values[index] for name, values in fields.items() if values is not None}


class _TorchvisionSet(FlowDataModule):
    """A torchvision data set with the splits train and test, held in memory as uint8.

    Args:
        root: folder that holds (or gets) torchvision's files.
        download: fetch the files where they are missing.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: the files are missing and ``download`` is False.
    """

    source: type[torchvision.datasets.VisionDataset]
    native: tuple[int, int, int]

    def __init__(self, root: str, *, download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.channels not in (None, self.native[0]):
            raise ValueError(f"channels of {type(self).__name__} must be {self.native[0]} or None, got {self.channels}")
        self.root, self.download = root, download

    def prepare_data(self) -> None:
        """Downloads where ``download`` says so."""
        if self.download:
            for train in (True, False):
                self.source(root=self.root, train=train, download=True)

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        if split == "val":
            return None
        try:
            data: Any = self.source(root=self.root, train=split == "train")
        except (RuntimeError, OSError) as error:
            name = self.source.__name__
            raise FileNotFoundError(
                f"{name} is not under root={str(Path(self.root))!r} ({error}); set download=True to fetch it"
            ) from error
        return TensorItems(self._images(data.data), [int(label) for label in data.targets])

    @staticmethod
    def _images(data: Any) -> Tensor:
        images = torch.as_tensor(data)
        return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # (N, C, H, W)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), known without the files."""
        return (self.native[0], *(self.size or self.native[1:]))


class MNIST(_TorchvisionSet):
    """Handwritten digits, 28 x 28 grey, 60,000 / 10,000 (LeCun, Cortes, Burges, 1998).

    Args:
        root: folder that holds (or gets) torchvision's files.
        download: fetch the files where they are missing.
        **kwargs: see `FlowDataModule`.
    """

    source = torchvision.datasets.MNIST
    native = (1, 28, 28)

    @property
    def classes(self) -> list[str]:
        """``"0"`` to ``"9"``."""
        return [str(digit) for digit in range(10)]


class FashionMNIST(_TorchvisionSet):
    """Garments, 28 x 28 grey, 60,000 / 10,000.

    Reference: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms (Xiao, Rasul,
    Vollgraf, 2017).

    Args:
        root: folder that holds (or gets) torchvision's files.
        download: fetch the files where they are missing.
        **kwargs: see `FlowDataModule`.
    """

    source = torchvision.datasets.FashionMNIST
    native = (1, 28, 28)

    @property
    def classes(self) -> list[str]:
        """Names of the ten garments."""
        return list(torchvision.datasets.FashionMNIST.classes)


class CIFAR10(_TorchvisionSet):
    """Photographs of ten things, 32 x 32 RGB, 50,000 / 10,000 (Krizhevsky, 2009).

    Args:
        root: folder that holds (or gets) torchvision's files.
        download: fetch the files where they are missing.
        **kwargs: see `FlowDataModule`.
    """

    source = torchvision.datasets.CIFAR10
    native = (3, 32, 32)

    @property
    def classes(self) -> list[str]:
        """Names of the ten classes in torchvision's order."""
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
