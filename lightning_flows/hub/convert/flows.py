"""What the converters of TARFlow and STARFlow files share: sizes that are read off the shapes of a state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_flows.hub.convert.common import shape_of

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LAYER = re.compile(r"blocks\.(\d+)\.attn_blocks\.(\d+)\.")


def without(tensors: Mapping[str, Tensor], *patterns: str) -> dict[str, Tensor]:
    """The tensors whose name fits none of the patterns: buffers that are computed, or that nothing reads."""
    return {name: value for name, value in tensors.items() if not any(re.fullmatch(p, name) for p in patterns)}


def depths(tensors: Mapping[str, Tensor]) -> list[int]:
    """Layers of every block.

    Raises:
        ValueError: no block.
    """
    blocks = 1 + max((int(found[1]) for found in map(_BLOCK.match, tensors) if found), default=-1)
    if not blocks:
        raise ValueError(
            f"the weights have no 'blocks.0.': not a state dict of this format (keys {sorted(tensors)[:5]})"
        )
    layers = [0] * blocks
    for found in map(_LAYER.match, tensors):
        if found:
            layers[int(found[1])] = max(layers[int(found[1])], int(found[2]) + 1)
    return layers


def patch_of(channels: int, in_channels: int) -> int:
    """Side of a patch whose values are ``channels`` numbers.

    Raises:
        ValueError: no square patch of so many channels.
    """
    side = math.isqrt(channels // in_channels)
    if side**2 * in_channels != channels:
        raise ValueError(f"in_channels={in_channels} does not fit: a token has {channels} values, no square patch")
    return side


def sides_of(tokens: int, patch: int, given: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the input of a model with so many tokens.

    Raises:
        ValueError: a grid that is not square and not given, or one that is given and does not fit.
    """
    if given is not None:
        height, width = (given, given) if isinstance(given, int) else given
        if (height // patch) * (width // patch) != tokens:
            raise ValueError(f"input_size={given} in patches of {patch} are not the {tokens} tokens of the file")
        return height, width
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"input_size is needed: {tokens} tokens make no square")
    return side * patch, side * patch


def width_of(tensors: Mapping[str, Tensor], block: int) -> int:
    """Width of a block's layers."""
    return shape_of(tensors, f"blocks.{block}.proj_in.weight", 2)[0]
