"""From a state dict of the guided-diffusion U-Net to our `ADMUNet`: everything that keys and shapes can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_flows.hub.convert.common import factor, shape_of
from lightning_flows.hub.convert.unet import adm_modules, load_named
from lightning_flows.networks import ADMUNet

OUTPUT = ("out.2.weight", "out.2.bias")
_INPUT = re.compile(r"input_blocks\.(\d+)\.")
_UP = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")


def load_adm(
    tensors: Mapping[str, Tensor],
    *,
    channels: int | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    qkv_order: Literal["head", "kind"] = "head",
    input_size: int | Sequence[int] | None = None,
    coarsest: int,
    time_scale: float = 1.0,
) -> ADMUNet:
    """An `ADMUNet` with the weights of an official state dict, in their own time direction.

    Args:
        tensors: official names to float32 tensors.
        channels: channels C of a sample; by default those of the output. Further inputs are those of a map, further
            outputs (learned variances) are left out.
        num_heads: attention heads; this or the next.
        head_channels: channels of a head.
        qkv_order: ``"kind"`` for files written with the "new attention order".
        input_size: side or (height, width); by default ``coarsest`` at the last level.
        coarsest: side of the map of the last level in the published networks.
        time_scale: of the time embedding.

    Raises:
        ValueError: unknown, missing or misshapen tensors, or channels that do not fit the file.
    """
    hidden = shape_of(tensors, "time_embed.0.weight", 2)[1]
    inputs = shape_of(tensors, "input_blocks.0.0.weight", 4)[1]
    outputs = shape_of(tensors, OUTPUT[0], 4)[0]
    channels = outputs if channels is None else channels
    if not channels <= inputs or outputs not in (channels, 2 * channels):
        raise ValueError(f"{inputs} inputs and {outputs} outputs do not fit samples of {channels} channels")
    levels = _levels(tensors, hidden)
    network = ADMUNet(
        input_size=_size(input_size, coarsest << (len(levels["channel_mult"]) - 1)),
        in_channels=channels,
        hidden_size=hidden,
        **levels,
        **_heads(num_heads, head_channels),
        qkv_order=qkv_order,
        num_classes=shape_of(tensors, "label_emb.weight", 2)[0] if "label_emb.weight" in tensors else None,
        spatial_channels=inputs - channels,
        time_scale=time_scale,
    )
    first = {name: tensors[name][:channels] for name in OUTPUT if name in tensors}
    load_named(network, {**tensors, **first}, adm_modules(network))
    return network


def _levels(tensors: Mapping[str, Tensor], hidden: int) -> dict[str, Any]:
    """Levels, blocks, attention and kind of the blocks."""
    blocks, count = _blocks(tensors)
    starts = range(1, count, blocks + 1)  # place of the first block of each level
    widths = [shape_of(tensors, f"input_blocks.{place}.0.out_layers.3.weight", 4)[0] for place in starts]
    change = f"input_blocks.{blocks + 1}.0"
    return {
        "channel_mult": tuple(factor(width, hidden) for width in widths),
        "num_blocks": blocks,
        "attention_factors": tuple(2**i for i, p in enumerate(starts) if f"input_blocks.{p}.1.qkv.weight" in tensors),
        "scale_shift": shape_of(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        "resblock_updown": len(widths) > 1 and f"{change}.in_layers.0.weight" in tensors,
        "conv_resample": len(widths) == 1 or f"{change}.op.weight" in tensors,
    }


def _blocks(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Blocks of a level, and places of the encoder: ``levels (blocks + 1)``.

    The first step up ends the first level of the decoder; where it has no weights, the step down of the encoder
    has none either and leaves a gap.
    """
    places = {int(found[1]) for found in map(_INPUT.match, tensors) if found}
    ups = [int(found[1]) for found in map(_UP.match, tensors) if found]
    count = max(places) + 1
    gap = min(set(range(count)) - places, default=count)
    blocks = min(ups, default=gap - 1)
    if blocks < 1 or count % (blocks + 1):
        raise ValueError(f"{count} input blocks do not make levels of {blocks} residual blocks")
    return blocks, count


def _heads(num_heads: int | None, head_channels: int | None) -> dict[str, int]:
    given = {"num_heads": num_heads, "head_channels": head_channels}
    return {name: value for name, value in given.items() if value is not None}


def _size(given: int | Sequence[int] | None, published: int) -> int | tuple[int, int]:
    if given is None or isinstance(given, int):
        return published if given is None else given
    height, width = given
    return height, width
