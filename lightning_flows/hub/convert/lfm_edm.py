"""`lfm-edm`: U-Nets of Latent Flow Matching in the EDM flavour (FFHQ, Bedroom, ImageNet, CelebA-HQ 1024).

Their time runs from data (0) to noise (1), so the network is wrapped in `ReversedTime`; the time enters the sinusoid
unscaled. The size of the latent is read from the names of the tensors. An absent label is the zero vector, which
their ImageNet run never saw in training: guidance works with it, as in their own test script.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_flows.hub.convert import lfm
from lightning_flows.hub.convert.common import Format, factor, shape_of
from lightning_flows.hub.convert.unet import EDM_BLOCK, edm_modules, load_named
from lightning_flows.networks import EDMUNet, ReversedTime, UNetBlock

FILTER = "resample_filter"
_PLACE = re.compile(r"enc\.(\d+)x\1_(?:conv|block(\d+))\.")


def load_network(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    head_channels: int = 64,
    label_dropout: float = 0.0,
) -> ReversedTime:
    """The network in our direction of time.

    Args:
        tensors: official names to float32 tensors.
        num_heads: attention heads of every block, instead of heads of ``head_channels`` channels.
        head_channels: channels of a head; blocks with fewer have no attention.
        label_dropout: rate at which further training drops the label.

    Raises:
        ValueError: unknown, missing or misshapen tensors, or another filter than 2x2 means.
    """
    tensors = _without_filters(tensors)
    embedding, hidden = shape_of(tensors, "map_layer0.weight", 2)
    levels = _levels(tensors, hidden)
    _check_heads(tensors, num_heads, head_channels)
    outputs = shape_of(tensors, "out_conv.weight", 4)[0]
    side = levels["input_size"]
    inputs = shape_of(tensors, f"enc.{side}x{side}_conv.weight", 4)[1]
    if outputs > inputs:
        raise ValueError(f"{inputs} inputs do not fit {outputs} outputs")
    classes = shape_of(tensors, "map_label.weight", 2)[1] if "map_label.weight" in tensors else None
    network = EDMUNet(
        in_channels=outputs,
        hidden_size=hidden,
        **levels,
        num_heads=num_heads,
        head_channels=head_channels,
        embedding_mult=int(factor(embedding, hidden)),
        num_classes=classes,
        label_dropout=label_dropout if classes else 0.0,
        spatial_channels=inputs - outputs,
    )
    columns = {"map_label.weight": tensors["map_label.weight"].t()} if classes else {}
    load_named(network, {**tensors, **columns}, edm_modules(network))
    return ReversedTime(network)


def load_block(block: UNetBlock, tensors: Mapping[str, Tensor]) -> None:
    """Fill one residual block.

    Raises:
        ValueError: unknown, missing or misshapen tensors, or another filter than 2x2 means.
    """
    load_named(block, _without_filters(tensors), EDM_BLOCK)


def _levels(tensors: Mapping[str, Tensor], hidden: int) -> dict[str, Any]:
    found = [match for match in map(_PLACE.match, tensors) if match]
    sizes = sorted({int(match[1]) for match in found}, reverse=True)
    if not sizes:
        raise ValueError("the weights have no 'enc.RxR_conv.weight': not a state dict of this format")
    if sizes != [sizes[0] >> i for i in range(len(sizes))]:
        raise ValueError(f"the maps of the encoder are {sizes} wide, each should be half of the one before")
    blocks = len({match[2] for match in found if int(match[1]) == sizes[0] and match[2]})
    widths = [shape_of(tensors, f"enc.{size}x{size}_block0.conv1.weight", 4)[0] for size in sizes]
    return {
        "input_size": sizes[0],
        "channel_mult": tuple(factor(width, hidden) for width in widths),
        "num_blocks": blocks,
        "attention_sizes": tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in tensors),
    }


def _check_heads(tensors: Mapping[str, Tensor], num_heads: int | None, head_channels: int) -> None:
    """Where the file has attention, our rule must give heads."""
    widths = [value.shape[0] for name, value in tensors.items() if name.endswith(".proj.weight")]
    if num_heads is None and widths and min(widths) < head_channels:
        raise ValueError(
            f"the file has attention over {min(widths)} channels, which head_channels={head_channels} does not allow: "
            "give num_heads or head_channels"
        )


def _without_filters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the buffers of the fixed filters, which must be those of 2x2 means."""
    for name, value in tensors.items():
        if name.endswith(FILTER) and (value.shape[-2:] != (2, 2) or not (value == 0.25).all()):
            raise ValueError(f"{name} is no filter of 2x2 means: {value.flatten().tolist()}")
    return {name: value for name, value in tensors.items() if not name.endswith(FILTER)}


FORMAT = Format(
    name="lfm-edm",
    source=lfm.SOURCE,
    licence="other",
    licence_note=lfm.LICENCE_NOTE,
    load_network=load_network,
    module=lfm.module,
    options=("num_heads", "head_channels", "label_dropout"),
)
