"""A mask as a picture: class ids with a colour for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LabelMap(NamedTuple):
    """A mask that is written as a PNG with a palette: its pixels are the class ids, what is seen are the colours.

    Attributes:
        labels: class ids, integers (H, W), 0..255.
        colours: (R, G, B) of the classes, 0..255.
    """

    labels: Tensor
    colours: Sequence[tuple[int, int, int]]

    def palette(self) -> list[int]:
        """R, G, B of the ids 0..255 in turn; ids without a class have the colour of unlabelled pixels.

        All of them: a PNG with fewer colours has fewer bits a pixel, and could not hold the id 255.
        """
        return [level for colour in full_palette(self.colours) for level in colour]


def full_palette(colours: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """256 colours: those of the classes, then that of unlabelled pixels.

    Args:
        colours: (R, G, B) of at most 256 classes, 0..255.
    """
    return [*colours, *[UNLABELLED] * (256 - len(colours))]


def painted(labels: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """Masks as pictures: float32 in [-1, 1], (B, 3, H, W).

    Args:
        labels: class ids 0..255, integers (B, H, W).
        colours: see `full_palette`.
    """
    table = torch.tensor(full_palette(colours), dtype=torch.float32, device=labels.device) / 127.5 - 1  # (256, 3)
    return table[labels.long()].movedim(-1, 1)


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


UNLABELLED = _colour(255)  # of PASCAL VOC, too
