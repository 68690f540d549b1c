"""`symmflow`: official SymmFlow files (pickled state dicts of averaged weights) into `modules.SymmFlow`.

Three networks, told apart by their keys and shapes:

- the U-Net of guided diffusion on pixels and a palette (`SymmFM`) or a plane of the class (`SymmFMClass`);
- the same on the latents of image and painted mask, 4 channels each (`SymmFM` with ``--latent``);
- the U-Net of Stable Diffusion 2.1 on such latents (`SymmFMSD`), with keys ``unet.*``. Its text, the embedding of the
  empty prompt, is not in the file: the authors keep it beside it (``sd_emptyembed.pt``), or a pipeline computes it.

Images come first on the channels, the time goes in raw, and it runs as ours does: noise at 0, images at 1. A file says
neither its palette nor its classes, nor its heads and size: heads are 64 channels wide by default, the size is that of
the recipes, 32 pixels for four levels, or the 64 x 64 latents of Stable Diffusion.

References:
    Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based Generative
    Models (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import AutoencoderKL, ClassPlane, Codec, RGBPalette, SemanticCodec, ThroughAutoencoder
from lightning_flows.flow import Euler, SymmetricMatching
from lightning_flows.hub.convert.adm import load_adm
from lightning_flows.hub.convert.common import Format, card, read_state, shape_of
from lightning_flows.hub.convert.diffusers_unet import SCALE
from lightning_flows.hub.convert.stable_diffusion import empty_prompt, unet_modules
from lightning_flows.hub.convert.unet import load_named
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import ADMUNet, StableDiffusionUNet

PREFIX = "unet."
HEAD_CHANNELS = 64
LATENT_CHANNELS = 8  # of image and mask behind the autoencoder, both 4
AUTOENCODER = "stabilityai/sd-vae-ft-mse"
BETAS = {"celebamask-hq": 10.0, "coco-stuff": 6.0, "class": 4.0}  # of the published recipes
SD_LICENCE = "openrail++"
_MIDDLE = "mid_block.attentions.0.transformer_blocks"
_RESNET = re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.")
_LAYER = re.compile(r"down_blocks\.(\d+)\.attentions\.0\.transformer_blocks\.(\d+)\.")

# ------------------------------------------------------------------ networks


def load_network(tensors: Mapping[str, Tensor], *, context: Tensor | None = None, **sizes: Any) -> nn.Module:
    """The network of an official state dict, with the weights.

    Args:
        tensors: official names to float32 tensors.
        context: of the variant of Stable Diffusion: embedding of the empty prompt, (L, D).
        **sizes: ``num_heads``, ``head_channels``, ``input_size`` and, of the others, ``qkv_order``; see `adm.load_adm`.

    Raises:
        ValueError: unknown, missing or misshapen tensors, an option that the variant does not have, or no text.
    """
    if not is_stable_diffusion(tensors):
        if context is not None:
            raise ValueError("context is for the variant of Stable Diffusion (keys unet.*), this file is another")
        return _load_adm(tensors, **sizes)
    if context is None:
        raise ValueError(
            "the text of the network is not in the file: give context, a file with the embedding of the empty prompt "
            "(such as sd_emptyembed.pt of the authors), or the folder of the pipeline of Stable Diffusion"
        )
    return _load_stable_diffusion(tensors, context, **sizes)


def is_stable_diffusion(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of `SymmFMSD`."""
    return all(name.startswith(PREFIX) for name in tensors)


def _load_adm(tensors: Mapping[str, Tensor], **sizes: Any) -> ADMUNet:
    if "num_heads" not in sizes and "head_channels" not in sizes:
        sizes["head_channels"] = HEAD_CHANNELS
    return load_adm(tensors, coarsest=4, time_scale=1.0, **sizes)


def _load_stable_diffusion(
    tensors: Mapping[str, Tensor],
    context: Tensor,
    *,
    num_heads: int | None = None,
    head_channels: int = HEAD_CHANNELS,
    input_size: int | tuple[int, int] = 64,
    qkv_order: str | None = None,
) -> StableDiffusionUNet:
    if qkv_order is not None:
        raise ValueError(f"qkv_order is for the U-Net of guided diffusion, got {qkv_order!r} for Stable Diffusion")
    plain = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    sizes = sizes_of(plain)
    heads = tuple(num_heads or max(1, width // head_channels) for width in sizes["channels"])
    network = StableDiffusionUNet(
        **sizes, num_heads=heads, input_size=input_size, context_length=len(context), time_scale=1.0
    )
    load_named(network, {**plain, "context": context}, unet_modules(network))
    return network


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `StableDiffusionUNet` that the names and shapes of a `UNet2DConditionModel` tell.

    Raises:
        ValueError: tensors of something else.
    """
    inputs, outputs = shape_of(tensors, "conv_in.weight", 4)[1], shape_of(tensors, "conv_out.weight", 4)[0]
    if inputs != outputs:
        raise ValueError(f"{inputs} inputs and {outputs} outputs do not fit a velocity")
    places = [(int(found[1]), int(found[2])) for found in map(_RESNET.match, tensors) if found]
    layers = [(int(found[1]), int(found[2])) for found in map(_LAYER.match, tensors) if found]
    levels = range(1 + max((level for level, _ in places), default=-1))
    middle = sum(f"{_MIDDLE}.{k}.norm1.weight" in tensors for k in range(len(tensors)))
    depths = [1 + max((k for level, k in layers if level == i), default=middle - 1) for i in levels]
    return {
        "in_channels": inputs,
        "channels": tuple(shape_of(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in levels),
        "num_blocks": tuple(1 + max(j for level, j in places if level == i) for i in levels),
        "attention": tuple(any(level == i for level, _ in layers) for i in levels),
        "depth": tuple(depths),
        "context_dim": shape_of(tensors, f"{_MIDDLE}.0.attn2.to_k.weight", 2)[1],
    }


# ------------------------------------------------------------------ the model


def module(
    network: nn.Module,
    *,
    semantic: str | None = None,
    num_classes: int | None = None,
    beta: float | None = None,
    autoencoder: str = AUTOENCODER,
) -> SymmFlow:
    """The published model around a network.

    Args:
        network: with images first on the channels.
        semantic: ``"celebamask-hq"``, ``"coco-stuff"``, or ``"class"`` for a plane of the class.
        num_classes: of the plane; given alone it means ``semantic="class"``.
        beta: width of the dequantisation, see `codecs.RGBPalette` and `codecs.ClassPlane`; that of the recipe by
            default.
        autoencoder: repository or folder of the image autoencoder, where 8 channels are the latents of two pictures.

    Raises:
        ValueError: unknown semantics, or a class plane without ``num_classes``.
    """
    kind = semantic or ("class" if num_classes is not None else None)
    if kind not in BETAS:
        raise ValueError(f"semantic must be one of {sorted(BETAS)}, got {semantic!r}: the file does not say it")
    if (kind == "class") != (num_classes is not None):
        raise ValueError(f"num_classes goes with semantic='class', got {num_classes} with {semantic!r}")
    beta = BETAS[kind] if beta is None else beta
    latent = network.shape[0] == LATENT_CHANNELS and kind != "class"  # type: ignore[index]
    codec: Codec | None = AutoencoderKL(autoencoder, scale=SCALE) if latent else None
    code: SemanticCodec = RGBPalette(kind, beta=beta) if num_classes is None else ClassPlane(num_classes, beta=beta)
    return SymmFlow(
        network=network,
        semantic=ThroughAutoencoder(code, AutoencoderKL(autoencoder, scale=SCALE), channels=LATENT_CHANNELS // 2)
        if latent
        else code,
        codec=codec,
        objective=SymmetricMatching(image_weight=0.9 if kind == "class" else 0.7),
        solver=Euler(),
        steps=25,
        read_steps=1 if kind == "class" else 25,
    )


def from_official(file: str | Path, out: str | Path, *, context: str | Path | None = None, **options: Any) -> Path:
    """Turn an official file into a folder for `from_pretrained`.

    Args:
        file: the checkpoint.
        out: folder to write.
        context: of the variant of Stable Diffusion, see `stable_diffusion.empty_prompt`.
        **options: see `load_network` and `module`.

    Raises:
        ValueError: a file that does not fit, or an option that is missing.
    """
    tensors = read_state(file)
    about = {name: options.pop(name) for name in FORMAT.module_options if name in options}
    text = None if context is None else empty_prompt(context)
    model = module(load_network(tensors, context=text, **options).eval(), **about)
    licence = {"licence": SD_LICENCE, "licence_note": SD_NOTE} if is_stable_diffusion(tensors) else {}
    return model.save_pretrained(out, {"README.md": card(replace(FORMAT, **licence), file, config=model.config)})


FORMAT = Format(
    name="symmflow",
    source="SymmFlow, github.com/caetas/SymmetricFlow",
    licence="mit",
    licence_note="MIT is what the authors' README states; it names a licence file that was not found.",
    load_network=load_network,
    options=("num_heads", "head_channels", "qkv_order", "input_size", "context"),
    convert=from_official,
    module_options=("semantic", "num_classes", "beta", "autoencoder"),
    family="symmflow",
)
SD_NOTE = (
    "They began as Stable Diffusion 2.1, whose CreativeML OpenRAIL++-M licence and its rules of use follow them. "
    "The authors' own changes are MIT, as their README states; it names a licence file that was not found."
)
