"""`sit`: Scalable Interpolant Transformers (willisma/SiT), linear path, velocity prediction.

Their code has our direction of time and our sign, so the network is taken as it is; files of ``train.py``
({model, ema, opt, args}) and the bare released ones are both read. The second head of C channels is dropped.

References:
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.flow import DormandPrince, FlowMatching, Linear
from lightning_flows.hub.convert.common import Format
from lightning_flows.hub.convert.transformer import OPTIONS, load_dit
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import DiT


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> DiT:
    """The network; see `transformer.load_dit` for ``sizes`` and errors."""
    return load_dit(tensors, absent_label="last", **sizes)


def module(network: nn.Module) -> LatentFlowMatching:
    """The published model around the network."""
    return LatentFlowMatching(
        network=network,
        codec=AutoencoderKL(repo="stabilityai/sd-vae-ft-ema", scale=0.18215),
        objective=FlowMatching(path=Linear()),
        solver=DormandPrince(rtol=1e-3, atol=1e-6),
        steps=1,
    )


FORMAT = Format(
    name="sit",
    source="SiT, github.com/willisma/SiT",
    licence="mit",
    licence_note="The code is MIT; the weights have no licence text of their own (data: ImageNet).",
    load_network=load_network,
    module=module,
    options=OPTIONS,
)
