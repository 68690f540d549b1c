"""`starflow`: latent flows of apple/ml-starflow for images, such as ``starflow_3B_t2i_256x256.pth``.

The names of the tensors are ours too; what is dropped are buffers that nothing reads: masks, the variance of the prior,
a table of angles. The weights are for research only, and whatever is made of them is as well: the agreement lies beside
the converted weights.

References:
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.flow import GaussianNoise, GaussianProduct, MaximumLikelihood
from lightning_flows.hub.convert.common import Format, shape_of
from lightning_flows.hub.convert.flows import depths, patch_of, sides_of, width_of, without
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import STARFlow
from lightning_flows.store import load_into

UNUSED = (r"blocks\.\d+\.attn_mask", "var", r"feat_rope\..*")
DENOISER = "learnable_self_denoiser."
PUBLISHED_TEXT = 128


def load_network(
    tensors: Mapping[str, Tensor],
    *,
    in_channels: int | None = None,
    input_size: int | Sequence[int] | None = None,
    head_size: int = 64,
    text_length: int | None = None,
    reverse_first: bool = True,
    scale: str = "softplus",
    soft_clip: float = 4.0,
    reference_length: float | None = None,
    theta: float = 10000.0,
    half_split: bool = False,
    text_dropout: float = 0.1,
) -> STARFlow:
    """The network with the weights of an official state dict; arguments say what shapes cannot.

    Args:
        tensors: official names to tensors.
        in_channels: of the latents; 4 by default.
        input_size: side or (height, width) of the latents; by default from the number of rows of ``var``.
        head_size: channels of an attention head.
        text_length: tokens of a text; 128 by default where the model reads texts.
        reverse_first: the first block scans backwards (L2R there); False for R2L.
        scale: ``"softplus"``, or ``"exp"``.
        soft_clip: bound of the outputs.
        reference_length: side to which positions are scaled; that of the latents by default.
        theta: base of the rotary frequencies.
        half_split: rotary pairs (k, k + d/2).
        text_dropout: rate of further training.

    Raises:
        ValueError: a video model; unknown, missing or misshapen tensors, or sizes to be given.
    """
    if any(name.startswith(DENOISER) for name in tensors):
        raise ValueError(f"the file has {DENOISER}*: it is a STARFlow-V model for video, and 'starflow' is for images")
    layers, kept = depths(tensors), without(tensors, *UNUSED)
    channels = shape_of(tensors, "blocks.0.proj_in.weight", 2)[1]
    patch, (height, width) = _sizes(tensors, channels, in_channels or 4, input_size)
    last = len(layers) - 1
    text = f"blocks.{last}.proj_txt.weight"
    network = STARFlow(
        (height, width),
        patch_size=patch,
        in_channels=in_channels or 4,
        hidden_size=width_of(tensors, 0),
        deep_hidden_size=width_of(tensors, last),
        depth=layers,
        head_size=head_size,
        text_length=(text_length or PUBLISHED_TEXT) if text in tensors else 0,
        text_size=shape_of(tensors, text, 2)[1] if text in tensors else None,
        text_dropout=text_dropout if text in tensors else 0.0,
        deep_condition_only=last == 0 or "blocks.0.proj_txt.weight" not in tensors,
        reverse_first=reverse_first,
        start_token="blocks.0.sos_embed" in tensors,
        scale=scale,  # type: ignore[arg-type]
        soft_clip=soft_clip,
        final_norm="blocks.0.final_norm.weight" in tensors,
        reference_length=reference_length,
        theta=theta,
        half_split=half_split,
        **_style(tensors, next(i for i, count in enumerate(layers) if count), head_size),
    )
    load_into(network, kept)
    return network


def _sizes(
    tensors: Mapping[str, Tensor], channels: int, in_channels: int, given: int | Sequence[int] | None
) -> tuple[int, tuple[int, int]]:
    """Side of a patch, and height and width of the latents."""
    patch = patch_of(channels, in_channels)
    if given is None and "var" not in tensors:
        raise ValueError("input_size is needed: the file has no 'var' that tells the number of tokens")
    if "var" not in tensors:
        side = (given, given) if isinstance(given, int) else tuple(given or ())
        return patch, (side[0], side[1])
    return patch, sides_of(shape_of(tensors, "var", 2)[0], patch, given)


def _style(tensors: Mapping[str, Tensor], block: int, head_size: int) -> dict[str, Any]:
    """The options of the layers that shapes and names tell."""
    layer = f"blocks.{block}.attn_blocks.0"
    width, gated = width_of(tensors, block), f"{layer}.mlp.gate_proj.weight" in tensors
    inner = shape_of(tensors, f"{layer}.attention.proj.weight", 2)[1]
    rows = shape_of(tensors, f"{layer}.attention.qkv.weight", 2)[0]
    mlp = shape_of(tensors, f"{layer}.mlp.{'gate_proj' if gated else 'main.0'}.weight", 2)[0]
    same, heads, kv_heads = inner == width, inner // head_size, (rows - inner) // 2 // head_size
    return {
        "num_heads": None if same else heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "mlp_ratio": mlp / width,
        "norm": "layer" if f"{layer}.attention.norm.bias" in tensors else "rms",
        "gated_mlp": gated,
        "bias": f"{layer}.attention.qkv.bias" in tensors,
        "qk_norm": f"{layer}.attention.query_norm.weight" in tensors,
        "post_norm": f"{layer}.attention.post_norm.weight" in tensors,
    }


def module(network: nn.Module) -> NormalizingFlow:
    """The published model around the network: latents of Stable Diffusion's autoencoder with noise of 0.3."""
    return NormalizingFlow(
        network=network,
        codec=AutoencoderKL(repo="stabilityai/sd-vae-ft-ema", scale=0.18215),
        objective=MaximumLikelihood(GaussianNoise(0.3), latent_penalty=1e-4),
        guidance=GaussianProduct(4.6),
    )


FORMAT = Format(
    name="starflow",
    source="STARFlow, github.com/apple/ml-starflow",
    licence="other",
    licence_note="Apple Machine Learning Research Model licence: for research only, revocable; what is derived from "
    "the weights is under the same terms, must be marked as changed and be passed on with the agreement.",
    load_network=load_network,
    module=module,
    options=(
        "in_channels", "input_size", "head_size", "text_length", "reverse_first", "scale", "soft_clip",
        "reference_length", "theta", "half_split", "text_dropout",
    ),
)  # fmt: skip
