"""Codecs: data <-> latent. The only place that knows diffusers and transformers, loaded when first used."""

from lightning_flows.codecs.autoencoder_kl import AutoencoderKL
from lightning_flows.codecs.base import Codec
from lightning_flows.codecs.identity import Identity

__all__ = ["AutoencoderKL", "Codec", "Identity"]
