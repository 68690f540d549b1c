"""Models of pairs: the exact network of a finite set of pairs, a tiny transformer, and data for both."""

import torch
from torch import nn

from lightning_flows.codecs import JointSemantics, OneHot
from lightning_flows.flow import SymmetricMatching
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import Preconditioned
from lightning_flows.store import Recorded
from tests.modules.tiny import dit

MASKS, LABELS = 3, 4  # classes


class ExactPairs(Recorded, nn.Module):
    r"""Both velocities that minimise the loss over a finite set of equally likely pairs (x_k, y_k).

    With s = 1 - (1 - sigma) t the posterior of a pair is ``w_k ~ N(x_t; t x_k, s^2) N(y_t; s y_k, t^2)``; velocities
    are the means over it of ``x_k - (1 - sigma) e_x`` and of ``e_y - (1 - sigma) y_k``. A hidden code (at the rate
    ``drop``) has ``N(y_t; 0, s^2 + t^2)``, and its velocity is not learned.
    """

    streams = ()

    def __init__(self, images: list, codes: list, drop: float = 0.0, sigma_min: float = 1e-4) -> None:
        super().__init__()
        self.x, self.y = torch.tensor(images).double(), torch.tensor(codes).double()  # (N, C, h, w), (N, S, h, w)
        self.drop, self.sigma_min = drop, sigma_min
        self.shape = (self.x.shape[1] + self.y.shape[1], *self.x.shape[2:])
        self.gain, self.calls = nn.Parameter(torch.ones(2)), []

    def forward(self, state, t, condition=None):
        self.calls.append(len(state))
        x, y = state.double().split([self.x.shape[1], self.y.shape[1]], dim=1)
        t = t.double().expand(len(x)).view(-1, 1, 1, 1, 1)
        s = 1 - (1 - self.sigma_min) * t
        x, y = x[:, None], y[:, None]  # (B, 1, C, h, w)
        of_x = -((x - t * self.x) ** 2).flatten(2).sum(2) / (2 * s.flatten(1) ** 2)
        seen = self.density(y - s * self.y, t.clamp(min=1e-3)) + of_x
        unseen = self.density(y, (s**2 + t**2).sqrt()) + of_x
        drop = torch.tensor(self.drop).double()
        weights = torch.cat([(1 - drop).log() + seen, drop.log() + unseen], 1).softmax(1).view(len(x), 2, -1).sum(1)
        x_k = (weights[..., None, None, None] * self.x).sum(1)
        noise = (y - s * self.y) / t.clamp(min=1e-12) * (t > 0)  # mean 0 at t = 0, where the code is clean
        v_y = (seen.softmax(1)[..., None, None, None] * (noise - (1 - self.sigma_min) * self.y)).sum(1)
        v_x = x_k - (1 - self.sigma_min) * (x[:, 0] - t[:, 0] * x_k) / s[:, 0]
        return torch.cat([self.gain[0] * v_x, self.gain[1] * v_y], 1).float()

    @staticmethod
    def density(difference, std):
        size = difference[0, 0].numel()
        return -((difference / std) ** 2).flatten(2).sum(2) / 2 - size * std.flatten(1).log()


def semantics():
    """Mask and label, one plane for each class."""
    return JointSemantics([OneHot(MASKS), OneHot(LABELS, per="image")])


def symmflow(semantic=None, network=None, *, channels=1, size=4, drop_rate=0.0, read_rate=0.0, **options):
    """A tiny transformer around masks and labels of 4 x 4 pixels, with random weights."""
    semantic = semantic or semantics()
    if network is None:
        sizes = {"input_size": size, "in_channels": channels + semantic.channels, "depth": 1}
        network = dit(num_classes=None, label_dropout=0.0, **sizes)
    options = {"objective": SymmetricMatching(drop_rate=drop_rate, read_rate=read_rate), "steps": 3, **options}
    return SymmFlow(network=network, semantic=semantic, **options)


def preconditioned(codes=MASKS + LABELS, constant=0, channels=1):
    """The tiny transformer as a `Preconditioned`."""
    inside = dit(num_classes=None, label_dropout=0.0, input_size=4, in_channels=channels + codes, depth=1)
    return Preconditioned(inside, codes=codes, constant=constant)


def gentle(model, size=0.3):
    """The model with a smaller velocity, so that few steps are enough."""
    with torch.no_grad():
        for parameter in model.network.final_layer.linear.parameters():
            parameter.mul_(size)
    return model


def batch(n=5, *, channels=1, size=4):
    """Images, masks and labels."""
    generator = torch.Generator().manual_seed(n)
    return {
        "image": torch.rand(n, channels, size, size, generator=generator) * 2 - 1,
        "mask": torch.randint(MASKS, (n, size, size), generator=generator),
        "label": torch.arange(n) % LABELS,
        "index": torch.arange(n),
    }
