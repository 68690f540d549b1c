"""Where a flow starts: the distribution of x0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_flows.flow.noise import Noise


@dataclass(frozen=True)
class Source(ABC):
    """A distribution over x0 of any shape."""

    @property
    @abstractmethod
    def gaussian(self) -> bool:
        """Whether noise and score convert into each other (``S = -E / sigma``), as SDE solvers need."""

    @abstractmethod
    def sample(self, noise: Noise, purpose: int | str, like: Tensor) -> Tensor:
        """A draw of the shape, dtype and device of ``like`` (B, ...)."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x`` (B, ...) in nats, one number a sample, shape (B,)."""


@dataclass(frozen=True)
class Gaussian(Source):
    """The standard normal distribution."""

    @property
    def gaussian(self) -> bool:
        """See `Source.gaussian`."""
        return True

    def sample(self, noise: Noise, purpose: int | str, like: Tensor) -> Tensor:
        """See `Source.sample`."""
        return noise.normal(purpose, like)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Source.log_prob`."""
        flat = x.flatten(1)
        return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))
