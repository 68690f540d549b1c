"""Made-up garments, an autoencoder without weights and a normalizing flow, for the tests of scores and entries."""

import torch
from torch import nn

from lightning_flows.flow import GaussianNoise, MaximumLikelihood
from lightning_flows.modules import NormalizingFlow
from tests.networks.tiny_flows import redrawn, tarflow

SIZES = {"input_size": 28, "patch_size": 14, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}


def pictures(count, seed=0):
    """Stripes of ten widths as uint8 (N, 1, 28, 28) with a little noise, and their labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    bright = (torch.arange(28)[None, :] < 2 * labels[:, None] + 4).float()  # (N, 28)
    noise = torch.rand(count, 28, 28, generator=generator) * 40
    return (bright[:, None, :] * 200 + noise).round().to(torch.uint8)[:, None], labels


def images(count, seed=0):
    pixels, labels = pictures(count, seed)
    return pixels.float() / 127.5 - 1, labels


def flow(noise=None, **options):
    """A TARFlow of four tokens whose weights are small, so that its samples are near its noise."""
    sizes = {"input_size": 28, "patch_size": 14, "in_channels": 1, "num_blocks": 2}
    objective = MaximumLikelihood(noise or GaussianNoise(0.1))
    network = redrawn(tarflow(**{**sizes, "num_classes": 10, **options}), std=0.05)
    return NormalizingFlow(network=network, objective=objective)


class Halves(nn.Module):
    """Keeps the left half of an image; its posterior has the deviation 0.1."""

    device = torch.device("cpu")

    def encode(self, x, noise=None):
        z = x[..., : x.shape[-1] // 2]
        return z if noise is None else z + 0.1 * noise.normal("posterior", like=z)

    def decode(self, z):
        return torch.cat([z, z.flip(-1)], -1)
