"""The adaptive fifth-order rule of Dormand and Prince, with the controller of torchdiffeq's dopri5.

References:
    A family of embedded Runge-Kutta formulae (Dormand, Prince, 1980).
    Solving Ordinary Differential Equations I (Hairer, Norsett, Wanner, 1993), II.4 for the first step.
    Some practical Runge-Kutta formulas (Shampine, 1986), for the value in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.flow.solvers.base import FieldLike, Solver, Step, check_grid, check_stateless, state_of

Slope = Callable[[Tensor, float], Tensor]

STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
FOURTH = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
ERROR = tuple(b - c for b, c in zip((*STAGES[-1][1], 0.0), FOURTH, strict=True))
MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
SAFETY, GROW, SHRINK = 0.9, 10.0, 0.2


class Interval(NamedTuple):
    """An accepted step from t0 to t0 + h: values and slopes at its ends, value in its middle."""

    t0: float
    h: float
    y0: Tensor
    y1: Tensor
    middle: Tensor
    f0: Tensor
    f1: Tensor

    def at(self, t: float) -> Tensor:
        """Value at ``t`` of the quartic through the three values with the two slopes, shape (B, ...)."""
        s = (t - self.t0) / self.h
        d0, d1 = self.f0 * self.h, self.f1 * self.h
        rise, bend = self.y1 - self.y0, self.middle - self.y0
        a = 2 * (d1 - d0) - 8 * rise + 16 * bend
        b = 5 * d0 - 3 * d1 + 14 * rise - 32 * bend
        c = d1 - 4 * d0 - 5 * rise + 16 * bend
        return self.y0 + s * (d0 + s * (c + s * (b + s * a)))


@dataclass(frozen=True)
class DormandPrince(Solver):
    """Adaptive solver of order 5; the error of one step is held below ``atol + rtol |x|`` (root mean square).

    One error norm over the whole batch steers the step, so a sample depends on its batch within the
    tolerance.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.
        end: ``clip`` shortens the last step, so that the field is never called outside the grid;
            ``interpolate`` steps over the end and reads the value there from the quartic, which repeats
            torchdiffeq's numbers.
        max_attempts: attempted steps before it gives up.

    Raises:
        ValueError: tolerances that are not positive, another ``end``.
    """

    adaptive: ClassVar[bool] = True

    rtol: float = 1e-5
    atol: float = 1e-5
    end: Literal["clip", "interpolate"] = "clip"
    max_attempts: int = 10_000

    def __post_init__(self) -> None:
        if self.rtol <= 0 or self.atol <= 0:
            raise ValueError(f"rtol and atol must be positive, got rtol={self.rtol}, atol={self.atol}")
        if self.end not in ("clip", "interpolate"):
            raise ValueError(f"end must be 'clip' or 'interpolate', got {self.end!r}")

    def iterate(self, field: FieldLike, x: Tensor, grid: Tensor, noise: Noise | None = None) -> Iterator[Step]:
        """See `Solver.iterate`; times inside the grid are read from the quartic of the step that covers them.

        Raises:
            RuntimeError: more than ``max_attempts`` attempted steps, or a step that vanishes.
        """
        check_grid(grid)
        check_stateless(self, field)
        x = state_of(x)
        times = grid.double().tolist()
        forward = 1.0 if times[-1] > times[0] else -1.0

        def slope(y: Tensor, t: float) -> Tensor:
            return field(y, torch.as_tensor(t, dtype=x.dtype, device=x.device)).to(x.dtype)

        t, y, f = times[0], x, slope(x, times[0])
        h, nfe, target = forward * self._first_step(slope, t, y, f, forward), 2, 1
        for _ in range(self.max_attempts):
            length = h
            if self.end == "clip" and (t + h - times[-1]) * forward > -1e-9 * abs(h):
                length = times[-1] - t
            y_next, f_next, error, middle = self._attempt(slope, t, y, f, length)
            nfe += 6
            if error <= 1:
                reached = times[-1] if length != h or t + length == times[-1] else t + length
                interval = Interval(t, length, y, y_next, middle, f, f_next)
                while target < len(times) and (times[target] - reached) * forward <= 0:
                    value = y_next if times[target] == reached else interval.at(times[target])
                    yield Step(target - 1, grid[target], value, nfe)
                    target += 1
                if target == len(times):
                    return
                t, y, f = reached, y_next, f_next
            h = length * self._factor(error)
            if t + h == t:
                raise RuntimeError(f"the step vanished at t = {t}: the field is not finite or too stiff")
        raise RuntimeError(f"DormandPrince gave up after {self.max_attempts} attempted steps at t = {t}")

    def _attempt(self, v: Slope, t: float, y: Tensor, f: Tensor, h: float) -> tuple[Tensor, Tensor, float, Tensor]:
        slopes = [f]
        for fraction, weights in STAGES:
            point = _combine(y, slopes, weights, h)
            slopes.append(v(point, t + fraction * h))
        scale = self.atol + self.rtol * torch.maximum(y.abs(), point.abs())
        error = _rms(_combine(torch.zeros_like(y), slopes, ERROR, h) / scale)
        return point, slopes[-1], error, _combine(y, slopes, MIDDLE, h)

    def _first_step(self, v: Slope, t: float, y: Tensor, f: Tensor, forward: float) -> float:
        scale = self.atol + y.abs() * self.rtol
        d0, d1 = _rms(y / scale), _rms(f / scale)
        if max(d0, d1) == float("inf"):
            raise RuntimeError(f"the state or the field is not finite at t = {t}")
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        ahead = v(y + forward * h0 * f, t + forward * h0)
        d2 = _rms((ahead - f) / scale) / h0
        if d1 <= 1e-15 and d2 <= 1e-15:
            return min(100 * h0, max(1e-6, h0 * 1e-3))
        return min(100 * h0, (0.01 / max(d1, d2)) ** (1 / 5))

    @staticmethod
    def _factor(error: float) -> float:
        if error == 0:
            return GROW
        return min(GROW, max(SAFETY / error ** (1 / 5), 1.0 if error < 1 else SHRINK))


def _combine(y: Tensor, slopes: list[Tensor], weights: tuple[float, ...], h: float) -> Tensor:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            y = torch.add(y, slope, alpha=weight * h)
    return y


def _rms(x: Tensor) -> float:
    value = float(x.detach().square().mean().sqrt())
    return value if value == value else float("inf")
