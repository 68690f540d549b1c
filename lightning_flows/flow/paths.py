r"""Probability paths between noise and data.

A path is a pair of coefficients; a point on it and its velocity are

.. math:: x_t = \alpha(t)\,x_1 + \sigma(t)\,x_0, \qquad v = \dot\alpha(t)\,x_1 + \dot\sigma(t)\,x_0,

with noise at t = 0 and data at t = 1. At a point ``x_t`` the four quantities that a network may predict
carry the same information (Gaussian source for the score), so that any one gives the others:

====================  ==========================================================
data D = E[x1|x_t]    ``x_t = alpha D + sigma E``
noise E = E[x0|x_t]   ``V = d_alpha D + d_sigma E``
velocity V            ``D = (d_sigma x_t - sigma V) / (alpha d_sigma - sigma d_alpha)``
score S               ``S = -E / sigma``
====================  ==========================================================

References:
    Flow Matching for Generative Modeling (Lipman et al., 2023).
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Quantity = Literal["velocity", "data", "noise", "score"]
QUANTITIES = ("velocity", "data", "noise", "score")


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times of shape () or (B,) in a shape that broadcasts over ``like`` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim())) if t.dim() else t


class PathSample(NamedTuple):
    """A point on a path.

    Attributes:
        x_t: the point, shape (B, ...).
        velocity: its derivative in time, shape (B, ...).
        t: time, shape (B,).
        x0: noise, shape (B, ...).
        x1: data, shape (B, ...).
    """

    x_t: Tensor
    velocity: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor


@dataclass(frozen=True)
class Path(ABC):
    """Coefficients of a path and everything that follows from them."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data, shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise, shape of ``t``."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of `alpha`."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of `sigma`."""

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """Point and velocity at time ``t`` (B,) between ``x0`` and ``x1`` (B, ...), in their dtype."""
        s = expand(t, x1)
        x_t = self.alpha(s) * x1 + self.sigma(s) * x0
        velocity = self.d_alpha(s) * x1 + self.d_sigma(s) * x0
        return PathSample(x_t.to(x1.dtype), velocity.to(x1.dtype), t, x0, x1)

    def convert(
        self, value: Tensor, x_t: Tensor, t: Tensor, *, given: Quantity, to: Quantity, floor: float = 0.0
    ) -> Tensor:
        """One predicted quantity turned into another at the point ``x_t``.

        Exact for ``floor = 0``. Some conversions divide by a coefficient that vanishes at an end (sigma at
        t = 1, alpha at t = 0): ``floor`` is the smallest magnitude that such a divisor may have.

        Args:
            value: the given quantity, shape (B, ...).
            x_t: the point, shape (B, ...).
            t: time, shape () or (B,).
            given: what ``value`` is.
            to: what is wanted.
            floor: smallest magnitude of a divisor.

        Raises:
            ValueError: an unknown quantity.
        """
        for name, quantity in (("given", given), ("to", to)):
            if quantity not in QUANTITIES:
                raise ValueError(f"{name} must be one of {list(QUANTITIES)}, got {quantity!r}")
        if given == to:
            return value
        s = expand(t, x_t)
        noise = self._noise(value, x_t, s, given, floor)
        if to == "noise":
            return noise
        if to == "score":
            return -noise / _away_from_zero(self.sigma(s), floor)
        data = value if given == "data" else self._data(value, noise, x_t, s, given, floor)
        return data if to == "data" else self.d_alpha(s) * data + self.d_sigma(s) * noise

    def _noise(self, value: Tensor, x_t: Tensor, s: Tensor, given: Quantity, floor: float) -> Tensor:
        if given == "noise":
            return value
        if given == "score":
            return -self.sigma(s) * value
        if given == "data":
            return (x_t - self.alpha(s) * value) / _away_from_zero(self.sigma(s), floor)
        return (self.alpha(s) * value - self.d_alpha(s) * x_t) / self.determinant(s)

    def _data(self, value: Tensor, noise: Tensor, x_t: Tensor, s: Tensor, given: Quantity, floor: float) -> Tensor:
        if given == "velocity":
            return (self.d_sigma(s) * x_t - self.sigma(s) * value) / self.determinant(s)
        return (x_t - self.sigma(s) * noise) / _away_from_zero(self.alpha(s), floor)

    def determinant(self, t: Tensor) -> Tensor:
        """``alpha d_sigma - sigma d_alpha``: negative on every path from noise to data, shape of ``t``."""
        return self.alpha(t) * self.d_sigma(t) - self.sigma(t) * self.d_alpha(t)

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``d_alpha / alpha`` and ``w(t) = (d_alpha / alpha) sigma^2 - sigma d_sigma``, shaped like t.

        The velocity is ``(d_alpha / alpha) x_t + w S``; infinite where alpha vanishes (t = 0 on Linear).
        """
        rate = self.d_alpha(t) / self.alpha(t)
        return rate, rate * self.sigma(t) ** 2 - self.sigma(t) * self.d_sigma(t)


def _away_from_zero(divisor: Tensor, floor: float) -> Tensor:
    return divisor if floor == 0 else torch.where(divisor < 0, -1.0, 1.0) * divisor.abs().clamp_min(floor)


@dataclass(frozen=True)
class Linear(Path):
    """The straight path ``x_t = t x1 + (1 - (1 - sigma_min) t) x0`` (rectified flow, conditional OT path).

    Args:
        sigma_min: noise that is left at t = 1. 0 ends at the data; Lipman et al. (2023) and LFM use 1e-5.

    Raises:
        ValueError: ``sigma_min`` outside [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path.alpha`."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path.sigma`."""
        return 1 - t if self.sigma_min == 0 else (1 - t) + self.sigma_min * t

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path.d_alpha`."""
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path.d_sigma`."""
        return torch.full_like(t, self.sigma_min - 1)


@dataclass(frozen=True)
class Trigonometric(Path):
    """The variance-preserving quarter circle ``x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0`` (GVP in SiT)."""

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path.alpha`."""
        return torch.sin(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path.sigma`; exactly 0 at t = 1."""
        return torch.sin((1 - t) * (math.pi / 2))

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path.d_alpha`."""
        return torch.cos(t * (math.pi / 2)) * (math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path.d_sigma`."""
        return -torch.cos((1 - t) * (math.pi / 2)) * (math.pi / 2)


@dataclass(frozen=True)
class VariancePreserving(Path):
    r"""The diffusion path with a linear noise rate (DDPM's continuous limit).

    ``alpha = exp(-(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2)`` and
    ``sigma = sqrt(1 - alpha^2)``. At t = 0 a little data is left (alpha = 6.6e-3 with the defaults). The
    derivative of sigma is infinite at t = 1: its divisor is held at 1e-4, which it passes at 1 - t = 1e-7.

    Args:
        beta_min: noise rate at the data end.
        beta_max: noise rate at the noise end.

    Raises:
        ValueError: unless ``0 < beta_min <= beta_max``.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"beta_min must lie in (0, beta_max], got beta_min={self.beta_min}, beta_max={self.beta_max}"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -0.25 * s**2 * (self.beta_max - self.beta_min) - 0.5 * s * self.beta_min

    def _d_log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path.alpha`."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path.sigma`."""
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path.d_alpha`."""
        return self.alpha(t) * self._d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path.d_sigma`; large and finite at t = 1."""
        return -torch.exp(2 * self._log_alpha(t)) * self._d_log_alpha(t) / self.sigma(t).clamp_min(1e-4)
