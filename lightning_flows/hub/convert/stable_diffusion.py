"""The U-Net of Stable Diffusion 1.x and 2.x, in the names of diffusers (`UNet2DConditionModel`), as ours.

Every value of a config that changes the network and that `networks.StableDiffusionUNet` does not have is an error that
names it. Two of them mean what their names do not say: ``attention_head_dim`` is the number of heads, and it may be one
number for all levels or one for each. Projections around a transformer may be 1x1 convolutions (version 1) or Linears
(version 2): the same numbers.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.codecs import FrozenText
from lightning_flows.hub.convert.common import content_of, read_state
from lightning_flows.hub.convert.unet import load_named, prefixed
from lightning_flows.networks import StableDiffusionUNet
from lightning_flows.networks.text_blocks import TextBlock

FILES = (".safetensors", ".pt", ".pth")
WITH_TEXT = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
# What a config may say of these, the default of diffusers first.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),  # diffusers itself refuses it
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "num_class_embeds": (None,),
    "projection_class_embeddings_input_dim": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
READ: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
}
FREE = {"use_linear_projection", "upcast_attention", "addition_embed_type_num_heads"}  # the numbers are the same
RESIDUAL = {
    "residual.norm1": "norm1",
    "residual.conv1": "conv1",
    "residual.embed": "time_emb_proj",
    "residual.norm2": "norm2",
    "residual.conv2": "conv2",
    "residual.skip": "conv_shortcut",
}
TRANSFORMER = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "mlp.up": "ff.net.0.proj",
    "mlp.down": "ff.net.2",
    **{f"{ours}.{mine}": f"{theirs}.{official}"
       for ours, theirs in (("attention", "attn1"), ("cross", "attn2"))
       for mine, official in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj", "to_out.0"))},
}  # fmt: skip

# ------------------------------------------------------------------ the network


def load_unet(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], context: Tensor, **changes: Any
) -> StableDiffusionUNet:
    """The network with the weights of a `UNet2DConditionModel`, in eval mode.

    Args:
        settings: its config.
        tensors: its state dict, official names to float32 tensors.
        context: embedding of the empty prompt, shape (L, D).
        **changes: other arguments of `StableDiffusionUNet`, such as ``time_scale`` and ``input_size``.

    Raises:
        ValueError: a value of the config that our network does not have; unknown, missing or misshapen tensors.
    """
    arguments = {**unet_arguments(settings), "context_length": len(context), **changes}
    if arguments["input_size"] is None:
        raise ValueError("the config says no sample_size: give input_size")
    if context.dim() != 2 or context.shape[1] != arguments["context_dim"]:
        wanted = f"(L, {arguments['context_dim']}), as cross_attention_dim says"
        raise ValueError(f"context must have shape {wanted}, got {tuple(context.shape)}")
    network = StableDiffusionUNet(**arguments)
    load_named(network, {**tensors, "context": context}, unet_modules(network))
    return network.eval()


def unet_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `StableDiffusionUNet` for a config of `UNet2DConditionModel`.

    Raises:
        ValueError: naming the key and the value that our network does not have.
    """
    _check_fixed(settings)
    given = {**READ, **{name: settings[name] for name in READ if name in settings}}
    if given["out_channels"] != given["in_channels"]:
        raise _refused("out_channels", given["out_channels"], f"as many as in_channels={given['in_channels']}")
    return {
        "input_size": _size(given["sample_size"]),
        "in_channels": given["in_channels"],
        "channels": tuple(given["block_out_channels"]),
        "num_blocks": _numbers(given["layers_per_block"]),
        "attention": _attention(given["down_block_types"], given["up_block_types"]),
        "num_heads": _numbers(given["attention_head_dim"]),
        "depth": _numbers(given["transformer_layers_per_block"], "transformer_layers_per_block"),
        "context_dim": _one("cross_attention_dim", given["cross_attention_dim"]),
        "groups": _one("norm_num_groups", given["norm_num_groups"]),
        "eps": given["norm_eps"],
        "dropout": given["dropout"],
        "sines_first": not given["flip_sin_to_cos"],
        "frequency_shift": float(given["freq_shift"]),
    }


def unet_modules(network: StableDiffusionUNet) -> dict[str, str]:
    """Our module names in the network to those of diffusers; the text in the network has its own name."""
    names = {
        "context": "context",
        "t_embedder.mlp.0": "time_embedding.linear_1",
        "t_embedder.mlp.2": "time_embedding.linear_2",
        "stem": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    names |= _blocks(network.middle, "middle", "mid_block")
    for ours, theirs, change in (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers")):
        for i, level in enumerate(getattr(network, ours)):
            names |= _blocks(level.blocks, f"{ours}.{i}.blocks", f"{theirs}.{i}")
            names |= prefixed({"conv": "conv"}, f"{ours}.{i}.resample", f"{theirs}.{i}.{change}.0")
    return names


def _blocks(blocks: nn.ModuleList, ours: str, theirs: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for j, block in enumerate(blocks):
        assert isinstance(block, TextBlock)
        names |= prefixed(RESIDUAL, f"{ours}.{j}", f"{theirs}.resnets.{j}")
        if block.transformer is not None:
            place, official = f"{ours}.{j}.transformer", f"{theirs}.attentions.{j}"
            names |= prefixed(TRANSFORMER, place, official)
            for k in range(len(block.transformer.layers)):
                names |= prefixed(LAYER, f"{place}.layers.{k}", f"{official}.transformer_blocks.{k}")
    return names


# ------------------------------------------------------------------ configs


def _check_fixed(settings: Mapping[str, Any]) -> None:
    known = {*FIXED, *READ, *FREE}
    for name, value in settings.items():
        if name in FIXED and any(entry not in FIXED[name] for entry in _listed(value)):
            raise _refused(name, value, f"{FIXED[name][0]!r} only")
        if name not in known and not name.startswith("_"):
            raise _refused(name, value, "no such option")


def _attention(down: Sequence[str], up: Sequence[str]) -> tuple[bool, ...]:
    for name, kinds in (("down_block_types", down), ("up_block_types", up)):
        if other := sorted(set(kinds) - set(WITH_TEXT)):
            raise _refused(name, other, f"{sorted(WITH_TEXT)} only")
    attends = tuple(WITH_TEXT[kind] for kind in down)
    if attends != tuple(WITH_TEXT[kind] for kind in reversed(up)):
        raise _refused("up_block_types", list(up), f"the mirror image of down_block_types={list(down)} only")
    return attends


def _numbers(value: Any, name: str = "") -> int | tuple[int, ...]:
    if isinstance(value, Sequence) and any(isinstance(entry, Sequence) for entry in value):
        raise _refused(name, value, "one number for each level")
    return tuple(value) if isinstance(value, Sequence) else value


def _one(name: str, value: Any) -> int:
    if len(set(_listed(value))) != 1 or not isinstance(_listed(value)[0], int):
        raise _refused(name, value, "one number for all levels")
    return int(_listed(value)[0])


def _size(value: Any) -> int | tuple[int, int] | None:
    return tuple(value) if isinstance(value, Sequence) else value  # type: ignore[return-value]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _refused(name: str, value: Any, has: str) -> ValueError:
    return ValueError(f"the config says {name}={value!r}; StableDiffusionUNet has {has}")


# ------------------------------------------------------------------ folders


def read_unet(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Config and weights of a diffusers folder, and the folder.

    Args:
        file: the U-Net's folder, a pipeline's folder with ``unet/``, or the weights file in either.

    Raises:
        ValueError: no ``config.json`` with one weights file beside it.
    """
    path = Path(file)
    for folder in (path.parent,) if path.is_file() else (path, path / "unet"):
        weights = [path] if path.is_file() else sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        if (folder / "config.json").is_file() and weights:
            plain = [found for found in weights if found.name == "diffusion_pytorch_model.safetensors"]
            settings = json.loads((folder / "config.json").read_text())
            return settings, read_state((plain or weights)[0]), folder
    raise ValueError(
        f"{file} is no folder of a diffusers U-Net: it needs config.json and diffusion_pytorch_model.safetensors"
    )


def empty_prompt(source: str | Path) -> Tensor:
    """The embedding of the empty prompt, (L, D) float32: the text in the network.

    All tokens that the text encoder has places for (77) count, those of the padding as well: so the networks were
    trained.

    Args:
        source: a file (``.safetensors``, ``.pt``, ``.pth``) with this one tensor; or the folder or ``org/name`` of a
            pipeline, with ``text_encoder`` and ``tokenizer`` in it.

    Raises:
        ValueError: neither, or a file with another content.
    """
    if Path(source).suffix in FILES:
        return _one_text(Path(source))
    where = {"repo": str(source), "subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    text = FrozenText(**where, length=FrozenText(**where).settings.max_position_embeddings)
    with torch.no_grad():
        return text.network()(input_ids=text.tokenize([""])[0]).last_hidden_state[0]


def _one_text(file: Path) -> Tensor:
    content = content_of(file)
    values = [content] if isinstance(content, Tensor) else list(content.values())
    texts = [v for v in values if isinstance(v, Tensor) and v.shape[:-2] in ((), (1,)) and v.dim() > 1]
    if len(values) != 1 or len(texts) != 1:
        found = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]
        raise ValueError(f"{file} must hold one tensor of shape (L, D) or (1, L, D), got {found}")
    return texts[0].float().flatten(0, -2)
