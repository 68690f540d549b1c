"""A mask as a picture: class ids with a colour for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LabelMap(NamedTuple):
    """A mask that is written as a PNG with a palette: its pixels are the class ids, what is seen are the colours.

    Attributes:
        labels: class ids, integers (H, W), 0..255.
        colours: (R, G, B) of the classes, 0..255.
    """

    labels: Tensor
    colours: Sequence[tuple[int, int, int]]


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours of class 0 (black), 1, 2 ..., each (R, G, B) in 0..255; the order of the PASCAL VOC masks.

    The bits of a class, from the lowest, go in turn to red, green and blue, and there from the highest to the lowest
    bit: classes that follow each other differ much.
    """
    return [_colour(number) for number in range(count)]


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = (
        sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(8)) for channel in range(3)
    )
    return red, green, blue
