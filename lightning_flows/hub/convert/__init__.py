"""Official checkpoints in, our folders out: one file for each format.

A converter runs on files that the user downloaded; the card that it writes names the licence of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_flows.hub.convert import (
    diffusers_unet,
    dit,
    guided_diffusion,
    lfm_adm,
    lfm_dit,
    lfm_edm,
    sit,
    starflow,
    symmflow,
    tarflow,
    vae,
)
from lightning_flows.hub.convert.common import Format, card, read_state
from lightning_flows.hub.licences import licence_files

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
        symmflow.FORMAT,
        diffusers_unet.FORMAT,
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
    in_channels: int | None = None,
    head_size: int | None = None,
    text_length: int | None = None,
    text_encoder: str | None = None,
    class_token: bool | None = None,
    noise_std: float | None = None,
    semantic: str | None = None,
    num_classes: int | None = None,
    beta: float | None = None,
    context: str | Path | None = None,
    autoencoder: str | None = None,
    network: Mapping[str, Any] | None = None,
) -> Path:
    """Convert an official checkpoint into a folder for `from_pretrained`.

    Args:
        format: ``lfm-dit``, ``lfm-adm``, ``lfm-edm``, ``sit``, ``dit``, ``guided-diffusion``,
            ``guided-diffusion-cosine``, ``tarflow``, ``starflow``, ``symmflow``, ``diffusers-unet``, ``diffusers-vae``
            or ``to-diffusers-vae`` (see `vae`).
        file: the checkpoint, ``.pt``, ``.pth`` or ``.safetensors``, or the folder that ``torch.distributed.checkpoint``
            wrote; for autoencoders and ``diffusers-unet`` a folder.
        out: folder for ``config.json``, ``model.safetensors`` and ``README.md``; written whole or not at all. Of
            ``starflow`` also for the licence files beside the original, without which it cannot be passed on.
        weights: the averaged or the raw weights, where the file holds both; the averaged ones by default.
        num_heads: attention heads, for sizes that were not published.
        head_channels: channels of an attention head, of U-Nets.
        qkv_order: how a U-Net of guided diffusion writes q, k and v, see `networks.ADMUNet`.
        input_size: side or (height, width) of what the network reads, where the file does not tell.
        label_dropout: of transformers: 0 if the label table has no null row (rate at which training dropped the
            label); of ``lfm-edm``: rate of further training.
        scaling_factor: of ``to-diffusers-vae``: what its users multiply latents by.
        in_channels: of ``tarflow`` and ``starflow``: channels of the data, where they are not the published ones.
        head_size: of the same: channels of an attention head, likewise.
        text_length: of ``starflow``: tokens of a text, where the file does not tell.
        text_encoder: of ``starflow``: repository or folder of the text model, where it is not the published one.
        class_token: of ``starflow``: the text is one token, a class.
        noise_std: of ``tarflow`` and ``starflow``: deviation of the noise on the training data, which is taken out of
            samples; that of the published model with such data by default.
        semantic: of ``symmflow``: ``celebamask-hq``, ``coco-stuff`` or ``class``.
        num_classes: of ``symmflow``: classes of the plane of ``class``.
        beta: of ``symmflow``: width of the dequantisation; that of the recipe by default.
        context: of ``symmflow`` from Stable Diffusion and of ``diffusers-unet``: the embedding of the empty prompt, see
            `stable_diffusion.empty_prompt`.
        autoencoder: of ``symmflow`` on latents: repository or folder of the image autoencoder.
        network: of ``starflow``: further arguments of the network, such as ``{"reverse_first": False}``; see
            `starflow.load_network`.

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
        "in_channels": in_channels,
        "head_size": head_size,
        "text_length": text_length,
        "text_encoder": text_encoder,
        "class_token": class_token,
        "noise_std": noise_std,
        "semantic": semantic,
        "num_classes": num_classes,
        "beta": beta,
        "context": context,
        "autoencoder": autoencoder,
    }
    options = {name: value for name, value in options.items() if value is not None}
    try:
        if twice := sorted(set(options) & set(network or {})):
            raise ValueError(f"{', '.join(twice)} is given twice, by itself and in network")
        options |= network or {}
        if form.convert is not None:
            given = options if weights is None else {**options, "weights": weights}
            form.check_options(given)
            return form.convert(file, out, **given)
        model = _model(form, read_state(file, weights), options)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted as {format}: {error}") from error
    licences = licence_files(form, file)
    return model.save_pretrained(out, {"README.md": card(form, file, sorted(licences)), **licences})


def _model(form: Format, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    form.check_options(options)
    assert form.module is not None, f"format {form.name} says neither how to convert nor what module it is"
    about = {name: value for name, value in options.items() if name in form.module_options}
    network = form.network(tensors, **{name: value for name, value in options.items() if name not in about})
    return form.module(network, **about)


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
