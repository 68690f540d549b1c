"""One picture of coloured shapes with its exact mask, from the random numbers of one generator.

All bounds that `lightning_flows.data.shape_rule` relies on are constants of this module. In units of [0, 1]:

- background: a chroma (largest minus smallest channel) of at most ``TINT`` + 2 ``NOISE`` = 0.12;
- shapes: at least 0.75 * 0.8 * (1 - ``SHADE``) - 2 ``NOISE`` = 0.498. Shading scales the three channels alike and
  keeps the hue; noise turns it by at most 60 * 2 ``NOISE`` / 0.498 = 3.7 degrees, beside a jitter of 9: less than 23
  degrees, half of the smallest distance between two of the ``HUES``;
- 8 bits add 0.004 to each difference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from lightning_flows.data.shape_rule import HUES, KINDS

NOISE = 0.015  # half width of the uniform noise of every channel
TINT = 0.09  # largest chroma of the background
SHADE = 0.12  # how much darker the lower edge of a shape is
JITTER = 9.0  # of a hue, in degrees
SATURATION, VALUE = (0.75, 1.0), (0.8, 1.0)
LARGE, SMALL = (0.18, 0.26), (0.5, 0.7)  # radius of the main shape over the side; of another one over the main one's
PLACES = 6  # that are tried for a shape beside the main one
BACKDROP, ROW = 6, 5 + 2 * PLACES  # random numbers of the background, and of a shape

# Every shape of radius 1 has the area of the unit circle; REACH is how far its outermost point lies from its centre.
SQUARE = math.sqrt(math.pi) / 2
TRIANGLE = math.sqrt(math.pi / math.sqrt(27))  # radius of the inscribed circle, half of the circumscribed one's
CROSS = math.sqrt(math.pi / 20)  # half the width of an arm, a third of its length from the centre
RING = (math.sqrt(0.44), math.sqrt(1.44))
REACH = np.array([1.0, SQUARE * math.sqrt(2), 2 * TRIANGLE, CROSS * math.sqrt(10), RING[1]])


class Shape(NamedTuple):
    """One shape of a picture: lengths in pixels, y down.

    Attributes:
        kind: place in `KINDS`.
        radius: of the circle of the same area.
        center: (y, x).
        angle: in radians.
        colour: RGB in [0, 1], (3,).
    """

    kind: int
    radius: float
    center: np.ndarray
    angle: float
    colour: np.ndarray


def inside(kind: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points lie in the shape of radius 1 around 0, bool, of the shape of ``y`` and ``x``."""
    if KINDS[kind] == "circle":
        return y * y + x * x <= 1
    if KINDS[kind] == "square":
        return np.maximum(abs(y), abs(x)) <= SQUARE
    if KINDS[kind] == "triangle":
        return np.maximum(y, math.sqrt(0.75) * abs(x) - y / 2) <= TRIANGLE
    if KINDS[kind] == "cross":
        long, short = np.maximum(abs(y), abs(x)), np.minimum(abs(y), abs(x))
        return (short <= CROSS) & (long <= 3 * CROSS)
    square = y * y + x * x
    return (square >= RING[0] ** 2) & (square <= RING[1] ** 2)


def colour_of(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in [0, 1] of a hue in degrees, (3,).

    A channel is V - V S max(0, min(a, 4 - a, 1)) with a = (n + hue / 60) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    a = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value - value * saturation * np.clip(np.minimum(a, 4 - a), 0, 1)


def draw(size: tuple[int, int], most: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """A picture: 1 to ``most`` shapes of different kinds, each wholly inside, the largest one (the main one) in front.

    Args:
        size: (height, width) in pixels.
        most: largest number of shapes, 1 to 5.
        generator: all randomness comes from it.

    Returns:
        Image uint8 (3, H, W), mask uint8 (H, W) with the classes 0..5 of pixel centres, kind 0..4 of the main shape.
    """
    parts = np.cumsum([1, BACKDROP, len(KINDS), most * ROW])
    numbers = torch.rand(int(parts[-1]), generator=generator, dtype=torch.float64).numpy()
    many, backdrop, order, rows = np.split(numbers, parts[:-1])
    kinds = np.argsort(order)[: 1 + int(many[0] * most)]
    shapes = _shapes(size, kinds, rows.reshape(most, ROW))
    y, x = np.mgrid[0.5 : size[0], 0.5 : size[1]]  # centres of the pixels
    image, mask = _background(y, x, backdrop), np.zeros(size, np.uint8)
    for shape in reversed(shapes):  # the main one, the first, is painted last
        _paint(image, mask, shape, y, x)
    noise = torch.rand((3, *size), generator=generator).numpy()
    image += NOISE * (2 * noise - 1)
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8), mask, shapes[0].kind


def _shapes(size: tuple[int, int], kinds: np.ndarray, rows: np.ndarray) -> list[Shape]:
    """A shape of each kind, the main one first, from a row of numbers in [0, 1) each."""
    shapes: list[Shape] = []
    for kind, row in zip(kinds.tolist(), rows, strict=False):
        radius = _between(row[0], SMALL) * shapes[0].radius if shapes else _between(row[0], LARGE) * min(size)
        center = _place(size, REACH[kind] * radius, row[5:].reshape(PLACES, 2), shapes)
        hue = HUES[kind] + JITTER * (2 * row[2] - 1)
        colour = colour_of(hue, _between(row[3], SATURATION), _between(row[4], VALUE))
        shapes.append(Shape(kind, radius, center, 2 * math.pi * row[1], colour))
    return shapes


def _between(number: float, ends: tuple[float, float]) -> float:
    return float(ends[0] + number * (ends[1] - ends[0]))


def _place(size: tuple[int, int], reach: float, numbers: np.ndarray, others: list[Shape]) -> np.ndarray:
    """Centre (y, x) of a shape wholly inside: of the places that are tried, that with the most room to the others."""
    places = reach + numbers * (np.array(size) - 2 * reach)  # (PLACES, 2)
    if not others:
        return places[0]
    room = [np.hypot(*(places - other.center).T) - REACH[other.kind] * other.radius for other in others]
    return places[np.min(room, axis=0).argmax()]


def _background(y: np.ndarray, x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A nearly grey colour that turns into another one across the picture, float64 (3, H, W)."""
    angle, grey, change, hue, *tints = numbers
    first = 0.2 + 0.72 * grey
    second = first + 0.36 * (change - 0.5)
    ends = [_tinted(v, 360 * hue, TINT * tint) for v, tint in zip((first, second), tints, strict=True)]
    along = math.sin(2 * math.pi * angle) * (y / y.shape[0] - 0.5) + math.cos(2 * math.pi * angle) * (
        x / x.shape[1] - 0.5
    )
    share = along / math.sqrt(2) + 0.5  # in [0, 1]
    return ends[0][:, None, None] * (1 - share) + ends[1][:, None, None] * share


def _tinted(value: float, hue: float, chroma: float) -> np.ndarray:
    value = min(max(value, 0.15), 1.0)
    return colour_of(hue, chroma / value, value)


def _paint(image: np.ndarray, mask: np.ndarray, shape: Shape, y: np.ndarray, x: np.ndarray) -> None:
    """Draws a shape over what is there, into image (3, H, W) and mask (H, W)."""
    down, right = (y - shape.center[0]) / shape.radius, (x - shape.center[1]) / shape.radius
    sine, cosine = math.sin(shape.angle), math.cos(shape.angle)
    covered = inside(shape.kind, cosine * down - sine * right, sine * down + cosine * right)
    shade = 1 - SHADE * (down[covered] / REACH[shape.kind] + 1) / 2
    image[:, covered] = shape.colour[:, None] * shade
    mask[covered] = 1 + shape.kind
