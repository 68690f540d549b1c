"""`lfm-dit`: transformers of Latent Flow Matching (VinAIResearch/LFM), files such as ``model_475.pth``.

Their time runs from data (0) to noise (1), so the network is wrapped in `ReversedTime`; the time enters the
sinusoid unscaled; the path keeps 1e-5 of noise at the data end; samples are solved by Dormand-Prince at 1e-5.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.flow import DormandPrince, FlowMatching, Linear
from lightning_flows.hub.convert.common import Format
from lightning_flows.hub.convert.transformer import load_dit
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import ReversedTime


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """The network in our direction of time; see `transformer.load_dit` for ``sizes`` and errors."""
    return ReversedTime(load_dit(tensors, absent_label="last", **sizes))


def module(network: nn.Module) -> LatentFlowMatching:
    """The published model around the network."""
    return LatentFlowMatching(
        network=network,
        codec=AutoencoderKL(repo="stabilityai/sd-vae-ft-mse", scale=0.18215),
        objective=FlowMatching(path=Linear(sigma_min=1e-5)),
        solver=DormandPrince(rtol=1e-5, atol=1e-5),
        steps=1,
    )


FORMAT = Format(
    name="lfm-dit",
    source="Latent Flow Matching, github.com/VinAIResearch/LFM",
    licence="other",
    licence_note=(
        "The authors published these weights without a licence of their own (their code is AGPL-3.0), and "
        "the training data (CelebA-HQ, FFHQ, LSUN, ImageNet) is for non-commercial research: do not "
        "republish them."
    ),
    load_network=load_network,
    module=module,
)
