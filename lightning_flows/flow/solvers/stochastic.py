r"""Solvers of the stochastic differential equation that has the same marginals as the flow.

.. math:: dx = [v(x, t) + w(t)\,S(x, t)]\,dt + \sqrt{2 w(t)}\,dW

for any diffusion w(t) >= 0. With the score ``S = -E / sigma`` the drift is ``v - (w / sigma) E``, where the
noise E follows from the same velocity: one network call gives both, and E stays finite where S does not.

References:
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024), section 2 and table 7.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_flows.flow.fields import score_noise
from lightning_flows.flow.noise import Noise
from lightning_flows.flow.paths import Path
from lightning_flows.flow.solvers.base import FieldLike, Solver, Step, check_grid, state_of

Form = Literal["sigma", "sbdm", "linear", "decreasing", "increasing-decreasing", "constant"]
Last = Literal["mean", "tweedie", "euler", "noise"]
FORMS = ("sigma", "sbdm", "linear", "decreasing", "increasing-decreasing", "constant")
LASTS = ("mean", "tweedie", "euler", "noise")


@dataclass(frozen=True)
class Diffusion:
    """The diffusion w(t); ``scale`` is written s.

    ======================  =====================================================================
    form                    w(t)
    ======================  =====================================================================
    sigma                   ``s sigma(t)``
    sbdm                    ``s ((d_alpha / alpha) sigma^2 - sigma d_sigma)``, that of a diffusion model
    linear                  ``s (1 - t)``
    decreasing              ``(s cos(pi t) + 1)^2 / 4``
    increasing-decreasing   ``s sin(pi t)^2``
    constant                ``s``
    ======================  =====================================================================

    Args:
        form: see the table.
        scale: magnitude s.
        maximum: w is held below it. Only ``sbdm`` needs it: it is infinite at t = 0 on a path without data
            there. A step of length h is stable while ``w h`` is below about sigma squared.

    Raises:
        ValueError: an unknown form, a negative scale.
    """

    form: Form = "sigma"
    scale: float = 1.0
    maximum: float = 10.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {list(FORMS)}, got {self.form!r}")
        if self.scale < 0:
            raise ValueError(f"scale must not be negative, got {self.scale}")

    def __call__(self, path: Path, t: Tensor) -> float:
        """Value w at time ``t`` of shape ()."""
        t = t.double()
        match self.form:
            case "sigma":
                w = self.scale * path.sigma(t)
            case "sbdm":
                w = self.scale * path.drift(t)[1]
            case "linear":
                w = self.scale * (1 - t)
            case "decreasing":
                w = 0.25 * (self.scale * torch.cos(math.pi * t) + 1) ** 2
            case "increasing-decreasing":
                w = self.scale * torch.sin(math.pi * t) ** 2
            case _:
                w = torch.full_like(t, self.scale)
        return min(float(w), self.maximum)


@dataclass(frozen=True)
class StochasticSolver(Solver):
    """What stochastic solvers share: the diffusion, the path, and the last interval, which ends at the data.

    Args:
        diffusion: w(t).
        last: the last interval of the grid: ``mean`` follows the drift without noise, ``tweedie`` jumps to
            the expected data, ``euler`` follows the velocity alone, ``noise`` is a step like the others.
        path: needed only for a field without a ``path`` of its own.

    Raises:
        ValueError: an unknown ``last``.
    """

    stochastic: ClassVar[bool] = True
    calls: ClassVar[int] = 1

    diffusion: Diffusion = field(default_factory=Diffusion)
    last: Last = "mean"
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.last not in LASTS:
            raise ValueError(f"last must be one of {list(LASTS)}, got {self.last!r}")

    def iterate(self, field: FieldLike, x: Tensor, grid: Tensor, noise: Noise | None = None) -> Iterator[Step]:
        """See `Solver.iterate`."""
        lengths, times, path = check_grid(grid), grid.unbind(), self._path(field)
        if noise is None:
            raise ValueError(f"noise is needed: {type(self).__name__} is a stochastic solver")
        if lengths[0] < 0:
            raise ValueError("grid must rise: the reverse of a stochastic solver is not defined here")
        x, nfe = state_of(x), 0
        for i, h in enumerate(lengths):
            if i == len(lengths) - 1 and self.last != "noise":
                yield Step(i, times[i + 1], self._end(field, path, x, times[i], h), nfe + 1)
                return
            x, mean, std = self.step(field, path, x, times[i], times[i + 1], h, noise, i)
            nfe += self.calls
            yield Step(i, times[i + 1], x, nfe, mean, std)

    @abstractmethod
    def step(
        self,
        v: FieldLike,
        path: Path,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        h: float,
        noise: Noise,
        draw: int,
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """One step: the new state (B, ...), and mean and deviation where the transition is Gaussian."""

    def drift(self, v: FieldLike, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """``v - (w / sigma) E`` at ``x`` (B, ...) and ``t`` (), shape (B, ...)."""
        velocity = v(x, t)
        ratio = self.diffusion(path, t) / max(float(path.sigma(t.double())), 1e-6)
        return torch.sub(velocity, score_noise(path, velocity, x, t), alpha=ratio)

    def _end(self, v: FieldLike, path: Path, x: Tensor, t: Tensor, h: float) -> Tensor:
        if self.last == "mean":
            return torch.add(x, self.drift(v, path, x, t), alpha=h)
        velocity = v(x, t)
        if self.last == "euler":
            return torch.add(x, velocity, alpha=h)
        return path.convert(velocity, x, t.to(x.dtype), given="velocity", to="data")

    def _path(self, field: Any) -> Path:
        path = self.path or getattr(field, "path", None)
        if path is None:
            raise ValueError(f"{type(self).__name__} needs the score: give it a path, or a field that has one")
        return path


@dataclass(frozen=True)
class EulerMaruyama(StochasticSolver):
    """``x + drift h + sqrt(2 w h) n``: one call a step, weak order 1."""

    def step(
        self,
        v: FieldLike,
        path: Path,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        h: float,
        noise: Noise,
        draw: int,
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """See `StochasticSolver.step`."""
        mean = torch.add(x, self.drift(v, path, x, t), alpha=h)
        std = math.sqrt(2 * self.diffusion(path, t) * h)
        return torch.add(mean, noise.normal(draw, x), alpha=std), mean, std


@dataclass(frozen=True)
class StochasticHeun(StochasticSolver):
    """Noise and a Heun step of the drift, two calls a step.

    Args:
        diffusion: see `StochasticSolver`.
        last: see `StochasticSolver`.
        path: see `StochasticSolver`.
        noise_at: ``both`` adds half of the noise before and half after the drift (symmetric splitting, weak
            order 2); ``start`` adds all of it before, as SiT does.

    Raises:
        ValueError: another ``noise_at``.
    """

    calls: ClassVar[int] = 2

    noise_at: Literal["both", "start"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_at not in ("both", "start"):
            raise ValueError(f"noise_at must be 'both' or 'start', got {self.noise_at!r}")

    def step(
        self,
        v: FieldLike,
        path: Path,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        h: float,
        noise: Noise,
        draw: int,
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """See `StochasticSolver.step`; the transition is not Gaussian."""
        share = 1.0 if self.noise_at == "start" else 0.5
        x = torch.add(x, noise.normal(draw, x), alpha=math.sqrt(2 * self.diffusion(path, t) * h * share))
        k1 = self.drift(v, path, x, t)
        k2 = self.drift(v, path, torch.add(x, k1, alpha=h), t_next)
        x = torch.add(x, k1 + k2, alpha=h / 2)
        if self.noise_at == "both":
            after = math.sqrt(self.diffusion(path, t_next) * h)
            x = torch.add(x, noise.normal(f"{draw}/after", x), alpha=after)
        return x, None, None
