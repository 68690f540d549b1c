"""The flow runs on the data itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flows.codecs.base import Codec
from lightning_flows.flow.noise import Noise


class Identity(Codec):
    """z = x."""

    def encode(self, x: Tensor, noise: Noise | torch.Generator | None = None) -> Tensor:
        """Returns x."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Returns z."""
        return z

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape."""
        return tuple(shape)
