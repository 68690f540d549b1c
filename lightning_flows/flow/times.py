r"""Time laws: where along the path a training example is taken, and the grids of sampling.

Time runs from noise (0) to data (1). Every law is given by two formulas that can be checked against each
other: its quantile function, which turns uniform numbers into times, and its density. A *shift* :math:`a`
moves mass towards noise,

.. math:: t' = \frac{t}{t + a (1 - t)}
          \quad\Longleftrightarrow\quad \operatorname{logit} t' = \operatorname{logit} t - \log a,

so shifts compose by multiplication, and the same shift that a model was trained with makes its inference
grid.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), which writes
    :math:`\sigma = 1 - t`: the sign of a logit-normal mean changes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def _require_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a finite number > 0 (1 changes nothing), got {shift!r}")


def shift_time(t: Tensor, shift: float) -> Tensor:
    r"""Moves times towards noise, :math:`t' = t / (t + a (1 - t))`; both ends stay where they are.

    In the noise level :math:`\sigma = 1 - t` this is :math:`\sigma' = a \sigma / (1 + (a - 1) \sigma)`.
    Shifts compose, ``shift_time(shift_time(t, a), b) == shift_time(t, a * b)``, and ``1 / a`` undoes ``a``.

    Args:
        t: Times in [0, 1], any shape, floating point.
        shift: The factor a > 0; above 1 gives more of the path to noise (3 at 1024 x 1024 pixels in SD3).

    Raises:
        ValueError: If ``shift`` is not a finite positive number.
    """
    _require_shift(shift)
    if shift == 1:  # exactly the identity, which t / (t + (1 - t)) is not in floating point
        return t
    return t / (t + shift * (1 - t))


def time_grid(
    steps: int,
    shift: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the end points of ``steps`` intervals from 0 to 1, shape (steps + 1,), strictly increasing.

    The first value is exactly 0 and the last exactly 1. Intervals are equal for ``shift = 1``.

    Args:
        steps: The number of intervals, at least 1.
        shift: See `shift_time`.
        device: Where the grid shall lie.
        dtype: Its floating-point type.

    Raises:
        ValueError: If ``steps`` or ``shift`` is out of range, or ``dtype`` cannot tell neighbouring times
            apart.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    grid = shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).to(dtype)
    grid[0], grid[-1] = 0, 1
    if not bool((grid.diff() > 0).all()):
        raise ValueError(f"dtype {dtype} cannot resolve a grid of steps={steps} with shift={shift}; use float64")
    return grid.to(device)


class TimeSampler(ABC):
    """A law of training times on [0, 1]: draws from it, its density, and the grid that goes with it.

    A law is defined by ``_quantile`` and ``_density`` before the shift; the shift is applied here, in
    float64, because a quantile is steep near the ends.
    """

    @property
    @abstractmethod
    def shift(self) -> float:
        """The factor of `shift_time`, used for training times and for inference grids alike."""

    @abstractmethod
    def _quantile(self, u: Tensor) -> Tensor:
        """Maps uniform numbers to unshifted times, increasing, both float64."""

    @abstractmethod
    def _density(self, t: Tensor) -> Tensor:
        """Density of the unshifted law at t in [0, 1], both float64."""

    def quantile(self, u: Tensor) -> Tensor:
        """Returns the times below which the law has mass u, of u's shape and dtype."""
        return shift_time(self._quantile(u.double()).clamp(0, 1), self.shift).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        """Returns the density of the law at t, of t's shape and dtype; 0 outside [0, 1]."""
        exact = t.double()
        inside = (exact >= 0) & (exact <= 1)
        exact = exact.clamp(0, 1)
        slope = self.shift / (1 + (self.shift - 1) * exact) ** 2  # derivative of the inverse shift
        density = self._density(shift_time(exact, 1 / self.shift)) * slope
        return torch.where(inside, density, 0.0).to(t.dtype)

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n times, shape (n,), float32 in [0, 1].

        Args:
            n: How many.
            generator: A CPU generator: randomness is keyed by the caller and made on CPU (see `noise.Noise`).
        """
        return self.quantile(self._uniform(n, generator)).float()

    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    def grid(
        self, steps: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Returns the inference grid of this law's shift, shape (steps + 1,); see `time_grid`."""
        return time_grid(steps, self.shift, device=device, dtype=dtype)


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Creates the uniform law on [0, 1], the plain choice of flow matching.

    Args:
        shift: See `shift_time`.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_shift(self.shift)

    def _quantile(self, u: Tensor) -> Tensor:
        return u

    def _density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Stratified(TimeSampler):
    r"""Creates stratified draws of another law: one time in each of n bins of equal probability.

    .. math:: t_{\pi(i)} = F^{-1}((i + u_i) / n), \quad u_i \sim U(0, 1), \quad \pi \text{ a permutation}.

    Each time alone has the law's density; together they cover it evenly, so that the mean loss of a batch
    varies less. The permutation keeps a row's place in the batch from telling its time.

    Args:
        law: The law that is stratified; its shift holds for the grid, too.
    """

    law: TimeSampler = Uniform()

    @property
    def shift(self) -> float:
        """The shift of the law."""
        return self.law.shift

    def _quantile(self, u: Tensor) -> Tensor:
        return self.law._quantile(u)

    def _density(self, t: Tensor) -> Tensor:
        return self.law._density(t)

    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        bins = torch.randperm(n, generator=generator)
        return (bins + super()._uniform(n, generator)) / n


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    r"""Creates the logit-normal law, :math:`\operatorname{logit} t \sim N(m, s^2)`, shifted.

    ``mean`` is that of logit t **in our direction** (0 noise, 1 data). Papers with noise at 1 have the
    opposite sign: MeanFlow's -0.4 is +0.4 here. The shifted law is again logit-normal, with mean :math:`m -
    \log a`.

    Args:
        mean: The mean m of logit t; above 0 prefers data.
        std: The standard deviation s > 0 of logit t.
        shift: See `shift_time`.

    References:
        Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024).
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_shift(self.shift)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number, got {self.mean!r}")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"std must be a finite number > 0, got {self.std!r}")

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def _density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std  # infinite at the ends, where the density is 0
        log_density = -0.5 * z**2 - torch.log(t) - torch.log1p(-t) - math.log(self.std * math.sqrt(2 * math.pi))
        return torch.where(z.isfinite(), log_density.exp(), 0.0)


@dataclass(frozen=True)
class Mode(TimeSampler):
    r"""Creates the law "mode with heavy tails" of Stable Diffusion 3, which never starves the ends.

    .. math:: t = f(u) = u + s (\cos^2(\pi u / 2) - 1 + u), \quad p(t) = 1 / f'(f^{-1}(t)),\ u \sim U(0,1).

    Args:
        scale: s in [-1, 2 / (pi - 2)], where f increases; above 0 prefers the middle, below 0 the ends.
        shift: See `shift_time`.

    References:
        Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024).
    """

    scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_shift(self.shift)
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must be in [-1, 2 / (pi - 2) = 1.7519], got {self.scale!r}")

    def _quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def _density(self, t: Tensor) -> Tensor:
        u = self._inverse(t)
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u)))

    def _inverse(self, t: Tensor) -> Tensor:
        """Solves f(u) = t by bisection: 60 halvings reach float64 and need no slope, which may vanish."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap(TimeSampler):
    r"""Creates the law that gives the linear path the log-SNR density of the cosine schedule.

    .. math:: t = 1 - \frac{1}{1 + \tan(\pi u / 2)}, \qquad p(t) = \frac{2}{\pi - 2 \pi t + 2 \pi t^2}.

    Args:
        shift: See `shift_time`.

    References:
        Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_shift(self.shift)

    def _quantile(self, u: Tensor) -> Tensor:
        sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sine / (sine + cosine)  # the same with no infinite tangent at u = 1

    def _density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


@dataclass(frozen=True)
class UShaped(TimeSampler):
    r"""Creates the U-shaped law of "2-rectified flow++": both ends more often than the middle.

    .. math:: p(t) = \frac{a (e^{a t} + e^{a (1 - t)})}{2 (e^a - 1)}, \qquad
              t = \frac12 + \frac1a \operatorname{arsinh}\left((2u - 1) \sinh\frac a2\right),\ u \sim U(0,1).

    Args:
        a: Steepness in (0, 100]; towards 0 the law becomes uniform.
        shift: See `shift_time`.

    References:
        Improving the Training of Rectified Flows (Lee, Lin, Fanti, 2024).
    """

    a: float = 4.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_shift(self.shift)
        if not 0 < self.a <= 100:
            raise ValueError(f"a must be in (0, 100], got {self.a!r}")

    def _quantile(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def _density(self, t: Tensor) -> Tensor:
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))
