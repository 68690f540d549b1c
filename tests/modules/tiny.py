"""Models and data of a few numbers, for the tests of modules."""

import math

import torch
from torch import nn

from lightning_flows.codecs import Codec, Posterior
from lightning_flows.flow import Condition
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import DiT
from lightning_flows.store import Recorded


def dit(**options):
    """A DiT of a few thousand parameters whose output is not zero."""
    options = {"num_classes": 3, "label_dropout": 0.2, **options}
    sizes = {
        "input_size": 4,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "frequency_size": 8,
    }
    return awake(DiT(**{**sizes, **options}))


def awake(network, seed=0):
    """Random weights in place of the zeros with which gates start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def model(network=None, **options):
    """Latent flow matching of 4 x 4 pixels."""
    return LatentFlowMatching(network=dit() if network is None else network, **{"steps": 3, **options})


def batch(n=6, *, channels=1, size=4, classes=3):
    """Images and labels."""
    generator = torch.Generator().manual_seed(n)
    image = torch.rand(n, channels, size, size, generator=generator) * 2 - 1
    return {"image": image, "label": torch.arange(n) % classes, "index": torch.arange(n)}


class ToGaussian(Recorded, nn.Module):
    r"""The exact velocity from N(0, 1) to N(label, std^2) on the linear path; no label has mean 0.

    x_t = t x1 + (1 - t) x0 has variance V = t^2 s^2 + (1 - t)^2; the velocity is the mean of x1 - x0 given
    x_t: ``m + (t s^2 - (1 - t)) / V (x - t m)``.
    """

    streams = ("label",)
    shape = (1, 2, 2)

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std))
        self.modes = []
        self.conditions = []

    def forward(self, x, t, condition=None):
        self.modes.append(self.training)
        self.conditions.append(condition)
        mean = self.mean(condition, len(x)).reshape(-1, 1, 1, 1)
        t = t.expand(len(x)).reshape(-1, 1, 1, 1)
        slope = (t * self.std**2 - (1 - t)) / (t**2 * self.std**2 + (1 - t) ** 2)
        return mean + slope * (x - t * mean)

    def mean(self, condition, n):
        if condition is None or condition.label is None:
            return torch.zeros(n)
        return condition.label.float() * condition.presence("label")

    def null(self, condition=None, batch_size=None):
        return Condition() if condition is None else condition.absent("label")

    def drop(self, condition, generator):
        lost = torch.rand(len(condition.label), generator=generator) < 0.5
        return condition.absent("label", where=lost)

    def log_prob(self, z, condition):
        """Nats of z (B, ...), shape (B,)."""
        mean = self.mean(condition, len(z)).reshape(-1, 1, 1, 1)
        one = -0.5 * ((z - mean) / self.std) ** 2 - self.std.log() - 0.5 * math.log(2 * math.pi)
        return one.flatten(1).sum(1)


class Unconditional(Recorded, nn.Module):
    """A network without a condition and without a shape."""

    streams = ()

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t, condition=None):
        return self.gain * x

    def null(self, condition=None, batch_size=None):
        return Condition()

    def drop(self, condition, generator):
        return condition


class Affine(Codec):
    """z = gain x + offset."""

    def __init__(self, gain: float = 4.0, offset: float = 1.0) -> None:
        self.gain, self.offset = gain, offset

    def posterior(self, x):
        return Posterior(self.gain * x + self.offset)

    def decode(self, z):
        return (z - self.offset) / self.gain

    def latent_shape(self, shape):
        return tuple(shape)


class Maps(Recorded, nn.Conv2d):
    """A network with one feature map of three channels, for images of one channel."""

    def __init__(self) -> None:
        super().__init__(1, 3, 3)
