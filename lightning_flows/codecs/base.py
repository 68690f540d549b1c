"""A codec turns data into what the flow models and back: a plain object, not a part of the trained module.

A frozen network that a codec holds stays outside of the module tree, so that optimizers, moving averages,
gradient synchronisation, checkpoints and published weights see only what is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.store import Recorded


class Codec(Recorded, ABC):
    """Data x <-> latent z."""

    @abstractmethod
    def encode(self, x: Tensor, noise: Noise | torch.Generator | None = None) -> Tensor:
        """Latent of a batch.

        Args:
            x: data, float32; images (B, C, H, W) in [-1, 1].
            noise: randomness of a codec that encodes to a distribution.

        Returns:
            z, float32, ``(B, *latent_shape)``.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Data of a batch of latents, differentiable in ``z``; images are not clipped."""

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of z for data of one shape, both without the batch."""
