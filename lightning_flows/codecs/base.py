"""A codec turns data into what the flow models and back: a plain object, not a part of the trained module.

A frozen network that a codec holds stays outside of the module tree, so that optimizers, moving averages,
gradient synchronisation, checkpoints and published weights see only what is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.store import Recorded


class Posterior(NamedTuple):
    """What data is encoded to before anything is drawn: a Gaussian of independent entries, or a point.

    Attributes:
        mean: float32, ``(B, *latent_shape)``, in the units of z.
        std: standard deviation, the same shape and units; None for a deterministic codec.
    """

    mean: Tensor
    std: Tensor | None = None


class Codec(Recorded, ABC):
    """Data x <-> latent z, with ``z = mean + std * noise`` of the posterior of x."""

    @abstractmethod
    def posterior(self, x: Tensor) -> Posterior:
        """Mean and deviation of the latent of a batch, in the units of z (after any shift and scale).

        Args:
            x: data, float32; images (B, C, H, W) in [-1, 1].
        """

    def encode(self, x: Tensor, noise: Noise | torch.Generator | None = None) -> Tensor:
        """Latent of a batch.

        Args:
            x: data, float32; images (B, C, H, W) in [-1, 1].
            noise: draws of the posterior: a `Noise` (purpose ``"posterior"``) or a CPU generator. None gives
                the mean: nothing is drawn from a global stream.

        Returns:
            z, float32, ``(B, *latent_shape)``.
        """
        return self.draw(self.posterior(x), noise)

    def draw(self, posterior: Posterior, noise: Noise | torch.Generator | None = None) -> Tensor:
        """Latent of a posterior, which may have been computed long ago (see `data.CachedLatents`).

        Args:
            posterior: as `posterior` gave it.
            noise: see `encode`.
        """
        if posterior.std is None or noise is None:
            return posterior.mean
        return posterior.mean + posterior.std * _normal(noise, posterior.mean)

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Data of a batch of latents, differentiable in ``z``; images are not clipped."""

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of z for data of one shape, both without the batch."""


def _normal(noise: Noise | torch.Generator, like: Tensor) -> Tensor:
    if isinstance(noise, Noise):
        return noise.normal("posterior", like=like)
    return torch.randn(like.shape, generator=noise, dtype=like.dtype, device=noise.device).to(like.device)
