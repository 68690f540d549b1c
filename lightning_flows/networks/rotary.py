r"""Rotary positions on several axes: where a token is, told by the angle between queries and keys.

Channel pair k of a query or key is turned by the angle :math:`p\,\theta^{-k/K}`, p being the position on the pair's
axis. Positions need not be whole numbers: an image of any size or shape spans the same area, so that a model trained at
one resolution is at home at another.

References:
    RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021).
    STARFlow (Gu et al., 2025), for the axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THIRD_AXIS = 8  # frequencies of the third axis (text, or frames), whatever the head size


class Rotation(NamedTuple):
    """Turns the queries and keys of N positions.

    Attributes:
        cos: shape (N, d), float32.
        sin: shape (N, d), float32.
        half_split: pairs are channels (k, k + d/2); else adjacent ones (2k, 2k + 1).
        turns: cos + i sin of every adjacent pair, shape (N, d / 2), complex: one product in place of five operations.
    """

    cos: Tensor
    sin: Tensor
    half_split: bool = False
    turns: Tensor | None = None

    def between(self, start: int, stop: int | None = None) -> Rotation:
        """That of positions ``start`` to ``stop - 1``."""
        turns = None if self.turns is None else self.turns[start:stop]
        return Rotation(self.cos[start:stop], self.sin[start:stop], self.half_split, turns)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn ``x`` (B, H, N, d), the dtype of ``x``."""
        if self.turns is not None and x.dtype == self.cos.dtype and not torch.compiler.is_compiling():
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.turns).flatten(-2)
        return (x * self.cos + self._quarter(x) * self.sin).to(x.dtype)

    def _quarter(self, x: Tensor) -> Tensor:
        """Every pair (a, b) as (-b, a)."""
        if self.half_split:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([-b, a], dim=-1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([-b, a], dim=-1).flatten(-2)


def frequencies(count: int, theta: float, device: torch.device | None = None) -> Tensor:
    """``theta^(-k / count)`` for k = 0..count - 1, float32, shape (count,)."""
    return theta ** -(torch.arange(count, dtype=torch.float32, device=device) / count)


def rotation(positions: Tensor, head_size: int, *, theta: float = 10000.0, half_split: bool = False) -> Rotation:
    """The rotation of positions on two axes, or on two and a third one that has 8 frequencies.

    Args:
        positions: shape (N, 2) or (N, 3), float32.
        head_size: channels d of a head.
        theta: the lowest frequency is about ``1 / theta``.
        half_split: see `Rotation`.

    Raises:
        ValueError: a head size that cannot be shared out among the axes.
    """
    axes = positions.shape[1]
    third = THIRD_AXIS if axes == 3 else 0
    plane = head_size // 2 - third
    if head_size % 2 or plane < 2 or plane % 2:
        least = "d / 2 - 8" if axes == 3 else "d / 2"
        raise ValueError(f"head_size must be even, with {least} even and positive, got {head_size}")
    counts = [plane // 2, plane // 2, third][:axes]
    angles = [positions[:, i, None] * frequencies(n, theta, positions.device) for i, n in enumerate(counts)]
    angle = torch.cat(angles, dim=1)  # (N, d / 2)
    angle = torch.cat([angle, angle], dim=1) if half_split else angle.repeat_interleave(2, dim=1)  # (N, d)
    cos, sin = angle.cos(), angle.sin()
    plain = half_split or positions.device.type == "mps"  # where complex numbers are half known
    turns = None if plain else torch.complex(cos[:, 0::2], sin[:, 0::2])  # (N, d / 2)
    return Rotation(cos, sin, half_split, turns)


def grid_positions(rows: int, columns: int, reference: float, device: torch.device | None = None) -> Tensor:
    """(row, column) of every token of a grid in raster order, scaled so that its area is ``reference`` squared.

    Returns:
        float32, shape (rows * columns, 2).
    """
    unit = reference / (rows * columns) ** 0.5
    row = torch.arange(rows, dtype=torch.float32, device=device) * unit
    column = torch.arange(columns, dtype=torch.float32, device=device) * unit
    return torch.cartesian_prod(row, column)


def text_positions(length: int, reference: float, device: torch.device | None = None) -> Tensor:
    """(0, 0, i reference / length) of every token of a text, float32, shape (length, 3)."""
    places = torch.zeros(length, 3, device=device)
    places[:, 2] = torch.arange(length, dtype=torch.float32, device=device) / length * reference
    return places
