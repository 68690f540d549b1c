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

from lightning_flows.codecs import AutoencoderKL, FrozenText
from lightning_flows.flow import GaussianNoise, GaussianProduct, MaximumLikelihood
from lightning_flows.hub.convert.common import Format, shape_of
from lightning_flows.hub.convert.flows import depths, patch_of, sides_of, width_of, without
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import STARFlow
from lightning_flows.store import load_into

UNUSED = (r"blocks\.\d+\.attn_mask", "var", r"feat_rope\..*")
DENOISER = "learnable_self_denoiser."
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
ANGLES = "feat_rope.freqs_cos"  # nobody reads the angles, but a row has as many as a head has channels
HEAD_SIZE, TEXT_LENGTH, TEXT_SIZE = 64, 128, 2048  # of the published models
TEXT_ENCODER = "google/flan-t5-xl"


def load_network(
    tensors: Mapping[str, Tensor],
    *,
    in_channels: int | None = None,
    input_size: int | Sequence[int] | None = None,
    head_size: int | None = None,
    text_length: int | None = None,
    class_token: bool = False,
    reverse_first: bool = True,
    scale: str = "softplus",
    soft_clip: float = 4.0,
    reference_length: float | None = None,
    theta: float = 10000.0,
    half_split: bool = False,
    label_dropout: float = 0.1,
    text_dropout: float = 0.1,
) -> STARFlow:
    """The network with the weights of an official state dict; arguments say what shapes cannot.

    Args:
        tensors: official names to tensors.
        in_channels: of the latents; 4 by default.
        input_size: side or (height, width) of the latents; by default from the number of rows of ``var``.
        head_size: channels of an attention head; by default as the file's table of angles tells, else 64.
        text_length: tokens of a text; by default as the file's causal mask tells, else 128 where the model reads texts.
        class_token: the text is one token, a one-hot code of classes and "no class": a network that reads labels.
        reverse_first: the first block scans backwards (L2R there); False for R2L.
        scale: ``"softplus"``, or ``"exp"``.
        soft_clip: bound of the outputs.
        reference_length: side to which positions are scaled; that of the latents by default.
        theta: base of the rotary frequencies.
        half_split: rotary pairs (k, k + d/2).
        label_dropout: rate of further training with ``class_token``.
        text_dropout: rate of further training with texts.

    Raises:
        ValueError: a video model; unknown, missing or misshapen tensors, or sizes to be given.
    """
    if any(name.startswith(DENOISER) for name in tensors):
        raise ValueError(f"the file has {DENOISER}*: it is a STARFlow-V model for video, and 'starflow' is for images")
    layers, kept = depths(tensors), without(tensors, *UNUSED)
    channels = shape_of(tensors, "blocks.0.proj_in.weight", 2)[1]
    patch, (height, width) = _sizes(tensors, channels, in_channels or 4, input_size)
    last = len(layers) - 1
    heads = head_size or (shape_of(tensors, ANGLES, 2)[1] if ANGLES in tensors else HEAD_SIZE)
    tokens = (height // patch) * (width // patch)
    network = STARFlow(
        (height, width),
        patch_size=patch,
        in_channels=in_channels or 4,
        hidden_size=width_of(tensors, 0),
        deep_hidden_size=width_of(tensors, last),
        depth=layers,
        head_size=heads,
        **_condition(tensors, last, tokens, text_length, class_token, label_dropout, text_dropout),
        deep_condition_only=last == 0 or "blocks.0.proj_txt.weight" not in tensors,
        reverse_first=reverse_first,
        start_token="blocks.0.sos_embed" in tensors,
        scale=scale,  # type: ignore[arg-type]
        soft_clip=soft_clip,
        final_norm="blocks.0.final_norm.weight" in tensors,
        reference_length=reference_length,
        theta=theta,
        half_split=half_split,
        **_style(tensors, next(i for i, count in enumerate(layers) if count), heads),
    )
    load_into(network, kept)
    return network


def _condition(
    tensors: Mapping[str, Tensor],
    last: int,
    tokens: int,
    text_length: int | None,
    class_token: bool,
    label_dropout: float,
    text_dropout: float,
) -> dict[str, Any]:
    """What the network reads beside data: nothing, one class, or a text."""
    name = f"blocks.{last}.proj_txt.weight"
    if name not in tensors:
        if class_token or text_length:
            raise ValueError(f"the file has no {name!r}: its model reads neither classes nor texts")
        return {}
    size, length = shape_of(tensors, name, 2)[1], _length(tensors, f"blocks.{last}.attn_mask", tokens, text_length)
    if not class_token:
        return {"text_length": length or TEXT_LENGTH, "text_size": size, "text_dropout": text_dropout}
    if length not in (None, 1):
        raise ValueError(f"class_token: a class is one token, but the model reads texts of {length}")
    return {"num_classes": size - 1, "label_dropout": label_dropout}


def _length(tensors: Mapping[str, Tensor], mask: str, tokens: int, told: int | None) -> int | None:
    """Tokens of a text: told, or what a causal mask has beside the tokens of the data; None where neither says it."""
    read = shape_of(tensors, mask, 2)[0] - tokens if mask in tensors else None
    if told is not None and read is not None and told != read:
        raise ValueError(f"text_length={told}, but the file's masks are those of texts of {read}: leave it out")
    return read if told is None else told


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


def module(network: nn.Module, *, noise_std: float | None = None, text_encoder: str | None = None) -> NormalizingFlow:
    """The published model around the network: latents of Stable Diffusion's autoencoder, or pixels, with noise.

    Args:
        network: a `STARFlow`.
        noise_std: deviation of the noise on the training data; 0.3 by default.
        text_encoder: repository or folder of the text model whose tokens the network reads; that of the published
            model by default.

    Raises:
        ValueError: data or tokens that no published model has, or a text encoder for a network that reads no text.
    """
    assert isinstance(network, STARFlow)
    scale = 4.0 if network.num_classes else 4.6  # of the paper's images of classes, of the released script for texts
    return NormalizingFlow(
        network=network,
        codec=_codec(network),
        text=_text(network, text_encoder),
        objective=MaximumLikelihood(GaussianNoise(0.3 if noise_std is None else noise_std), latent_penalty=1e-4),
        guidance=GaussianProduct(scale) if network.streams else None,
    )


def _codec(network: STARFlow) -> AutoencoderKL | None:
    """Of 4 channels the published autoencoder, of 3 none: pixels."""
    channels = network.shape[0]
    if channels not in (3, 4):
        raise ValueError(
            f"in_channels={channels}: it is not known whose latents these are (4: {AUTOENCODER}, 3: pixels). In "
            "Python: NormalizingFlow(network=load_network('starflow', read_state(file), ...), codec=...)"
        )
    return AutoencoderKL(repo=AUTOENCODER, scale=0.18215) if channels == 4 else None


def _text(network: STARFlow, repo: str | None) -> FrozenText | None:
    if "tokens" not in network.streams:
        if repo is not None:
            raise ValueError(f"text_encoder={repo!r}, but the network reads no text")
        return None
    if repo is None and (network.text_length == 1 or network.text_size != TEXT_SIZE):
        raise ValueError(
            f"the network reads {network.text_length} tokens of {network.text_size} channels, not those of "
            f"{TEXT_ENCODER} ({TEXT_SIZE}): give text_encoder, or class_token=True where the token is a class"
        )
    return FrozenText(repo or TEXT_ENCODER, length=network.text_length)


FORMAT = Format(
    name="starflow",
    family="normalizing-flow",
    source="STARFlow, github.com/apple/ml-starflow",
    licence="other",
    licence_note="Apple Machine Learning Research Model licence: for research only, not for commercial use, revocable; "
    "what is derived from the weights is under the same terms, must be marked as changed and be passed on with the "
    "agreement.",
    load_network=load_network,
    module=module,
    options=(
        "in_channels", "input_size", "head_size", "text_length", "class_token", "reverse_first", "scale", "soft_clip",
        "reference_length", "theta", "half_split", "label_dropout", "text_dropout",
    ),
    module_options=("noise_std", "text_encoder"),
    agreement="""What is known of the licence of the official weights (Apple Machine Learning Research Model licence):

- they may be used for research only, not commercially, and the permission can be withdrawn;
- whatever is derived from them (finetuned, changed in its architecture, trained again from them, converted) is under
  the same terms;
- it must be marked as modified, and be passed on with the text of the agreement and its line of attribution only.""",
)  # fmt: skip
