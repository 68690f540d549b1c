"""Sizes of pictures that have one area and different shapes: what an aspect ratio means in pixels.

An aspect ratio is a text, width to height: ``"16:9"`` lies, ``"9:16"`` stands.

Reference: STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

import math
import re
from typing import Any

RATIOS = ("21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21")
_RATIO = re.compile(r"([1-9]\d*):([1-9]\d*)")


def width_to_height(ratio: Any, name: str = "ratio") -> float:
    """Width over height of an aspect ratio such as ``"16:9"``.

    Args:
        ratio: the text.
        name: of the argument, for the error.

    Raises:
        ValueError: anything but WIDTH:HEIGHT.
    """
    found = _RATIO.fullmatch(ratio) if isinstance(ratio, str) else None
    if found is None:
        hint = " (in YAML in quotation marks: 16:9 without them is the number 969)" if isinstance(ratio, int) else ""
        raise ValueError(f"{name} must be WIDTH:HEIGHT such as '16:9', got {ratio!r}{hint}")
    return int(found[1]) / int(found[2])


def bucket_size(ratio: str, side: int, multiple: int = 1) -> tuple[int, int]:
    """Height and width of pictures with the area of a square of ``side`` pixels, both multiples of ``multiple``.

    With R = width / height, S = side and m = multiple:
    height = m round(sqrt(S^2 / R) / m), width = m round(sqrt(S^2 R) / m).

    Args:
        ratio: width to height, such as ``"16:9"``.
        side: S in pixels.
        multiple: m in pixels: what a codec reduces by, times the patch.

    Raises:
        ValueError: no aspect ratio, or a side so small that a size would be 0.
    """
    if side < 1 or multiple < 1:
        raise ValueError(f"side and multiple must be at least 1, got side={side} and multiple={multiple}")
    wide = width_to_height(ratio)
    height, width = (multiple * round(math.sqrt(area) / multiple) for area in (side**2 / wide, side**2 * wide))
    if min(height, width) < 1:
        raise ValueError(
            f"side={side} is too small for multiple={multiple}: {ratio} would be {height} x {width} pixels"
        )
    return height, width
