"""Normalizing flows whose densities are known, for the tests of what likelihoods are used for."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_flows.codecs import Codec, Posterior
from lightning_flows.flow import GaussianNoise, MaximumLikelihood
from lightning_flows.flow.affine import log_normal
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import FlowStack
from lightning_flows.networks.flow_stack import Drawn

SHAPE = (1, 2, 3)


class LinearFlow(FlowStack):
    """``x = mean + L z`` with a lower-triangular L, or ``x = sinh(mean + L z)``; the mean is that of a class.

    Args:
        num_classes: class k has the mean k / 2 everywhere; None for no label, mean 0.
        mixed: L has entries below its diagonal.
        bent: apply the sinh.
    """

    patch_size = 1

    def __init__(self, num_classes=None, *, mixed=True, bent=False) -> None:
        super().__init__()
        self.shape, self.num_classes, self.bent = SHAPE, num_classes, bent
        below = torch.randn(6, 6, generator=torch.Generator().manual_seed(4)).tril(-1)
        self.factor = nn.Parameter(0.7 * torch.eye(6) + 0.4 * mixed * below)
        self.blocks = nn.ModuleList()
        self.modes = []

    device = property(lambda self: self.factor.device)
    streams = property(lambda self: () if self.num_classes is None else ("label",))

    def contexts(self, condition, batch_size):
        return []

    def rotations(self, rows, columns, device):
        if (rows, columns) != SHAPE[1:]:
            raise ValueError(f"x must have {SHAPE[1:]} cells, got {(rows, columns)}")
        return []

    def drop(self, condition, generator):
        return condition

    def mean(self, condition, size):
        if condition is None or condition.label is None:
            return torch.zeros(size, 1)
        return (condition.label.float() * condition.presence("label"))[:, None] / 2

    def forward(self, x, condition=None, *, states=False):
        self.modes.append(self.training)
        flat = x.flatten(1)
        inner = torch.asinh(flat) if self.bent else flat
        z = torch.linalg.solve_triangular(self.factor, (inner - self.mean(condition, len(x))).T, upper=False).T
        log_det = -self.factor.diagonal().log().sum().expand(len(x))
        if self.bent:
            log_det = log_det - 0.5 * torch.log1p(flat.square()).sum(1)
        return z.reshape(x.shape), log_det

    def draw(self, z, condition=None, **options):
        x = self.mean(condition, len(z)) + z.flatten(1) @ self.factor.T
        x = (torch.sinh(x) if self.bent else x).reshape(z.shape)
        return Drawn(x, -self(x, condition)[1], 1)

    def log_prob(self, x, condition=None):
        """Nats of x (B, 1, 2, 3), by the covariance where that is the density of a Gaussian."""
        if self.bent:
            z, log_det = self(x, condition)
            return log_normal(z) + log_det
        gaussian = torch.distributions.MultivariateNormal(torch.zeros(6), scale_tril=self.factor.detach())
        return gaussian.log_prob(x.flatten(1) - self.mean(condition, len(x)))


class Halved(Codec):
    """Latents are the means of 2 x 2 pixels."""

    def posterior(self, x):
        return Posterior(F.avg_pool2d(x, 2))

    def decode(self, z):
        return F.interpolate(z, scale_factor=2)

    def latent_shape(self, shape):
        return (shape[0], shape[1] // 2, shape[2] // 2)


class Spread(Halved):
    """The same with a posterior that is drawn from."""

    def posterior(self, x):
        mean = F.avg_pool2d(x, 2)
        return Posterior(mean, torch.full_like(mean, 0.3))


def flow(network=None, *, noise=0.0, **options):
    """A normalizing flow of 2 x 3 values."""
    objective = MaximumLikelihood(GaussianNoise(noise))
    return NormalizingFlow(network=LinearFlow() if network is None else network, objective=objective, **options)


def data(n=5, seed=0, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
