"""Frechet distance: oracles, degenerate covariances, running sums, stored references."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image import FrechetInceptionDistance

from lightning_flows.metrics import Features, Frechet, Pixels, frechet_distance


def _fill(metric, real, samples, size=16):
    for real_side, rows in ((True, real), (False, samples)):
        for batch in rows.split(size):
            metric.update(batch, real=real_side)
    return metric


def _spd(dim, rank, generator):
    factor = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_equals_the_matrix_square_root_of_scipy(generator):
    s1, s2 = _spd(6, 20, generator), _spd(6, 20, generator)
    m1, m2 = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(s1.numpy() + s2.numpy() - 2 * np.real(root))
    assert frechet_distance(m1, s1, m2, s2).item() == pytest.approx(expected, rel=1e-10)


def test_equals_the_closed_form_of_commuting_gaussians():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    value = frechet_distance(torch.zeros(3), torch.diag(a), torch.ones(3), torch.diag(b))
    assert value.item() == pytest.approx(3 + ((a.sqrt() - b.sqrt()) ** 2).sum().item(), rel=1e-12)


def test_equals_torchmetrics_with_the_same_network(generator):
    class Net(nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 8)

        def forward(self, x):
            return self.linear(x.flatten(1))

    net = Net().double()
    real = torch.randn(60, 3, 2, 2, generator=generator, dtype=torch.float64)
    samples = torch.randn(50, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.3 + 0.2
    oracle = FrechetInceptionDistance(feature=net, normalize=True).set_dtype(torch.float64)
    value = _fill(Frechet(Features(net, "net")), real, samples).compute()
    assert value.item() == pytest.approx(_fill(oracle, real, samples).compute().item(), rel=1e-8)


def test_covariance_of_the_running_sums_is_the_unbiased_one(generator):
    x = torch.randn(40, 5, generator=generator) * 2 + 3
    metric = _fill(Frechet(), x, x)
    mean, covariance, count = metric.statistics(real=True)
    assert torch.allclose(mean, x.double().mean(0))
    assert torch.allclose(covariance, torch.cov(x.double().T), atol=1e-12)
    assert count == 40


@pytest.mark.parametrize("count", [2, 3, 10])
def test_rank_deficient_covariances_give_a_finite_value(generator, count):
    real, samples = torch.randn(2, count, 32, generator=generator)
    value = _fill(Frechet(), real, samples).compute()
    assert value.isfinite()
    assert value > 0


def test_equal_sets_have_distance_zero_and_never_less(generator):
    x = torch.randn(12, 30, generator=generator) * 1e3
    value = _fill(Frechet(), x, x.flip(0)).compute()
    assert 0 <= value < 1e-3  # squared units of 1e6


def test_constant_sets_differ_by_their_means_alone():
    value = _fill(Frechet(), torch.zeros(4, 3), torch.full((4, 3), 2.0)).compute()
    assert value.item() == pytest.approx(12.0)


def test_a_large_common_mean_does_not_drown_the_covariance(generator):
    x, y = torch.randn(2, 200, 4, generator=generator, dtype=torch.float64)
    plain, shifted = _fill(Frechet(), x, y).compute(), _fill(Frechet(), x + 1e3, y + 1e3).compute()
    assert shifted.item() == pytest.approx(plain.item(), rel=1e-6)


def test_two_processes_summed_equal_one(generator):
    real, samples = torch.randn(2, 40, 6, generator=generator)
    whole = _fill(Frechet(), real, samples)
    left, right = _fill(Frechet(), real[:25], samples[:10]), _fill(Frechet(), real[25:], samples[10:])
    for state, reduction in whole._reductions.items():
        joined = reduction(torch.stack([getattr(left, state), getattr(right, state)]))
        assert torch.allclose(joined, getattr(whole, state), atol=1e-10)


def test_reset_forgets_everything_also_the_dimension(generator):
    metric = _fill(Frechet(), *torch.randn(2, 20, 6, generator=generator))
    metric.reset()
    x, y = torch.randn(2, 20, 3, generator=generator)
    assert torch.equal(_fill(metric, x, y).compute(), _fill(Frechet(), x, y).compute())


def test_too_few_items_is_an_error_that_says_how_many():
    metric = Frechet()
    metric.update(torch.randn(5, 2), real=True)
    metric.update(torch.randn(1, 2), real=False)
    with pytest.raises(ValueError, match="sample has 1 items, at least 2"):
        metric.compute()


def test_caution_speaks_below_ten_items_per_dimension():
    metric = _fill(Frechet(), torch.randn(9, 4), torch.randn(9, 4))
    assert "rank deficient" in metric.caution(100, 4)
    assert "fewer than 10 items per dimension" in metric.caution(100, 39)
    assert metric.caution(40, 40) is None


def test_a_stored_reference_replaces_the_real_items(tmp_path, generator):
    real, samples = torch.randn(2, 30, 4, generator=generator)
    whole = _fill(Frechet(), real, samples)
    whole.save_reference(tmp_path / "sub" / "stats.safetensors")
    again = Frechet(reference=str(tmp_path / "sub" / "stats.safetensors"))
    _fill(again, torch.full((5, 4), math.pi), samples)
    assert torch.equal(again.compute(), whole.compute())
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["stats.safetensors"]


def test_a_reference_of_another_extractor_is_refused(tmp_path, generator):
    _fill(Frechet(Pixels()), *torch.randn(2, 30, 4, generator=generator)).save_reference(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="is of 'pixels', not of 'net'"):
        Frechet(Features(nn.Identity(), "net"), reference=str(tmp_path / "s.safetensors"))
    with pytest.raises(ValueError, match="reference must be a file"):
        Frechet(reference=str(tmp_path / "none"))


def test_features_must_be_an_extractor():
    with pytest.raises(ValueError, match="features must be an Extractor"):
        Frechet(nn.Identity())


def test_more_features_than_a_covariance_can_hold_is_an_error():
    with pytest.raises(ValueError, match="at most 16384 are allowed"):
        Frechet().update(torch.zeros(1, 20000), real=True)
