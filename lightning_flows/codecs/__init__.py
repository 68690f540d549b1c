"""Codecs: data <-> latent, text -> tokens. The only place that knows diffusers and transformers, loaded when used."""

from lightning_flows.codecs.autoencoder_dc import AutoencoderDC
from lightning_flows.codecs.autoencoder_kl import AutoencoderKL
from lightning_flows.codecs.base import Codec, Posterior
from lightning_flows.codecs.frozen import FrozenCodec
from lightning_flows.codecs.frozen_text import FrozenText
from lightning_flows.codecs.identity import Identity
from lightning_flows.codecs.kl_network import KLNetwork
from lightning_flows.codecs.prompts import PromptTemplate
from lightning_flows.codecs.text import TextEncoder
from lightning_flows.codecs.word_encoder import WordEncoder

__all__ = [
    "AutoencoderDC",
    "AutoencoderKL",
    "Codec",
    "FrozenCodec",
    "FrozenText",
    "Identity",
    "KLNetwork",
    "Posterior",
    "PromptTemplate",
    "TextEncoder",
    "WordEncoder",
]
