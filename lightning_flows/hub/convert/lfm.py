"""What all files of Latent Flow Matching share: codec, path, solver, licence.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

from torch import nn

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.flow import DormandPrince, FlowMatching, Linear
from lightning_flows.modules import LatentFlowMatching

SOURCE = "Latent Flow Matching, github.com/VinAIResearch/LFM"
LICENCE_NOTE = (
    "The authors published these weights without a licence of their own (their code is AGPL-3.0), and "
    "the training data (CelebA-HQ, FFHQ, LSUN, ImageNet) is for non-commercial research: do not "
    "republish them."
)


def module(network: nn.Module) -> LatentFlowMatching:
    """The published model around the network."""
    return LatentFlowMatching(
        network=network,
        codec=AutoencoderKL(repo="stabilityai/sd-vae-ft-mse", scale=0.18215),
        objective=FlowMatching(path=Linear(sigma_min=1e-5)),
        solver=DormandPrince(rtol=1e-5, atol=1e-5),
        steps=1,
    )
