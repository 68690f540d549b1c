"""Deep compression autoencoders, frozen, through diffusers: 32 or 64 times fewer rows and columns, no posterior.

Reference: Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models (Chen, Cai, Chen, Xie,
Yang, Tang, Li, Lu, Han, 2024).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_flows.codecs.base import Posterior
from lightning_flows.codecs.frozen import FrozenCodec


class AutoencoderDC(FrozenCodec):
    """A frozen `diffusers.AutoencoderDC`; deterministic: an image has one latent.

    Lazy loading, devices and precision: see `FrozenCodec`.

    Args:
        repo: ``org/name``, ``org/name@revision``, or a local folder.
        subfolder: folder of the autoencoder in a repository that holds more.
        revision: commit, branch or tag, where ``repo`` does not say it.
        scale: factor on the latent; None takes ``scaling_factor`` of the autoencoder's config.
        shift: what is subtracted before; None takes ``shift_factor`` of the config (0 where it has none).

    Raises:
        ValueError: a ``scale`` that is not positive, a revision given twice.
    """

    architecture = "AutoencoderDC"
    widths = "encoder_block_out_channels"

    def moments(self, network: Any, x: Tensor) -> Posterior:
        """See `FrozenCodec.moments`."""
        return Posterior(network.encode(x).latent)
