"""Coloured shapes with exact masks and labels: drawn, not stored, in any size and number, no download."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.shape_drawing import draw
from lightning_flows.data.shape_rule import KINDS
from lightning_flows.flow.noise import generator_of

SMALLEST = 8  # side in pixels: below, the shapes are a few pixels each


class ShapeItems(Dataset):
    """Pictures of one split: item i is a function of (data seed, split, i) alone.

    Args:
        split: name of the split.
        length: number of items N.
        size: (height, width) in pixels.
        most: largest number of shapes in a picture.
        seed: of the pictures.
    """

    def __init__(self, split: str, length: int, size: tuple[int, int], most: int, seed: int) -> None:
        self.split, self.length, self.sides, self.most, self.seed = split, length, size, most, seed

    def __len__(self) -> int:
        """Number of items N."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 (3, H, W), ``mask`` uint8 (H, W) and ``label``."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must lie in 0..{self.length - 1}, got {index}")
        image, mask, label = draw(self.sides, self.most, generator_of(self.seed, "shapes", self.split, index))
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "label": label}


class Shapes(FlowDataModule):
    """Circles, squares, triangles, crosses and rings, each kind in its colour, on a nearly grey background.

    A picture has 1 to ``most`` shapes of different kinds at random places, sizes and angles, drawn with hard edges. The
    mask holds the class of every pixel's centre: 0 background, 1 + kind for a shape (`mask_classes`). The label is the
    kind (`classes`) of the main shape: it has at least twice the area of any other and lies in front of them, so that
    from 16 pixels a side on it covers the most pixels. `lightning_flows.data.shape_mask` and `shape_label` read
    both back from a picture without an error, and thereby judge pictures that a model draws.

    Pictures are drawn when they are asked for (about 0.2 ms each at 32 x 32 on one core); ``cache=True`` draws all of
    them once.

    Args:
        size: side or (height, width) in which the pictures are drawn, at least 8.
        n_train: number of training pictures: as many as wanted, they take no room.
        n_val: number of validation pictures; 0: no such split.
        n_test: number of test pictures; 0: no such split.
        most: largest number of shapes in a picture, 1 to 5.
        data_seed: seed of the pictures; apart from ``seed``, so that another run has the same ones.
        channels: 3 or None: the pictures are RGB.
        **kwargs: see `FlowDataModule`; ``resize`` and ``buckets`` are refused, shapes are drawn in their final size.

    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 32,
        n_train: int = 20_000,
        n_val: int = 1_000,
        n_test: int = 1_000,
        most: int = 3,
        data_seed: int = 0,
        channels: Literal[3] | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(size=size, channels=channels, **kwargs)
        self.lengths = {"train": n_train, "val": n_val, "test": n_test}
        self.most, self.data_seed = most, data_seed
        _check(self.size, self.lengths, most, channels)
        if unfit := [name for name in ("resize", "buckets") if kwargs.get(name) is not None]:
            raise ValueError(f"{unfit[0]} has no use for Shapes, which are drawn in their size: give size=... alone")

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        length = self.lengths[split]
        return ShapeItems(split, length, self.size, self.most, self.data_seed) if length else None  # type: ignore

    @property
    def classes(self) -> list[str]:
        """Names of the labels 0..4."""
        return list(KINDS)

    @property
    def mask_classes(self) -> list[str]:
        """Names of the mask classes 0..5."""
        return ["background", *KINDS]


def _check(size: tuple[int, int] | None, lengths: dict[str, int], most: int, channels: int | None) -> None:
    if size is None or min(size) < SMALLEST:
        raise ValueError(f"size of Shapes must be at least {SMALLEST} pixels, got {size}")
    if lengths["train"] < 1 or min(lengths.values()) < 0:
        raise ValueError(f"n_train must be at least 1, n_val and n_test at least 0, got {lengths}")
    if not 1 <= most <= len(KINDS):
        raise ValueError(f"most must lie in 1..{len(KINDS)} shapes, got {most}")
    if channels not in (3, None):
        raise ValueError(f"channels of Shapes must be 3 or None (they are RGB), got {channels}")
