r"""Likelihoods in the units of papers: bits per dimension of grey levels, nats per dimension of latents.

Data of ``levels`` grey levels are spread over [-1, 1] in bins of width w = 2 / levels and made continuous by
noise within the bin. A density p of that variable bounds the probability of the levels,
log P >= E log p + D log w, so

    bits per dim = -(log p + D log w) / (D ln 2)

"A note on the evaluation of generative models" (Theis, van den Oord and Bethge, 2016). For latents, which
have no grey levels, only nats per dimension, -log p / D, make sense, and only within one codec.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flows.flow import bits_per_dim


def nats_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Negative log-density per dimension in nats, for latents: ``-log_prob / dims``."""
    _check(dims, 2)
    return -log_prob.double() / dims


class NatsPerDim(Metric):
    """Mean negative log-density in nats per dimension over all items seen; for latent models."""

    full_state_update = False
    higher_is_better = False
    name = "nats_per_latent_dim"
    consumes = ("log_prob", "dims")  # outputs that `Evaluation` hands to update

    nats: Tensor
    dims: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("dims", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, dims: int) -> None:
        """Take in ``log_prob`` ``(B,)`` in nats of items of ``dims`` dimensions.

        Raises:
            ValueError: ``log_prob`` is not ``(B,)`` or ``dims`` is below 1.
        """
        _check(dims, 2)
        if log_prob.ndim != 1:
            raise ValueError(f"log_prob must be (B,), nats per sample, got shape {tuple(log_prob.shape)}")
        self.nats = self.nats + log_prob.detach().double().sum().to(self.device)
        self.dims = self.dims + dims * len(log_prob)

    def compute(self) -> Tensor:
        """Nats per dimension, a float64 scalar."""
        if self.dims == 0:
            raise ValueError(f"{self.name}: log_prob was never given")
        return -self.nats / self.dims


class BitsPerDim(NatsPerDim):
    """Mean bits per dimension over all items seen; for dequantised pixels in [-1, 1].

    Args:
        levels: number of grey levels (256 for 8-bit images); the bins have width ``2 / levels``.
    """

    name = "bits_per_dim"

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        _check(1, levels)
        self.levels = levels

    def compute(self) -> Tensor:
        """Bits per dimension, a float64 scalar."""
        return bits_per_dim(-super().compute(), 1, self.levels)


def _check(dims: int, levels: int) -> None:
    if dims < 1:
        raise ValueError(f"dims must be at least 1, got {dims}")
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
