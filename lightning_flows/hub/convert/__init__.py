"""Official checkpoints in, our folders out: one file for each format.

A converter runs on files that the user downloaded; the card that it writes names the licence of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_flows.hub.convert import dit, lfm_dit, sit
from lightning_flows.hub.convert.common import Format, card, read_state

FORMATS: dict[str, Format] = {form.name: form for form in (lfm_dit.FORMAT, sit.FORMAT, dit.FORMAT)}


def convert(
    format: str,
    file: str | Path,
    out: str | Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    num_heads: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    label_dropout: float | None = None,
) -> Path:
    """Convert an official checkpoint into a folder for `from_pretrained`.

    Args:
        format: ``lfm-dit``, ``sit`` or ``dit``.
        file: the checkpoint, ``.pt``, ``.pth`` or ``.safetensors``.
        out: folder for ``config.json``, ``model.safetensors`` and ``README.md``; written whole or not at all.
        weights: the averaged or the raw weights, where the file holds both; the averaged ones by default.
        num_heads: attention heads, for sizes that were not published.
        input_size: side or (height, width) of the latent, where the position table is not square.
        label_dropout: 0 if the label table has no null row (rate at which training dropped the label).

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, a file that does not fit it, or sizes that need an argument.
    """
    form = _format(format)
    sizes = {"num_heads": num_heads, "input_size": input_size, "label_dropout": label_dropout}
    given = {name: value for name, value in sizes.items() if value is not None}
    try:
        network = form.load_network(read_state(file, weights), **given)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted as {format}: {error}") from error
    return form.module(network).save_pretrained(out, {"README.md": card(form, file)})


def load_network(format: str, tensors: Mapping[str, Tensor], **sizes: Any) -> nn.Module:
    """The network of an official state dict, in eval mode, with noise at t = 0 and data at t = 1.

    Args:
        format: a name of `FORMATS`.
        tensors: official names to tensors.
        **sizes: what the shapes of the tensors cannot say; see `transformer.load_dit`.

    Raises:
        ValueError: an unknown format, or tensors that do not fit it.
    """
    return _format(format).load_network(tensors, **sizes).eval()


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "convert", "load_network", "read_state"]
