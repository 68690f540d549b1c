"""Networks: plain ``nn.Module`` classes ``(x, t, condition) -> prediction``, single-device code.

Parallelism, compilation and checkpointing are applied from outside.
"""

from lightning_flows.networks.adapter_folder import load_adapter, save_adapter
from lightning_flows.networks.adm_unet import ADMUNet
from lightning_flows.networks.calibration import calibrate
from lightning_flows.networks.causal import CausalLayer, KeyValueCache, LayerStyle
from lightning_flows.networks.conditioning import LabelEmbedding, VelocityNetwork, check_condition
from lightning_flows.networks.discriminator import PatchDiscriminator
from lightning_flows.networks.dit import DIT_SIZES, DiT
from lightning_flows.networks.edm_unet import EDMUNet
from lightning_flows.networks.flow_block import FlowBlock
from lightning_flows.networks.flow_stack import Drawn, Encoded, FlowStack, Part
from lightning_flows.networks.guided_encoding import encode_guided
from lightning_flows.networks.inverse_methods import Automatic, InverseMethod, Jacobi, PerBlock, Sequential
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
from lightning_flows.networks.lora import adapters_of, add_lora, merge_adapters, remove_adapters, use_adapters
from lightning_flows.networks.parallel import (
    blocks_of,
    checkpoint_blocks,
    compile_blocks,
    compile_network,
    restore_blocks,
    shard_blocks,
)
from lightning_flows.networks.preconditioned import Preconditioned
from lightning_flows.networks.resizing import (
    Patch,
    resize_input_channels,
    resize_label_table,
    resize_output_channels,
    resize_patch_kernel,
    resize_patch_rows,
    resize_position_table,
)
from lightning_flows.networks.reversed_time import ReversedTime
from lightning_flows.networks.spatial import SemanticRescaler
from lightning_flows.networks.stable_diffusion_unet import StableDiffusionUNet
from lightning_flows.networks.starflow import STARFlow
from lightning_flows.networks.tarflow import TARFlow
from lightning_flows.networks.unet_blocks import UNetBlock
from lightning_flows.networks.widening import widen

__all__ = [
    "DIT_SIZES",
    "ADMUNet",
    "Attention",
    "Automatic",
    "CausalLayer",
    "DiT",
    "Drawn",
    "EDMUNet",
    "Encoded",
    "FlowBlock",
    "FlowStack",
    "InverseMethod",
    "Jacobi",
    "KeyValueCache",
    "LabelEmbedding",
    "LayerStyle",
    "Mlp",
    "Part",
    "Patch",
    "PatchDiscriminator",
    "PerBlock",
    "Preconditioned",
    "RMSNorm",
    "ReversedTime",
    "STARFlow",
    "SemanticRescaler",
    "Sequential",
    "StableDiffusionUNet",
    "TARFlow",
    "TimestepEmbedder",
    "UNetBlock",
    "VelocityNetwork",
    "adapters_of",
    "add_lora",
    "attention",
    "attention_backend",
    "blocks_of",
    "calibrate",
    "check_condition",
    "checkpoint_blocks",
    "compile_blocks",
    "compile_network",
    "encode_guided",
    "load_adapter",
    "merge_adapters",
    "modulate",
    "position_table",
    "remove_adapters",
    "resize_input_channels",
    "resize_label_table",
    "resize_output_channels",
    "resize_patch_kernel",
    "resize_patch_rows",
    "resize_position_table",
    "restore_blocks",
    "save_adapter",
    "shard_blocks",
    "sinusoid",
    "use_adapters",
    "widen",
]
