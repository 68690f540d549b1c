"""Labels and texts on their way into an autoregressive flow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition


def sides(input_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Height and width of an input.

    Raises:
        ValueError: not one positive number or two, or a patch that does not divide them.
    """
    pair = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"input_size must be one positive number or (height, width), got {input_size!r}")
    if patch_size < 1 or pair[0] % patch_size or pair[1] % patch_size:
        raise ValueError(f"patch_size must divide input_size={pair}, got {patch_size}")
    return pair[0], pair[1]


def check_label_dropout(num_classes: int | None, label_dropout: float) -> None:
    """Refuse numbers of classes and rates that mean nothing.

    Raises:
        ValueError: naming the argument.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be positive (or None: no labels), got {num_classes}")
    check_rate("label_dropout", label_dropout)
    if num_classes is None and label_dropout:
        raise ValueError(f"label_dropout must be 0 without num_classes, got {label_dropout}")


def check_rate(name: str, rate: float) -> None:
    """Refuse a rate outside [0, 1).

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")


def class_rows(condition: Condition | None, batch_size: int, num_classes: int) -> Tensor:
    """Class of each sample, -1 where it is absent, int64, shape (B,).

    Raises:
        ValueError: labels of another batch size, or outside [0, num_classes) (checked where it costs no
            synchronisation with a device).
    """
    label = None if condition is None else condition.label
    if condition is None or label is None:
        return torch.full((batch_size,), -1)
    if label.shape != (batch_size,):
        raise ValueError(f"condition.label must have shape ({batch_size},), got {tuple(label.shape)}")
    here = condition.presence("label")
    rows = torch.where(here, label, -1)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        known = torch.where(here, label, 0)
        if bool(((known < 0) | (known >= num_classes)).any()):
            raise ValueError(f"condition.label must lie in [0, {num_classes}), got {label.tolist()}")
    return rows


def text_of(condition: Condition | None, batch_size: int, length: int, size: int, device: torch.device) -> Tensor:
    """Tokens of the text of each sample, zeros where it is absent or padding, (B, length, size), on ``device``.

    Raises:
        ValueError: a longer text, or one of other channels.
    """
    tokens = None if condition is None else condition.tokens
    if condition is None or tokens is None:
        return torch.zeros(batch_size, length, size, device=device)
    values = tokens.values
    if values.shape[0] != batch_size or values.shape[1] > length or values.shape[2] != size:
        raise ValueError(
            f"condition.tokens must have shape ({batch_size}, at most {length}, {size}), got {tuple(values.shape)}"
        )
    seen = tokens.mask.bool() & condition.presence("tokens").to(tokens.mask.device)[:, None]  # (B, L)
    values = torch.where(seen[..., None], values, 0)
    return torch.nn.functional.pad(values, (0, 0, 0, length - values.shape[1])).to(device)


def drop_streams(
    condition: Condition | None, rates: Mapping[str, float], generator: torch.Generator
) -> Condition | None:
    """``condition`` with each stream absent at its rate, chosen by ``generator`` (CPU)."""
    if condition is None:
        return None
    for stream, rate in rates.items():
        value = getattr(condition, stream)
        if value is not None and rate:
            size = condition.batch_size or 0
            lost = torch.rand(size, generator=generator) < rate
            device = (value.values if stream == "tokens" else value).device
            condition = condition.absent(stream, where=lost.to(device))
    return condition
