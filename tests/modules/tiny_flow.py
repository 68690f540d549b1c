"""Normalizing flows of a few numbers, and one that is exactly Gaussian."""

import math

import torch

from lightning_flows.flow import GaussianNoise, MaximumLikelihood
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import Sequential, STARFlow
from tests.networks.tiny_flows import starflow, tarflow

SIZES = {"input_size": 4, "in_channels": 1}


def tar(**options):
    """A TARFlow of 4 x 4 pixels and three classes."""
    return tarflow(**{**SIZES, "num_classes": 3, "label_dropout": 0.2, **options})


def star(**options):
    """A STARFlow of 4 x 4 pixels and three classes."""
    return starflow(**{**SIZES, "num_classes": 3, "label_dropout": 0.2, **options})


def texts(**options):
    """A STARFlow of 4 x 4 pixels and texts of five tokens of six channels."""
    return starflow(**{**SIZES, "text_length": 5, "text_size": 6, "text_dropout": 0.3, **options})


def preserving(variance=0.6):
    """A TARFlow that preserves volume, with a tracked variance."""
    network = tar(volume_preserving=True)
    network.prior_variance.copy_(variance + torch.arange(16.0).reshape(4, 4) / 10)
    return network


FLOWS = {"tarflow": tar, "starflow": star, "volume preserving": preserving}


def flow(network=None, *, std=0.1, penalty=0.0, **options):
    """A normalizing flow with Gaussian noise on its data, whose samples are exact and hold that noise."""
    objective = MaximumLikelihood(GaussianNoise(std), latent_penalty=penalty)
    defaults = {"objective": objective, "method": Sequential(), "denoise": 0.0}
    return NormalizingFlow(network=star() if network is None else network, **{**defaults, **options}).train()


def gaussian(mean=0.3, std=0.5, size=2):
    """The network whose density is N(mean, std^2) for every pixel."""
    sizes = {"in_channels": 1, "hidden_size": 4, "head_size": 4, "depth": (1,)}
    network = STARFlow(size, **sizes, scale="exp", soft_clip=0.0)
    with torch.no_grad():
        network.blocks[0].proj_out.weight.zero_()
        network.blocks[0].proj_out.bias.copy_(torch.tensor([math.log(std), mean]))
    return network


def log_normal(x, mean, std):
    """Nats of x (B, ...) under N(mean, std^2), shape (B,)."""
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
