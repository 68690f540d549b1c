r"""Training of normalizing flows: the exact likelihood of data to which noise was added.

.. math::

    L(x) = w \Big[ \tfrac 1{2D} |z|^2 - \tfrac 1D \log\Big|\det\frac{\partial z}{\partial x}\Big| \Big]
         + \lambda \sum_b \tfrac 1D |x^{(b)}|^2, \qquad z = f(x + \text{noise}),

a mean over the D dimensions without its constants; :math:`x^{(b)}` is the data before the first block and what
comes out of every block but the last (STARFlow's penalty against scales that run away).

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.likelihood import dequantize
from lightning_flows.flow.noise import Noise
from lightning_flows.flow.objectives import Losses, Objective

PUBLISHED_NOISE = 0.3  # deviation at which STARFlow's weight of a noise level is 1


@dataclass(frozen=True)
class DataNoise(ABC):
    """What is added to data before their likelihood is trained: data on a thin sheet have no density."""

    @property
    def std(self) -> float:
        """Deviation of Gaussian noise, which samples then hold as well; 0 for noise of another kind."""
        return 0.0

    @property
    def weight(self) -> float:
        """Factor on the loss."""
        return 1.0

    @abstractmethod
    def add(self, x: Tensor, noise: Noise) -> Tensor:
        """Data ``x`` (B, ...) with noise."""


@dataclass(frozen=True)
class GaussianNoise(DataNoise):
    """``x + deviation * N(0, I)``.

    Args:
        deviation: in units of the data; 0 adds nothing.
        weighted: multiply the loss by ``deviation / 0.3``, as STARFlow does where the noise level is in the prompt.

    Raises:
        ValueError: a negative deviation.
    """

    deviation: float = 0.1
    weighted: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.deviation) and self.deviation >= 0):
            raise ValueError(f"deviation must not be negative, got {self.deviation}")

    @property
    def std(self) -> float:
        """See `DataNoise.std`."""
        return self.deviation

    @property
    def weight(self) -> float:
        """See `DataNoise.weight`."""
        return self.deviation / PUBLISHED_NOISE if self.weighted else 1.0

    def add(self, x: Tensor, noise: Noise) -> Tensor:
        """See `DataNoise.add`."""
        return x + self.deviation * noise.normal("data_noise", like=x) if self.deviation else x


@dataclass(frozen=True)
class Dequantization(DataNoise):
    """Uniform noise within the bin of a grey level (`flow.dequantize`): densities of pixels then bound those of levels.

    Args:
        levels: number of grey levels.

    Raises:
        ValueError: fewer than two levels.
    """

    levels: int = 256

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")

    def add(self, x: Tensor, noise: Noise) -> Tensor:
        """See `DataNoise.add`."""
        return dequantize(x, self.levels, noise)


@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """Negative log-likelihood of noisy data under a normalizing flow, in nats per dimension.

    Args:
        data_noise: added to the data.
        latent_penalty: factor on the mean squares of what is between the blocks; 1e-4 in STARFlow.

    Raises:
        ValueError: a negative penalty.
    """

    data_noise: DataNoise = field(default_factory=GaussianNoise)
    latent_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.latent_penalty >= 0:
            raise ValueError(f"latent_penalty must not be negative, got {self.latent_penalty}")

    def __call__(
        self, network: Any, x1: Tensor, condition: Condition | None, noise: Noise, x0: Tensor | None = None
    ) -> Losses:
        """See `Objective.__call__`; ``network(x, condition, states=True)`` gives z, log_det and states.

        Logs hold ``nll``: nats per dimension with all constants, without weight and penalty.

        Raises:
            ValueError: ``x0``, which a likelihood has no use for.
        """
        if x0 is not None:
            raise ValueError("x0: a likelihood takes no noise that was coupled with the data: leave out the coupling")
        x = self.data_noise.add(x1, noise)
        z, log_det, states = network(x, condition, states=True)
        dims = z[0].numel()
        nll = 0.5 * z.square().flatten(1).mean(1) - log_det / dims  # (B,)
        loss = self.data_noise.weight * nll
        if self.latent_penalty:
            loss = loss + self.latent_penalty * sum(state.square().flatten(1).mean(1) for state in states)
        return Losses(loss, {"nll": nll.detach() + 0.5 * math.log(2 * math.pi)})


def tweedie(x: Tensor, score: Tensor, std: float) -> Tensor:
    r"""The mean of clean data given data with Gaussian noise: :math:`x + \sigma^2 \nabla_x \log p(x)`, each (B, ...).

    References:
        Tweedie's Formula and Selection Bias (Efron, 2011).
    """
    return torch.addcmul(x, score, score.new_tensor(std**2))
