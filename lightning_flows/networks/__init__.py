"""Networks: plain ``nn.Module`` classes ``(x, t, condition) -> prediction``, single-device code.

Parallelism, compilation and checkpointing are applied from outside.
"""

from lightning_flows.networks.conditioning import LabelEmbedding, VelocityNetwork, check_condition
from lightning_flows.networks.dit import DIT_SIZES, DiT
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

__all__ = [
    "DIT_SIZES",
    "Attention",
    "DiT",
    "LabelEmbedding",
    "Mlp",
    "RMSNorm",
    "ReversedTime",
    "TimestepEmbedder",
    "VelocityNetwork",
    "attention",
    "attention_backend",
    "check_condition",
    "modulate",
    "position_table",
    "sinusoid",
]
