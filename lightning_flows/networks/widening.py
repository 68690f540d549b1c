r"""More channels for a network by repeating its weights: a joint state from a network of one of its parts.

With ``k`` copies of the channels, :math:`W_{in} \to [W_{in}, \dots, W_{in}]` and
:math:`(W_{out}, b_{out}) \to` the same rows ``k`` times. Fed with k copies of a picture, the first convolution then
gives k times what it gave; official SymmFlow leaves it so (activations double at the start), ``halve=True`` divides by
k, so that k equal pictures give the old prediction k times, exactly.

References:
    Symmetrical Flow Matching (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.networks.resize_rules import Rules, SizeMismatch, resized
from lightning_flows.networks.resizing import resize_input_channels, resize_output_channels
from lightning_flows.store import Recorded, build, load_into


def resize_repeated(tensor: Tensor, *, axis: int, old: int, new: int, divide: bool = False) -> Tensor:
    """``tensor`` with ``new / old`` copies of itself along an axis of ``old`` channels.

    Args:
        tensor: weight or bias of a convolution.
        axis: of the channels.
        old: channels of the weights.
        new: channels that are wanted, a multiple.
        divide: by the number of copies.

    Returns:
        ``tensor`` itself where nothing changes.

    Raises:
        ValueError: another number of channels than ``old`` says, or ``new`` that is no multiple of it.
    """
    if tensor.shape[axis] != old:
        raise SizeMismatch(f"its shape {tuple(tensor.shape)} does not have the {old} channels that the config says")
    if new % old:
        raise ValueError(f"{old} channels cannot be repeated to {new}: not a multiple")
    if new == old:
        return tensor
    wide = torch.cat([tensor] * (new // old), dim=axis)
    return wide.to(torch.promote_types(wide.dtype, torch.float32)) / (new // old) if divide else wide


def channel_rules(old: int, new: int) -> Rules:
    """Rules for the first and the last convolution (``stem``, ``out_conv``) of a U-Net; see `networks.resize_rules`.

    Twice as many channels, or another whole multiple, are copies. Others, and those of a network with one channel,
    follow the rules of the house: a channel that is new starts at zero (`networks.resizing`).

    Args:
        old: channels of the weights.
        new: channels that are wanted.
    """
    if new % old == 0 and old > 1:
        return repeat_rules(old, new)
    return {
        "stem.weight": partial(resize_input_channels, old=(old, 0), new=(new, 0)),
        "out_conv.weight": partial(resize_output_channels, old=(old, old), new=(new, new)),
        "out_conv.bias": partial(resize_output_channels, old=(old, old), new=(new, new)),
    }


def repeat_rules(old: int, new: int, *, halve: bool = False) -> Rules:
    """As `channel_rules`, with copies in any case.

    Args:
        old: channels of the weights.
        new: channels that are wanted, a multiple.
        halve: divide the first convolution by the number of copies; the official code does not.
    """
    repeated = partial(resize_repeated, old=old, new=new)
    return {
        "stem.weight": partial(repeated, axis=1, divide=halve),
        "out_conv.weight": partial(repeated, axis=0),
        "out_conv.bias": partial(repeated, axis=0),
    }


def widen(network: nn.Module, in_channels: int, *, halve: bool = False) -> Any:
    """A network like ``network`` with more channels in and out, whose weights are copies of its own.

    Args:
        network: a U-Net with ``in_channels`` among its arguments, ``stem`` first and ``out_conv`` last; its outputs are
            as many as its inputs.
        in_channels: channels of the new one, a multiple.
        halve: divide the first convolution by the number of copies.

    Returns:
        The new network, in the mode (train or eval) of the old one.

    Raises:
        ValueError: no multiple, or a network of another kind.
    """
    config = network.config if isinstance(network, Recorded) else {"init_args": {}}
    given = config["init_args"]
    old = given.get("in_channels")
    if given.get("patch_size", 1) > 1 or given.get("pooled_channels", 0):
        raise ValueError("network must have neither patches (patch_size > 1) nor pooled_channels")
    if old is None or network.state_dict()["out_conv.weight"].shape[0] != old:
        raise ValueError(f"network must be a U-Net with as many outputs as inputs, got {type(network).__name__}")
    if in_channels < old or in_channels % old:
        raise ValueError(f"in_channels must be a multiple of {old}, got {in_channels}")
    config["init_args"]["in_channels"] = in_channels
    wide = build(config, type(network))
    load_into(wide, resized(network.state_dict(), repeat_rules(old, in_channels, halve=halve))[0])
    return wide.train(network.training)
