"""Fixed-step solvers of ``dx/dt = v(x, t)``: one Runge-Kutta step for each interval of the grid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.flow.solvers.base import FieldLike, Solver, Step, check_grid, state_of

add = torch.add  # torch.add(x, k, alpha=h) is x + h k in one pass


@dataclass(frozen=True)
class FixedStep(Solver):
    """A solver with the same number of calls for every interval."""

    calls: ClassVar[int]

    @abstractmethod
    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """One step of length ``h`` from ``t`` to ``t_next``: the new state and what the next step may use."""

    def iterate(self, field: FieldLike, x: Tensor, grid: Tensor, noise: Noise | None = None) -> Iterator[Step]:
        """See `Solver.iterate`."""
        lengths, times = check_grid(grid), grid.unbind()
        x, carry, calls = state_of(x), None, self.calls
        nfe = self.first_calls
        for i, h in enumerate(lengths):
            x, carry = self.step(field, x, times[i], times[i + 1], h, carry)
            nfe += calls
            yield Step(i, times[i + 1], x, nfe)

    @property
    def first_calls(self) -> int:
        """Calls that the first step makes beyond the others."""
        return 0


@dataclass(frozen=True)
class Euler(FixedStep):
    """``x + h v(x, t)``: order 1, one call."""

    calls: ClassVar[int] = 1

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        return add(x, v(x, t), alpha=h), None


@dataclass(frozen=True)
class Midpoint(FixedStep):
    """``x + h v(x + h/2 v(x, t), t + h/2)``: order 2, two calls."""

    calls: ClassVar[int] = 2

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        k = v(x, t)
        return add(x, v(add(x, k, alpha=h / 2), t + h / 2), alpha=h), None


@dataclass(frozen=True)
class Heun(FixedStep):
    """``x + h/2 (k1 + k2)``, ``k2 = v(x + h k1, t + h)``: order 2, two calls."""

    calls: ClassVar[int] = 2

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        k1 = v(x, t)
        k2 = v(add(x, k1, alpha=h), t_next)
        return add(x, k1 + k2, alpha=h / 2), None


@dataclass(frozen=True)
class Heun3(FixedStep):
    """Heun's third-order rule (stages at 0, 1/3, 2/3, weights 1/4, 0, 3/4): order 3, three calls."""

    calls: ClassVar[int] = 3

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        k1 = v(x, t)
        k2 = v(add(x, k1, alpha=h / 3), t + h / 3)
        k3 = v(add(x, k2, alpha=2 * h / 3), t + 2 * h / 3)
        return add(x, k1 + 3 * k3, alpha=h / 4), None


@dataclass(frozen=True)
class RK4(FixedStep):
    """The fourth-order Runge-Kutta rules of Kutta (1901): order 4, four calls.

    Args:
        rule: ``classic`` (stages at 0, 1/2, 1/2, 1) or ``3/8`` (0, 1/3, 2/3, 1), which torchdiffeq calls rk4.

    Raises:
        ValueError: another rule.
    """

    calls: ClassVar[int] = 4

    rule: Literal["classic", "3/8"] = "classic"

    def __post_init__(self) -> None:
        if self.rule not in ("classic", "3/8"):
            raise ValueError(f"rule must be 'classic' or '3/8', got {self.rule!r}")

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        k1 = v(x, t)
        if self.rule == "classic":
            middle = t + h / 2
            k2 = v(add(x, k1, alpha=h / 2), middle)
            k3 = v(add(x, k2, alpha=h / 2), middle)
            k4 = v(add(x, k3, alpha=h), t_next)
            return add(x, k1 + 2 * (k2 + k3) + k4, alpha=h / 6), None
        k2 = v(add(x, k1, alpha=h / 3), t + h / 3)
        k3 = v(add(x, k2 - k1 / 3, alpha=h), t + 2 * h / 3)
        k4 = v(add(x, k1 - k2 + k3, alpha=h), t_next)
        return add(x, k1 + 3 * (k2 + k3) + k4, alpha=h / 8), None


@dataclass(frozen=True)
class PseudoCorrector(FixedStep):
    """Heun with the corrector's velocity kept as the next predictor: local order of Heun at one call a step.

    ``y = x + h d``, ``d' = v(y, t + h)``, ``x + h/2 (d + d')``, then ``d = d'``. N steps make N + 1 calls.

    References:
        FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner (Zhao et al., 2024).
    """

    calls: ClassVar[int] = 1

    @property
    def first_calls(self) -> int:
        """See `FixedStep.first_calls`."""
        return 1

    def step(self, v: FieldLike, x: Tensor, t: Tensor, t_next: Tensor, h: float, carry: Any) -> tuple[Tensor, Any]:
        """See `FixedStep.step`."""
        d = v(x, t) if carry is None else carry
        d_next = v(add(x, d, alpha=h), t_next)
        return add(x, d + d_next, alpha=h / 2), d_next
