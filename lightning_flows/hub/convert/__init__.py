"""Official checkpoints in, our folders out: one file for each format.

A converter runs on files that the user downloaded; the card that it writes names the licence of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_flows.hub.convert import dit, guided_diffusion, lfm_adm, lfm_dit, lfm_edm, sit, starflow, tarflow, vae
from lightning_flows.hub.convert.common import Format, card, read_state

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        lfm_dit.FORMAT,
        lfm_adm.FORMAT,
        lfm_edm.FORMAT,
        sit.FORMAT,
        dit.FORMAT,
        guided_diffusion.FORMAT,
        guided_diffusion.COSINE,
        tarflow.FORMAT,
        starflow.FORMAT,
        vae.FORMAT,
        vae.BACK,
    )
}


def convert(
    format: str,
    file: str | Path,
    out: str | Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    qkv_order: Literal["head", "kind"] | None = None,
    input_size: int | tuple[int, int] | None = None,
    label_dropout: float | None = None,
    scaling_factor: float | None = None,
) -> Path:
    """Convert an official checkpoint into a folder for `from_pretrained`.

    Args:
        format: ``lfm-dit``, ``lfm-adm``, ``lfm-edm``, ``sit``, ``dit``, ``guided-diffusion``,
            ``guided-diffusion-cosine``, ``diffusers-vae`` or ``to-diffusers-vae`` (see `vae`).
        file: the checkpoint, ``.pt``, ``.pth`` or ``.safetensors``; for autoencoders a folder.
        out: folder for ``config.json``, ``model.safetensors`` and ``README.md``; written whole or not at all.
        weights: the averaged or the raw weights, where the file holds both; the averaged ones by default.
        num_heads: attention heads, for sizes that were not published.
        head_channels: channels of an attention head, of U-Nets.
        qkv_order: how a U-Net of guided diffusion writes q, k and v, see `networks.ADMUNet`.
        input_size: side or (height, width) of what the network reads, where the file does not tell.
        label_dropout: of transformers: 0 if the label table has no null row (rate at which training dropped the
            label); of ``lfm-edm``: rate of further training.
        scaling_factor: of ``to-diffusers-vae``: what its users multiply latents by.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, a file that does not fit it, sizes that need an argument, or an argument that the
            format does not have.
    """
    form = _format(format)
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "head_channels": head_channels,
        "qkv_order": qkv_order,
        "input_size": input_size,
        "label_dropout": label_dropout,
        "scaling_factor": scaling_factor,
    }
    options = {name: value for name, value in options.items() if value is not None}
    try:
        if form.convert is not None:
            given = options if weights is None else {**options, "weights": weights}
            form.check_options(given)
            return form.convert(file, out, **given)
        network = form.network(read_state(file, weights), **options)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted as {format}: {error}") from error
    assert form.module is not None, f"format {form.name} says neither how to convert nor what module it is"
    return form.module(network).save_pretrained(out, {"README.md": card(form, file)})


def load_network(format: str, tensors: Mapping[str, Tensor], **options: Any) -> nn.Module:
    """The network of an official state dict, in eval mode, with noise at t = 0 and data at t = 1.

    Args:
        format: a name of `FORMATS`.
        tensors: official names to tensors.
        **options: what the tensors cannot say; see `convert`.

    Raises:
        ValueError: an unknown format, or tensors that do not fit it.
    """
    return _format(format).network(tensors, **options).eval()


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "convert", "load_network", "read_state"]
