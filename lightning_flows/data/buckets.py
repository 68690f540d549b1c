"""Aspect-ratio buckets: pictures of different shapes, each brought to the nearest of a few sizes of one area."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_flows.codecs.aspect import RATIOS, bucket_size, width_to_height
from lightning_flows.data.broken import ERRORS
from lightning_flows.data.transforms import ImageTransform, Scaling


@dataclass(frozen=True)
class AspectBuckets:
    """Sizes of about ``side`` x ``side`` pixels, one for each aspect ratio; a batch has pictures of one of them.

    Args:
        side: of the square with the area of every bucket, in pixels.
        multiple: what both sides of every bucket are multiples of: the reduction of the codec times the patch.
        ratios: width to height of each bucket, such as ``"16:9"`` (in YAML in quotation marks).
        min_pixels: share of side^2 that a picture must have; smaller ones are left out of the data (0.5 in the
            official runs). 0 keeps all.

    Raises:
        ValueError: no ratio, one that is none, two of one shape, a size of 0, or a share outside of [0, 1].

    References:
        STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
    """

    side: int
    multiple: int = 8
    ratios: tuple[str, ...] = RATIOS
    min_pixels: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        shapes = [width_to_height(ratio, "ratios") for ratio in self.ratios]
        if not shapes or len(set(shapes)) < len(shapes):
            raise ValueError(f"ratios must be one or more different shapes, got {list(self.ratios)}")
        if not 0 <= self.min_pixels <= 1:
            raise ValueError(f"min_pixels must lie in [0, 1], got {self.min_pixels}")
        for ratio in self.ratios:
            bucket_size(ratio, self.side, self.multiple)  # raises where a side would be 0

    def size(self, ratio: str) -> tuple[int, int]:
        """(height, width) of a bucket; the formula is that of `lightning_flows.codecs.aspect.bucket_size`.

        Raises:
            ValueError: it is none of ``ratios``.
        """
        if ratio not in self.ratios:
            raise ValueError(f"ratio must be one of {list(self.ratios)}, got {ratio!r}")
        return bucket_size(ratio, self.side, self.multiple)

    def of(self, height: int, width: int) -> str:
        """The bucket of a picture: the ratio whose logarithm is nearest; the first of two that are equally near.

        Raises:
            ValueError: a side that is not positive.
        """
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height} and {width}")
        shape = math.log(width / height)
        return min(self.ratios, key=lambda ratio: abs(math.log(width_to_height(ratio)) - shape))

    def keeps(self, height: int, width: int) -> bool:
        """Whether a picture has the pixels that ``min_pixels`` asks for."""
        return height * width >= self.min_pixels * self.side**2


# ---- the pictures of a split


class AspectItems(Dataset):
    """The items of a data set, each with the ``aspect`` of its bucket.

    The bucket belongs to the place: where a broken item is replaced by another, that one is brought to the size
    of the batch it comes into.

    Args:
        items: dictionaries with ``image``.
        ratios: of the buckets.
        buckets: place of each item's bucket among ``ratios``, uint8 or int64, (N,).
    """

    def __init__(self, items: Dataset, ratios: Sequence[str], buckets: Tensor) -> None:
        self.items, self.ratios, self.buckets = items, tuple(ratios), buckets

    def __len__(self) -> int:
        """Number of items N."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index`` with ``aspect``."""
        return {**self.items[index], "aspect": self.ratios[int(self.buckets[index])]}


@dataclass(frozen=True)
class AspectTransform:
    """`ImageTransform` to the size of an item's bucket.

    Args:
        buckets: the sizes.
        crop: see `ImageTransform`.
        flip: see `ImageTransform`.
        scaling: see `ImageTransform`.
    """

    buckets: AspectBuckets
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    scaling: Scaling = "bicubic"

    def __post_init__(self) -> None:
        for ratio in self.buckets.ratios:
            self.of(ratio)  # raises what is wrong with crop and scaling

    def of(self, ratio: str) -> ImageTransform:
        """The transform of a bucket."""
        return ImageTransform(self.buckets.size(ratio), None, self.crop, self.flip, self.scaling)

    def __call__(self, item: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The item with ``image`` float32 (C, H, W) of its bucket's size and, if it has one, ``mask`` (H, W)."""
        return self.of(item["aspect"])(item, generator)


def transforms_of(training: ImageTransform, buckets: AspectBuckets | None) -> dict[str, Any]:
    """Transform of each split: that of training, and the same without randomness; to the sizes of buckets if given.

    Raises:
        ValueError: buckets, and a size beside them.
    """
    evaluation: Any = ImageTransform(training.size, training.resize, scaling=training.scaling)
    if buckets is None:
        return {"train": training, "val": evaluation, "test": evaluation}
    if training.size is not None or training.resize is not None:
        raise ValueError(f"buckets say the sizes: size must be None with them, got size={training.size}")
    evaluation = AspectTransform(buckets, scaling=training.scaling)
    train = AspectTransform(buckets, training.crop, training.flip, training.scaling)
    return {"train": train, "val": evaluation, "test": evaluation}


def sort_into(buckets: AspectBuckets, items: Dataset, split: str, lenient: bool = False) -> tuple[Dataset, Tensor]:
    """The items that are large enough, and the bucket of each as its place among ``buckets.ratios``, uint8 (N,).

    Args:
        buckets: the sizes.
        items: data set whose ``size(index)`` is (height, width) of a picture, without decoding it; a `Subset` of one.
        split: its name, for messages.
        lenient: a picture whose header cannot be read goes where the next readable one goes, which will be read in
            its place; else it is an error that names its file.

    Raises:
        ValueError: no item is large enough, the data set has no ``size``, or a file cannot be read.
    """
    sizes = _sizes(items, split, lenient)
    kept = [i for i, size in enumerate(sizes) if buckets.keeps(*size)]
    asked = f"min_pixels={buckets.min_pixels} of {buckets.side} x {buckets.side} pixels"
    if not kept:
        raise ValueError(f"none of the {len(sizes)} {split} images has {asked}")
    if len(kept) < len(sizes):
        rank_zero_warn(f"{len(sizes) - len(kept)} of {len(sizes)} {split} images have less than {asked}: left out")
    shapes = {size: buckets.ratios.index(buckets.of(*size)) for size in set(sizes)}
    places = torch.tensor([shapes[sizes[i]] for i in kept], dtype=torch.uint8)
    return (items if len(kept) == len(sizes) else Subset(items, kept)), places


def _sizes(items: Dataset, split: str, lenient: bool) -> list[tuple[int, int]]:
    """(height, width) of every picture, from the headers of the files; unreadable ones have that of the next."""
    size, length = _reader(items), len(items)  # type: ignore[arg-type]

    def read(index: int) -> tuple[int, int] | None:
        try:
            return size(index)
        except ERRORS:
            if not lenient:
                raise
            return None

    with ThreadPoolExecutor() as pool:  # network drives answer many small reads at once
        found = list(pool.map(read, range(length)))
    following = next((each for each in found if each is not None), None)  # the next of the last is the first
    if following is None:
        raise ValueError(f"none of the {length} {split} items can be read")
    sizes = []
    for each in reversed(found):
        following = each or following
        sizes.append(following)
    return sizes[::-1]


def _reader(items: Any) -> Callable[[int], tuple[int, int]]:
    """What tells the size of the picture of an item without decoding it."""
    if isinstance(items, Subset):
        size, indices = _reader(items.dataset), items.indices
        return lambda index: size(indices[index])
    if not hasattr(items, "size"):
        raise ValueError(
            f"buckets need the size of every image, which {type(items).__name__} cannot tell without decoding it: "
            "use ImageFolder, CaptionFolder, MaskFolder or WebDataset, or cache=True where the images fit into memory"
        )
    return items.size
