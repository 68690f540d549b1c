"""What a solver is: a way to carry x along a field over a grid of times.

A grid of N + 1 times has N intervals, and N intervals are N steps; the first and the last time are reached
exactly. The state stays in float32 (float64 if it comes so), whatever the network computes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise

FieldLike = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """The end of one step.

    Attributes:
        index: of the interval, from 0.
        t: time that was reached, shape ().
        x: state there, shape (B, ...).
        nfe: calls of the field so far.
        mean: mean of the Gaussian that ``x`` was drawn from, shape (B, ...); None for deterministic steps.
        std: its standard deviation; None for deterministic steps.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    t: Tensor
    x: Tensor
    nfe: int
    mean: Tensor | None = None
    std: float | None = None

    def log_prob(self) -> Tensor:
        """Log-density of the transition in nats, shape (B,).

        Raises:
            ValueError: the step was deterministic.
        """
        if self.mean is None or not self.std:
            raise ValueError("a deterministic step has no transition log-probability")
        normal = torch.distributions.Normal(self.mean, self.std)
        return normal.log_prob(self.x).flatten(1).sum(1)


class Solution(NamedTuple):
    """The end of the grid.

    Attributes:
        x: state, shape (B, ...).
        nfe: number of calls of the field (network evaluations; a guided one may hold both branches).
    """

    x: Tensor
    nfe: int


@dataclass(frozen=True)
class Solver(ABC):
    """Carries a state along a field.

    Attributes:
        stochastic: needs `Noise`, and the path of the field.
        adaptive: chooses its own steps between the times of the grid.
    """

    stochastic: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    @abstractmethod
    def iterate(self, field: FieldLike, x: Tensor, grid: Tensor, noise: Noise | None = None) -> Iterator[Step]:
        """The steps one by one, for progress bars and trajectories.

        Args:
            field: ``(x, t) -> velocity`` with t of shape ().
            x: state at ``grid[0]``, shape (B, ...).
            grid: monotone times, shape (N + 1,).
            noise: random numbers of a stochastic solver; draw j belongs to interval j.

        Raises:
            ValueError: a grid that is not monotone or too short, missing noise or path, a field that this
                solver cannot honour.
        """

    def solve(self, field: FieldLike, x: Tensor, grid: Tensor, noise: Noise | None = None) -> Solution:
        """The end of `iterate`."""
        nfe = 0
        for step in self.iterate(field, x, grid, noise):
            x, nfe = step.x, step.nfe
        return Solution(x, nfe)


def state_of(x: Tensor) -> Tensor:
    """The state in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_grid(grid: Tensor) -> list[float]:
    """Signed lengths of the intervals.

    Raises:
        ValueError: fewer than two times, or times that do not strictly rise or strictly fall.
    """
    if grid.dim() != 1 or len(grid) < 2:
        raise ValueError(f"grid must hold at least two times, shape (N + 1,), got shape {tuple(grid.shape)}")
    lengths: list[float] = grid.diff().tolist()
    if not (all(h > 0 for h in lengths) or all(h < 0 for h in lengths)):
        raise ValueError(f"grid must strictly rise or strictly fall, got {grid.tolist()}")
    return lengths


def check_stateless(solver: Solver, field: Any) -> None:
    """Refuses a field that must be called once per step, in order, where the solver does not."""
    if getattr(field, "stateful", False):
        guidance = type(field.guidance).__name__
        raise ValueError(f"{type(solver).__name__} may repeat or reject calls, which {guidance} (it has state) forbids")
