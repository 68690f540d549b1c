"""`tarflow`: pixel flows of apple/ml-tarflow, and third-party ones with the same names.

The names of the tensors are ours too; what is dropped are causal masks, and the variance of the prior where the model
has scales (it then is 1 everywhere).

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_flows.flow import Dequantization, GaussianNoise, LogLinear, MaximumLikelihood
from lightning_flows.hub.convert.common import Format, shape_of
from lightning_flows.hub.convert.flows import depths, patch_of, sides_of, width_of, without
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import TARFlow
from lightning_flows.store import load_into

HEAD_SIZE = 64  # of all published models
NOISE = {(256, 3): 0.07, (128, 1000): 0.15, (64, 1000): 0.05, (64, None): 0.05}  # of them, by side and classes


def load_network(
    tensors: Mapping[str, Tensor],
    *,
    in_channels: int | None = None,
    input_size: int | Sequence[int] | None = None,
    head_size: int = HEAD_SIZE,
    label_dropout: float | None = None,
) -> TARFlow:
    """The network with the weights of an official state dict.

    Args:
        tensors: official names to tensors.
        in_channels: of the images; 3 by default.
        input_size: side or (height, width), where the tokens make no square.
        head_size: channels of an attention head.
        label_dropout: rate of further training; 0.1 by default, that of the published runs.

    Raises:
        ValueError: unknown, missing or misshapen tensors, or sizes to be given.
    """
    layers, width = depths(tensors), width_of(tensors, 0)
    tokens = shape_of(tensors, "blocks.0.pos_embed", 2)[0]
    channels = shape_of(tensors, "blocks.0.proj_in.weight", 2)[1]
    patch = patch_of(channels, in_channels or 3)
    table = "blocks.0.class_embed"
    classes = shape_of(tensors, table, 3)[0] if table in tensors else None
    first = next(i for i, count in enumerate(layers) if count)
    volume_preserving = shape_of(tensors, "blocks.0.proj_out.weight", 2)[0] == channels
    network = TARFlow(
        sides_of(tokens, patch, input_size),
        patch_size=patch,
        in_channels=in_channels or 3,
        hidden_size=width,
        num_blocks=len(layers),
        depth=layers,
        head_size=head_size,
        mlp_ratio=shape_of(tensors, f"blocks.{first}.attn_blocks.0.mlp.main.0.weight", 2)[0] / width,
        num_classes=classes,
        label_dropout=0.0 if classes is None else 0.1 if label_dropout is None else label_dropout,
        volume_preserving=volume_preserving,
    )
    kept = without(tensors, r"blocks\.\d+\.attn_mask", "var")
    if volume_preserving:
        kept["prior_variance"] = tensors["var"] if "var" in tensors else torch.ones(tokens, channels)
    load_into(network, kept)
    return network


def module(network: nn.Module, *, noise_std: float | None = None) -> NormalizingFlow:
    """The published model around the network: pixels with Gaussian noise, removed by one step after sampling.

    Args:
        network: a `TARFlow`.
        noise_std: deviation of the noise on the training data, 0 for uniform noise (the model of the published bits per
            dimension); that of the published model with such images and classes by default.

    Raises:
        ValueError: no published model has such images and classes, and ``noise_std`` is not given.
    """
    assert isinstance(network, TARFlow)
    _, height, width = network.shape
    published = NOISE.get((height, network.num_classes)) if height == width else None
    std = published if noise_std is None else noise_std
    if std is None:
        raise ValueError(
            f"noise_std is needed: no file says how noisy the training data were, and no published model has images of "
            f"{height} x {width} pixels and num_classes={network.num_classes} (0 for uniform noise)"
        )
    noise = GaussianNoise(std) if std else Dequantization()
    return NormalizingFlow(network=network, objective=MaximumLikelihood(noise), guidance=LogLinear(annealed=True))


FORMAT = Format(
    name="tarflow",
    family="normalizing-flow",
    source="TARFlow, github.com/apple/ml-tarflow (or a third-party model of that architecture)",
    licence="other",
    licence_note="See the licence of the file that was converted: Apple's AFHQ file has no licence of its own and must "
    "not be passed on; the models of encoreus/Transformer_Autoregressive_Flow are Apache-2.0.",
    load_network=load_network,
    module=module,
    options=("in_channels", "input_size", "head_size", "label_dropout"),
    module_options=("noise_std",),
)
