"""Networks: plain ``nn.Module`` classes ``(x, t, condition) -> prediction``, single-device code.

Parallelism, compilation and checkpointing are applied from outside.
"""

from lightning_flows.networks.adm_unet import ADMUNet
from lightning_flows.networks.conditioning import LabelEmbedding, VelocityNetwork, check_condition
from lightning_flows.networks.discriminator import PatchDiscriminator
from lightning_flows.networks.dit import DIT_SIZES, DiT
from lightning_flows.networks.edm_unet import EDMUNet
from lightning_flows.networks.layers import (
    Attention,
    Mlp,
    RMSNorm,
    TimestepEmbedder,
    attention,
    attention_backend,
    modulate,
    position_table,
    sinusoid,
)
from lightning_flows.networks.reversed_time import ReversedTime
from lightning_flows.networks.spatial import SemanticRescaler
from lightning_flows.networks.unet_blocks import UNetBlock

__all__ = [
    "DIT_SIZES",
    "ADMUNet",
    "Attention",
    "DiT",
    "EDMUNet",
    "LabelEmbedding",
    "Mlp",
    "PatchDiscriminator",
    "RMSNorm",
    "ReversedTime",
    "SemanticRescaler",
    "TimestepEmbedder",
    "UNetBlock",
    "VelocityNetwork",
    "attention",
    "attention_backend",
    "check_condition",
    "modulate",
    "position_table",
    "sinusoid",
]
