"""The flow runs on the data itself."""

from __future__ import annotations

from torch import Tensor

from lightning_flows.codecs.base import Codec, Posterior


class Identity(Codec):
    """z = x."""

    def posterior(self, x: Tensor) -> Posterior:
        """The point x."""
        return Posterior(x)

    def decode(self, z: Tensor) -> Tensor:
        """Returns z."""
        return z

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape."""
        return tuple(shape)
