"""Codecs: data <-> latent. The only place that knows diffusers and transformers, loaded when first used."""

from lightning_flows.codecs.autoencoder_dc import AutoencoderDC
from lightning_flows.codecs.autoencoder_kl import AutoencoderKL
from lightning_flows.codecs.base import Codec, Posterior
from lightning_flows.codecs.frozen import FrozenCodec
from lightning_flows.codecs.identity import Identity
from lightning_flows.codecs.kl_network import KLNetwork

__all__ = ["AutoencoderDC", "AutoencoderKL", "Codec", "FrozenCodec", "Identity", "KLNetwork", "Posterior"]
