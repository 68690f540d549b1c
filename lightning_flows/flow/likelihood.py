r"""The density of a flow.

Along the flow the log-density changes by the divergence of the field,

.. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \nabla\cdot v(x_t, t)\,dt,

so one integration from data to noise of the pair (x, integral of the divergence) gives both x_0 and the
density. The pair is solved as one flat state, by the same solvers that sample.

References:
    Neural Ordinary Differential Equations (Chen et al., 2018).
    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.flow.solvers.base import FieldLike, Solver
from lightning_flows.flow.sources import Gaussian, Source


class Density(NamedTuple):
    """What an integration from data to noise gives.

    Attributes:
        log_prob: log-density in nats, shape (B,).
        x0: the noise that flows to the data, shape (B, ...).
        nfe: calls of the field.
    """

    log_prob: Tensor
    x0: Tensor
    nfe: int


@dataclass(frozen=True)
class Divergence(ABC):
    """The divergence of a field that treats the samples of a batch apart."""

    @abstractmethod
    def prepare(self, x: Tensor, noise: Noise | None) -> Any:
        """What is drawn once for a whole integration from ``x`` (B, ...)."""

    @abstractmethod
    def __call__(self, v: Tensor, x: Tensor, prepared: Any) -> Tensor:
        """Divergence of ``v`` (B, ...) in ``x`` (B, ...), from which it was computed, shape (B,)."""


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian, one backward pass for each of the D dimensions."""

    def prepare(self, x: Tensor, noise: Noise | None) -> None:
        """See `Divergence.prepare`; nothing is drawn."""

    def __call__(self, v: Tensor, x: Tensor, prepared: None) -> Tensor:
        """See `Divergence.__call__`."""
        total = x.new_zeros(len(x))
        for i in range(v[0].numel()):
            unit = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
            unit.view(len(v), -1)[:, i] = 1
            total = total + _pulled_back(v, x, unit).flatten(1)[:, i]
        return total


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """The unbiased estimate ``mean_k e_k . J e_k``; the probes are drawn once for the whole integration.

    Args:
        probes: number of probes; the variance falls with 1 / probes.
        law: ``rademacher`` (signs, least variance) or ``gaussian``.

    Raises:
        ValueError: no probe, an unknown law.

    References:
        A stochastic estimator of the trace of the influence matrix (Hutchinson, 1989).
    """

    probes: int = 1
    law: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")
        if self.law not in ("rademacher", "gaussian"):
            raise ValueError(f"law must be 'rademacher' or 'gaussian', got {self.law!r}")

    def prepare(self, x: Tensor, noise: Noise | None) -> list[Tensor]:
        """See `Divergence.prepare`: the probes, each (B, ...).

        Raises:
            ValueError: no noise to draw them from.
        """
        if noise is None:
            raise ValueError("noise is needed: the Hutchinson divergence draws probes")
        draws = [noise.normal(f"probe/{k}", x) for k in range(self.probes)]
        return draws if self.law == "gaussian" else [torch.where(draw < 0, -1.0, 1.0).to(x.dtype) for draw in draws]

    def __call__(self, v: Tensor, x: Tensor, prepared: list[Tensor]) -> Tensor:
        """See `Divergence.__call__`."""
        total = x.new_zeros(len(x))
        for probe in prepared:
            total = total + (_pulled_back(v, x, probe) * probe).flatten(1).sum(1)
        return total / len(prepared)


def _pulled_back(v: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """``direction . dv/dx``, shape (B, ...); with a graph of its own only where gradients are enabled."""
    keep = torch.is_grad_enabled()
    (product,) = torch.autograd.grad(
        v, x, direction.to(v.dtype), retain_graph=True, create_graph=keep, allow_unused=True
    )
    return torch.zeros_like(x) if product is None else product


def log_prob(
    field: FieldLike,
    x1: Tensor,
    *,
    solver: Solver,
    grid: Tensor,
    source: Source | None = None,
    divergence: Divergence | None = None,
    noise: Noise | None = None,
) -> Density:
    """Log-density of data under the flow of a field.

    Differentiable in ``x1`` and in the parameters of the field where gradients are enabled; otherwise every
    step is detached, so that memory does not grow with the steps.

    Args:
        field: ``(x, t) -> velocity`` without state; guided fields are not normalised densities and are
            refused.
        x1: data, shape (B, ...), any number of dimensions.
        solver: a deterministic solver.
        grid: times from 0 to 1, shape (N + 1,); they are run backwards.
        source: distribution at t = 0, standard normal by default.
        divergence: exact by default.
        noise: draws the probes of `Hutchinson`.

    Returns:
        The density, see `Density`.

    Raises:
        ValueError: a stochastic solver or a guided field.
        RuntimeError: called inside ``torch.inference_mode``, which forbids the gradients that a divergence is
            made of.
    """
    divergence = divergence or Exact()
    if solver.stochastic:
        raise ValueError(f"solver must be deterministic for a likelihood, got {type(solver).__name__}")
    if getattr(field, "guidance", None) is not None:
        raise ValueError("guidance must be off for a likelihood: a guided field has no normalised density")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a likelihood needs gradients: use torch.no_grad, or Trainer(inference_mode=False)")
    x1 = x1.to(torch.promote_types(x1.dtype, torch.float32))
    augmented = _augment(field, x1, divergence, divergence.prepare(x1, noise))
    start = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 1)], dim=1)  # (B, D + 1)
    end, nfe = solver.solve(augmented, start, grid.to(x1.dtype).flip(0))
    x0 = end[:, :-1].reshape(x1.shape)
    # Backwards in time the last column holds minus the integral over [0, 1].
    return Density((source or Gaussian()).log_prob(x0) + end[:, -1], x0, nfe)


def _augment(
    field: FieldLike, like: Tensor, divergence: Divergence, prepared: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    keep = torch.is_grad_enabled()

    def slope(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].reshape(like.shape)
            x = x if keep and x.requires_grad else x.detach().requires_grad_()
            v = field(x, t)
        with torch.set_grad_enabled(keep):  # a graph of the divergence would be half of its cost
            trace = divergence(v, x, prepared) if v.requires_grad else v.new_zeros(len(v))
            change = torch.cat([v.flatten(1), trace[:, None]], dim=1)  # (B, D + 1)
        return change if keep else change.detach()

    return slope


def dequantize(x: Tensor, levels: int, noise: Noise) -> Tensor:
    """Grey levels spread evenly over their bins: the input of a density of pixels.

    Args:
        x: images in [-1, 1] that take ``levels`` evenly spaced values, shape (B, ...).
        levels: number of grey levels, 256 for 8-bit images.
        noise: draws the place in the bin.

    Returns:
        ``(k + u) (2 / levels) - 1`` for level k and u in [0, 1), shape (B, ...).

    Raises:
        ValueError: fewer than two levels, or values outside [-1, 1].

    References:
        A note on the evaluation of generative models (Theis et al., 2016).
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if x.numel() and (x.min() < -1 or x.max() > 1):
        raise ValueError(f"x must lie in [-1, 1], got [{float(x.min()):.3g}, {float(x.max()):.3g}]")
    level = ((x + 1) * ((levels - 1) / 2)).round()
    spread = noise.draw("dequantize", x.shape, lambda shape, generator: torch.rand(shape, generator=generator))
    return (level + spread.to(x)) * (2 / levels) - 1


def bits_per_dim(log_prob: Tensor, dimensions: int, levels: int) -> Tensor:
    """Bits per dimension of dequantised pixels, shape (B,): an upper bound on the code length of the levels.

    Args:
        log_prob: nats of images dequantised into [-1, 1] (see `dequantize`), shape (B,).
        dimensions: number of pixel values of a sample.
        levels: number of grey levels, so that a bin is 2 / levels wide.
    """
    return -(log_prob / dimensions + math.log(2 / levels)) / math.log(2)
