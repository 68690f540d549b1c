"""Bits and nats per dimension."""

import math

import pytest
import torch

from lightning_flows.flow import bits_per_dim
from lightning_flows.metrics import BitsPerDim, NatsPerDim, nats_per_dim


def _bits(log_prob, dims, levels):
    metric = BitsPerDim(levels)
    metric.update(log_prob, dims)
    return metric.compute().item()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_needs_the_bits_of_its_levels(levels):
    log_prob = torch.full((3,), -12 * math.log(2.0))  # uniform over [-1, 1]^12
    assert _bits(log_prob, 12, levels) == pytest.approx(math.log2(levels), rel=1e-6)


def test_a_density_concentrated_on_the_right_bin_needs_none():
    assert _bits(torch.tensor([-3 * math.log(2 / 256)]), 3, 256) == pytest.approx(0.0, abs=1e-6)


def test_the_metric_is_the_mean_over_items_of_all_batches():
    log_prob = torch.randn(10, generator=torch.Generator().manual_seed(0)) * 30
    metric = BitsPerDim(levels=17)
    metric.update(log_prob[:7], 64)
    metric.update(log_prob[7:], 64)
    assert metric.compute().item() == pytest.approx(bits_per_dim(log_prob, 64, 17).mean().item(), rel=1e-6)


def test_nats_per_dim_has_no_grey_levels():
    metric = NatsPerDim()
    metric.update(torch.tensor([-8.0, -4.0]), 4)
    assert metric.compute().item() == pytest.approx(1.5)
    assert nats_per_dim(torch.tensor([-8.0]), 4).item() == 2.0
    assert (metric.name, BitsPerDim().name) == ("nats_per_latent_dim", "bits_per_dim")


@pytest.mark.parametrize(
    ("log_prob", "dims", "word"),
    [(torch.tensor(0.0), 4, "log_prob must be"), (torch.zeros(2), 0, "dims must be")],
)
def test_wrong_input_is_named(log_prob, dims, word):
    with pytest.raises(ValueError, match=word):
        BitsPerDim().update(log_prob, dims)
    with pytest.raises(ValueError, match="levels must be"):
        BitsPerDim(1)
    with pytest.raises(ValueError, match="never given"):
        BitsPerDim().compute()
