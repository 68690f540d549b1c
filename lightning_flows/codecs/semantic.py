"""A semantic codec writes masks and labels as planes of numbers that a flow can move, and reads them back.

A continuous flow cannot move a class index. A semantic codec gives each class a point in the space of S planes; what a
flow returns is read as the class whose point is nearest. It is an ordinary submodule of the model that uses it, since
its points may be trained.

Reference: Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based
Generative Models (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flows.codecs.label_map import distinct_colours
from lightning_flows.flow.noise import Noise
from lightning_flows.store import Recorded

IGNORE = 255  # id of a pixel that nobody labelled
DIMENSIONS = {"mask": 3, "label": 1}  # axes of a field, batch included


class Decoded(NamedTuple):
    """What planes say about one field of a batch.

    Attributes:
        labels: class ids, int64, (B, H, W) of masks and (B,) of image-level labels.
        scores: probability of each class, float32, (B, K, H, W) or (B, K); sums to 1 over the classes and is
            differentiable in the planes.
    """

    labels: Tensor
    scores: Tensor


class SemanticCodec(Recorded, nn.Module, ABC):
    """Fields of a batch <-> S planes of the size of what the flow moves beside them.

    Attributes:
        keys: fields of a batch that it reads: ``("mask",)``, ``("label",)`` or both.
        num_classes: number of classes of each key.
        channels: number S of planes.
    """

    keys: tuple[str, ...]
    num_classes: dict[str, int]
    channels: int

    @abstractmethod
    def encode(self, fields: Mapping[str, Tensor], size: tuple[int, int], noise: Noise | None = None) -> Tensor:
        """Planes of a batch, float32, (B, S, h, w), on the device of the fields.

        Args:
            fields: ``mask``, integers (B, H, W) with 255 where nobody labelled, and ``label``, integers (B,), as
                ``keys`` says; others are left alone.
            size: (h, w). Of a mask that is larger, the planes are averaged over the area of each pixel.
            noise: draws of the dequantisation (purposes ``"dequantize_mask"`` and ``"dequantize_label"``: image, mask
                and label must not share numbers). None adds none.

        Raises:
            ValueError: a missing field, one of another shape or dtype, an id without a class (checked where it costs no
                synchronisation with a device; on an accelerator its planes are NaN, or the lookup fails), or a ``size``
                that is larger than the mask or of another aspect.
        """

    @abstractmethod
    def decode(self, y: Tensor, size: tuple[int, int] | None = None) -> dict[str, Decoded]:
        """Classes of planes, by key.

        Args:
            y: planes, (B, S, h, w).
            size: (H, W) of decoded masks, to which the planes are interpolated (bilinear) before the decision. None
                leaves them at (h, w).

        Raises:
            ValueError: planes of another shape, or a ``size`` that is smaller or of another aspect.
        """

    @property
    def layout(self) -> dict[str, slice]:
        """Which of the planes belong to which field, in the order of the planes."""
        return {self.keys[0]: slice(0, self.channels)}

    @property
    def constant(self) -> int:
        """How many of the last planes of a code are the same at every place, as those of labels without noise are."""
        return 0

    def colours(self, key: str = "mask") -> list[tuple[int, int, int]]:
        """A colour (R, G, B), 0..255, for each class of a field: for pictures of masks."""
        return distinct_colours(self.num_classes[key])

    def extra_loss(self, y: Tensor, fields: Mapping[str, Tensor]) -> Tensor | None:
        """What a codec adds to the squared error of the flow, (B,): a loss of its parameters or of its scores, or None.

        Args:
            y: estimate of the planes without noise, (B, S, h, w), as the network gives it.
            fields: see `encode`.
        """
        return None

    def check_planes(self, y: Tensor) -> None:
        """Raises a ValueError unless ``y`` holds planes (B, S, h, w) of this codec."""
        if y.dim() != 4 or y.shape[1] != self.channels or not y.is_floating_point():
            wanted = f"floating point (B, {self.channels}, h, w)"
            raise ValueError(f"y must be {wanted}, got {y.dtype} of shape {tuple(y.shape)}")


def field_of(fields: Mapping[str, Tensor], key: str, num_classes: int) -> Tensor:
    """Class ids of one field, int64, checked.

    Raises:
        ValueError: see `SemanticCodec.encode`.
    """
    if key not in fields:
        raise ValueError(f"fields must hold {key!r}, got only {sorted(fields)}")
    ids, axes = fields[key], DIMENSIONS[key]
    if ids.dim() != axes or ids.is_floating_point() or ids.dtype == torch.bool:
        wanted = "(B, H, W)" if axes == 3 else "(B,)"
        raise ValueError(f"fields[{key!r}] must be integers {wanted}, got {ids.dtype} of shape {tuple(ids.shape)}")
    ids = ids.long()
    _check_range(ids, key, num_classes)
    return ids


def _check_range(ids: Tensor, key: str, num_classes: int) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading a value back would wait for the device
    known = (ids >= 0) & (ids < num_classes)
    if key == "mask":
        known |= ids == IGNORE
    if not known.all():
        also = f" and {IGNORE} (unlabelled)" if key == "mask" else ""
        raise ValueError(f"fields[{key!r}] holds {ids[~known][0]}, but allowed are 0 to {num_classes - 1}{also}")


def planes_of(ids: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Row ``ids`` of a table at every pixel, averaged over the area of each of ``size``; (B, S, h, w).

    A label fills its planes. Channel by channel, so that no more than one plane stands at the size of the mask.

    Args:
        ids: (B, H, W) or (B,).
        rows: (R, S).
        size: (h, w).

    Raises:
        ValueError: see `SemanticCodec.encode`.
    """
    if ids.dim() == 1:
        return F.embedding(ids, rows)[..., None, None].repeat(1, 1, *size)  # (B, S, h, w)
    size, given = tuple(size), tuple(ids.shape[1:])
    if not _scales(size, given):
        raise ValueError(f"size must be at most the mask's {given} and of its aspect, got {size}")
    planes = (F.embedding(ids, row[:, None])[..., 0] for row in rows.T)  # S times (B, H, W)
    return torch.stack([x if size == given else F.adaptive_avg_pool2d(x, size) for x in planes], dim=1)


def upsampled(y: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Planes (B, S, h, w) at ``size``, bilinear.

    Raises:
        ValueError: see `SemanticCodec.decode`.
    """
    given = tuple(y.shape[2:])
    if size is None or tuple(size) == given:
        return y
    if not _scales(given, tuple(size)):
        raise ValueError(f"size must be at least the planes' {given} and of their aspect, got {tuple(size)}")
    return F.interpolate(y, tuple(size), mode="bilinear", align_corners=False)


def _scales(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """``large`` is a picture of the size ``small``, enlarged."""
    return min(small) >= 1 and small[0] <= large[0] and small[0] * large[1] == small[1] * large[0]
