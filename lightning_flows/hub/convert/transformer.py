"""From a state dict of the DiT lineage (DiT, SiT, LFM) to our `DiT`: sizes from shapes, values strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_flows.hub.convert.common import shape_of
from lightning_flows.networks import DIT_SIZES, DiT, position_table
from lightning_flows.store import load_into

OPTIONS = ("num_heads", "input_size", "label_dropout", "max_period")
HEADS = {size["hidden_size"]: size["num_heads"] for size in DIT_SIZES.values()}
TABLE = "pos_embed"


def load_dit(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    input_size: int | Sequence[int] | None = None,
    label_dropout: float | None = None,
    max_period: float = 10000.0,
    **fixed: Any,
) -> DiT:
    """A `DiT` with the weights of an official state dict, in their own time direction.

    Sizes come from the shapes of the tensors; arguments say what shapes cannot.

    Args:
        tensors: official names to float32 tensors, the position table included.
        num_heads: needed for widths other than those of the published sizes (384, 768, 1024, 1152).
        input_size: side or (height, width) of the latent; needed where the grid is not square.
        label_dropout: 0 for a table without null row. By default only a table of one row has none.
        max_period: of the time embedding.
        **fixed: further arguments of `DiT` that the format fixes.

    Raises:
        ValueError: unknown, missing or misshapen tensors, a foreign position table, or sizes to be given.
    """
    hidden, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    rows = shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0]
    values = shape_of(tensors, "final_layer.linear.weight", 2)[0]
    height, width = _input_size(shape_of(tensors, TABLE, 3)[1], patch, input_size)
    dropout = _label_dropout(rows, label_dropout)
    network = DiT(
        (height, width),
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=1 + max((int(found[1]) for found in map(_BLOCK.match, tensors) if found), default=-1),
        num_heads=_heads(hidden, num_heads),
        mlp_ratio=shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        num_classes=rows - (dropout > 0),
        label_dropout=dropout,
        learn_sigma=values == 2 * patch**2 * channels,
        frequency_size=shape_of(tensors, "t_embedder.mlp.0.weight", 2)[1],
        max_period=max_period,
        **fixed,
    )
    _check_table(tensors[TABLE], network, hidden)
    load_into(network, {name: value for name, value in tensors.items() if name != TABLE})
    return network


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _heads(hidden_size: int, num_heads: int | None) -> int:
    if num_heads is None and hidden_size not in HEADS:
        raise ValueError(f"num_heads is needed: hidden_size={hidden_size} is none of {sorted(HEADS)}")
    return HEADS[hidden_size] if num_heads is None else num_heads


def _input_size(tokens: int, patch: int, given: int | Sequence[int] | None) -> tuple[int, int]:
    if given is not None:
        height, width = (given, given) if isinstance(given, int) else given
        if (height // patch) * (width // patch) != tokens:
            raise ValueError(f"input_size={given} in patches of {patch} are not the {tokens} tokens of the file")
        return height, width
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"input_size is needed: {tokens} tokens make no square")
    return side * patch, side * patch


def _label_dropout(rows: int, given: float | None) -> float:
    if given is None:
        return 0.1 if rows > 1 else 0.0
    if given > 0 and rows < 2:
        raise ValueError(f"label_dropout={given} needs a null row, but the label table has one row only")
    return given


def _check_table(table: Tensor, network: DiT, hidden_size: int) -> None:
    ours = position_table(*network.grid, hidden_size)[None]
    if table.shape != ours.shape or not torch.allclose(table, ours, rtol=0, atol=2e-3):  # 16-bit files round
        raise ValueError(
            f"{TABLE!r}, shape {tuple(table.shape)}, is not the sine-cosine table of a {network.grid} grid; "
            "give input_size if the grid has another shape"
        )
