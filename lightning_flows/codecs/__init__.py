"""Codecs: data <-> latent, masks and labels <-> planes, text -> tokens.

The only place that knows diffusers and transformers, loaded when used.
"""

from lightning_flows.codecs.autoencoder_dc import AutoencoderDC
from lightning_flows.codecs.autoencoder_kl import AutoencoderKL
from lightning_flows.codecs.base import Codec, Posterior
from lightning_flows.codecs.frozen import FrozenCodec
from lightning_flows.codecs.frozen_text import FrozenText
from lightning_flows.codecs.identity import Identity
from lightning_flows.codecs.joint_semantics import JointSemantics, ThroughAutoencoder
from lightning_flows.codecs.kl_network import KLNetwork
from lightning_flows.codecs.label_map import LabelMap, painted
from lightning_flows.codecs.learned_colours import LearnedColours
from lightning_flows.codecs.palette import RGBPalette
from lightning_flows.codecs.prompts import PromptTemplate
from lightning_flows.codecs.semantic import IGNORE, Decoded, SemanticCodec
from lightning_flows.codecs.semantic_planes import AnalogBits, ClassPlane, OneHot
from lightning_flows.codecs.text import TextEncoder
from lightning_flows.codecs.word_encoder import WordEncoder

__all__ = [
    "AnalogBits",
    "AutoencoderDC",
    "AutoencoderKL",
    "ClassPlane",
    "Codec",
    "Decoded",
    "FrozenCodec",
    "FrozenText",
    "IGNORE",
    "Identity",
    "JointSemantics",
    "KLNetwork",
    "LabelMap",
    "LearnedColours",
    "OneHot",
    "Posterior",
    "PromptTemplate",
    "RGBPalette",
    "SemanticCodec",
    "TextEncoder",
    "ThroughAutoencoder",
    "WordEncoder",
    "painted",
]
