"""Laws of the sources."""

import pytest
import torch

from lightning_flows.flow.noise import SampleNoise
from lightning_flows.flow.sources import Gaussian


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_log_prob_is_that_of_the_normal_distribution_for_each_sample(shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian().log_prob(x), expected)


def test_samples_are_keyed_and_like_what_is_asked():
    noise, like = SampleNoise([1, 2, 3]), torch.empty(3, 2, 4, dtype=torch.float64)
    x = Gaussian().sample(noise, "source", like)
    assert x.shape == like.shape
    assert x.dtype == like.dtype
    assert torch.equal(x, noise.normal("source", like))


def test_it_allows_scores():
    assert Gaussian().gaussian
