r"""Sliced Wasserstein-2 distance with control variates: a cheap distance for small sets.

    SW^2 = E_theta W(theta),     W(theta) = W_2^2(theta.X, theta.Y),     theta uniform on the sphere of R^D

On a line the optimal coupling is the sorted one. With means m, Delta = m1 - m2 and covariances S (divisor n),
W(theta) lies between two quadratic forms theta' A theta whose mean over directions, tr A / D, is known:

    lower:  A = Delta Delta'                upper:  A = Delta Delta' + S1 + S2
    estimate = mean W - g (mean C - E C),   C = theta' A theta,   best g = Cov(W, C) / Var C

"Sliced Wasserstein Estimation with Control Variates" (Nguyen and Ho, 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.metrics.base import StoredFeatures
from lightning_flows.metrics.features import Extractor

_CONTROLS = ("none", "lower", "upper")
_COEFFICIENTS = ("same", "split", "closed")
_BLOCK = 64  # directions projected at once


class SlicedWasserstein(StoredFeatures):
    """Sliced Wasserstein-2 distance (in the units of the features) between real items and samples.

    Args:
        features: the extractor; None means ``Pixels()``.
        directions: number of random directions.
        control: control variate, ``"none"``, ``"lower"`` or ``"upper"``.
        coefficient: see ``sliced_wasserstein_squared``.
        seed: seed of the directions.
        reference: see `FeatureMetric`; it must hold the features.

    Raises:
        ValueError: ``directions``, ``control`` or ``coefficient`` is not allowed.
    """

    family = "sliced_wasserstein"

    def __init__(
        self,
        features: Extractor | None = None,
        *,
        directions: int = 200,
        control: str = "lower",
        coefficient: str = "split",
        seed: int = 0,
        reference: str | None = None,
    ) -> None:
        super().__init__(features, reference)
        _check(directions, control, coefficient)
        self.directions, self.control, self.coefficient, self.seed = directions, control, coefficient, seed

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; the estimate of its square is clamped at zero before the root."""
        squared = sliced_wasserstein_squared(
            *self.sets(),
            generator=torch.Generator().manual_seed(self.seed),
            directions=self.directions,
            control=self.control,
            coefficient=self.coefficient,
        )
        return squared.clamp(min=0).sqrt()

    def settings(self) -> dict[str, Any]:
        """See `FeatureMetric.settings`."""
        return {"directions": self.directions, "control": self.control, **super().settings()}


def sliced_wasserstein_squared(
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    directions: int = 200,
    control: str = "lower",
    coefficient: str = "split",
) -> Tensor:
    """Estimate of the *squared* sliced Wasserstein-2 distance; with a control it can be slightly negative.

    Args:
        x: ``(N, D)``.
        y: ``(M, D)``; the sizes may differ.
        generator: CPU generator of the directions.
        directions: how many.
        control: ``"none"``, ``"lower"`` or ``"upper"``.
        coefficient: how ``g`` is found. ``"same"``: sample covariance over sample variance of the same
            directions, which biases the mean by per cents at ten directions; ``"split"``: each half of the
            directions uses the other half's ``g``, unbiased; ``"closed"``: sample covariance over the
            exact variance of the control: no ratio, but it needs about a hundred directions to gain anything.

    Raises:
        ValueError: shapes do not fit, or an argument is not allowed.
    """
    _check(directions, control, coefficient)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (N, D) and (M, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    theta = torch.randn(directions, x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    theta = theta / theta.norm(dim=1, keepdim=True)  # (L, D)
    values = torch.cat([wasserstein_1d(x @ block.T, y @ block.T) for block in theta.split(_BLOCK)])  # (L,)
    if control == "none":
        return values.mean()
    factor = _factor(x, y, control)  # (R, D), A = factor' factor
    excess = (theta @ factor.T).square().sum(1) - factor.square().sum() / x.shape[1]  # (L,), C - E C
    if coefficient == "split":
        halves = torch.arange(directions, device=x.device) % 2 == 0
        parts = [_corrected(values, excess, halves == side).sum() for side in (True, False)]
        return torch.stack(parts).sum() / directions
    covariance = ((values - values.mean()) * (excess - excess.mean())).sum() / (directions - 1)
    variance = excess.var() if coefficient == "same" else _variance(factor)
    return values.mean() - _ratio(covariance, variance) * excess.mean()


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared Wasserstein-2 distance on a line per column: ``(N, L)`` and ``(M, L)`` to ``(L,)``."""
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    # Both quantile functions are constant between levels i/n and j/m; in units of 1/(n m) these are integers.
    cuts = (torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n)
    levels = torch.cat(cuts).sort().values  # (N + M,)
    widths = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)
    gap = x[(levels - 1) // m] - y[(levels - 1) // n]  # (N + M, L)
    return (gap.square() * widths[:, None]).sum(0)


def _factor(x: Tensor, y: Tensor, control: str) -> Tensor:
    """Rows whose outer products sum to the matrix A of the control variate."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    rows = [(mean_x - mean_y)[None]]
    if control == "upper":
        rows += [(x - mean_x) / len(x) ** 0.5, (y - mean_y) / len(y) ** 0.5]
    return torch.cat(rows)


def _variance(factor: Tensor) -> Tensor:
    """Exact variance of theta' A theta over the sphere: 2 tr A^2 / (D(D+2)) - 2 (tr A)^2 / (D^2 (D+2))."""
    rows, dim = factor.shape
    gram = factor @ factor.T if rows < dim else factor.T @ factor  # squared norm of both: tr A^2
    trace, trace_of_square = factor.square().sum(), gram.square().sum()
    return 2 * trace_of_square / (dim * (dim + 2)) - 2 * trace**2 / (dim**2 * (dim + 2))


def _corrected(values: Tensor, excess: Tensor, side: Tensor) -> Tensor:
    """The values of one half, corrected with the coefficient of the other half."""
    w, c = values[~side], excess[~side]
    g = _ratio(((w - w.mean()) * (c - c.mean())).sum(), (c - c.mean()).square().sum())
    return values[side] - g * excess[side]


def _ratio(covariance: Tensor, variance: Tensor) -> Tensor:
    """Coefficient g, zero where the control does not vary (equal means, one dimension)."""
    return torch.where(variance > 1e-300, covariance / variance.clamp(min=1e-300), torch.zeros_like(variance))


def _check(directions: int, control: str, coefficient: str) -> None:
    if control not in _CONTROLS:
        raise ValueError(f"control must be one of {', '.join(_CONTROLS)}, got {control!r}")
    if coefficient not in _COEFFICIENTS:
        raise ValueError(f"coefficient must be one of {', '.join(_COEFFICIENTS)}, got {coefficient!r}")
    least = 1 if control == "none" else 4
    if directions < least:
        raise ValueError(f"directions must be at least {least} with control {control!r}, got {directions}")
