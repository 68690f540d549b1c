"""The training loss of normalizing flows by hand, the noise on the data, and Tweedie's formula."""

import math

import pytest
import torch

from lightning_flows.flow import (
    Condition,
    Dequantization,
    GaussianNoise,
    MaximumLikelihood,
    StepNoise,
    dequantize,
    tweedie,
)

NONE = GaussianNoise(0.0)


class Doubling:
    """z = 2 x, in two blocks; remembers what it was asked."""

    def __call__(self, x, condition, *, states):
        self.asked = x, condition, states
        log_det = torch.full((len(x),), x[0].numel() * math.log(2))
        return 2 * x, log_det, (x.flatten(1)[:, :, None], 3 * x.flatten(1)[:, :, None])


X = torch.tensor([[[1.0, -2.0], [0.0, 3.0]], [[0.5, 0.5], [1.0, 0.0]]])[:, None]  # (2, 1, 2, 2)
SQUARES = torch.tensor([14 / 4, 1.5 / 4])  # mean x^2 of each
NLL = 4 * SQUARES / 2 - math.log(2)


def test_the_loss_is_the_mean_over_dimensions_without_constants():
    found = MaximumLikelihood(NONE)(Doubling(), X, None, StepNoise(0))
    torch.testing.assert_close(found.loss, NLL)
    torch.testing.assert_close(found.logs["nll"], NLL + 0.5 * math.log(2 * math.pi))


def test_the_penalty_is_that_of_all_states():
    found = MaximumLikelihood(NONE, latent_penalty=0.1)(Doubling(), X, None, StepNoise(0))
    torch.testing.assert_close(found.loss, NLL + 0.1 * (SQUARES + 9 * SQUARES))
    torch.testing.assert_close(found.logs["nll"], NLL + 0.5 * math.log(2 * math.pi))


def test_the_weight_of_a_noise_level_is_on_the_likelihood_alone():
    objective = MaximumLikelihood(GaussianNoise(0.6, weighted=True), latent_penalty=0.1)
    network, noise = Doubling(), StepNoise(3, 5)
    found = objective(network, X, None, noise)
    noisy = X + 0.6 * noise.normal("data_noise", X)
    assert torch.equal(network.asked[0], noisy)
    squares = noisy.square().flatten(1).mean(1)
    torch.testing.assert_close(found.loss, 2 * (2 * squares - math.log(2)) + squares)


def test_the_network_sees_the_condition_and_keeps_states():
    network, condition = Doubling(), Condition(label=torch.tensor([0, 1]))
    MaximumLikelihood(NONE)(network, X, condition, StepNoise(0))
    assert network.asked[1] is condition
    assert network.asked[2] is True


def test_gradients_go_through_the_loss_and_not_through_the_log():
    leaf = X.clone().requires_grad_()
    found = MaximumLikelihood(NONE, latent_penalty=0.1)(Doubling(), leaf, None, StepNoise(0))
    (slope,) = torch.autograd.grad(found.loss.sum(), leaf)
    torch.testing.assert_close(slope, (4 * X + 0.1 * 20 * X) / 4)
    assert not found.logs["nll"].requires_grad


def test_noise_is_keyed_by_the_step():
    x, noise = torch.zeros(4, 1, 50, 50), GaussianNoise(0.3)
    first = noise.add(x, StepNoise(1, 2))
    assert torch.equal(first, noise.add(x, StepNoise(1, 2)))
    assert not torch.equal(first, noise.add(x, StepNoise(1, 3)))
    assert first.std().item() == pytest.approx(0.3, rel=0.03)
    assert (noise.std, noise.weight, NONE.add(x, StepNoise(0)) is x) == (0.3, 1.0, True)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantization_stays_in_the_bin_and_its_noise_is_not_removed(levels):
    levels_of = torch.arange(levels, dtype=torch.float64)
    x = (levels_of * 2 / (levels - 1) - 1).float().expand(3, 1, 1, -1)
    found = Dequantization(levels).add(x, StepNoise(0))
    assert torch.equal(found, dequantize(x, levels, StepNoise(0)))
    assert torch.equal(((found.double() + 1) * levels / 2).floor(), levels_of.expand(3, 1, 1, -1))
    assert (Dequantization(levels).std, Dequantization(levels).weight) == (0.0, 1.0)


def test_tweedie_gives_the_mean_of_clean_gaussian_data():
    mean, s, std, y = 0.7, 0.5, 0.8, torch.linspace(-2, 2, 5)
    score = -(y - mean) / (s**2 + std**2)
    torch.testing.assert_close(tweedie(y, score, std), (s**2 * y + std**2 * mean) / (s**2 + std**2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-0.1), "deviation must not be negative, got -0.1"),
        (lambda: GaussianNoise(math.nan), "deviation .* got nan"),
        (lambda: Dequantization(1), "levels must be at least 2, got 1"),
        (lambda: MaximumLikelihood(latent_penalty=-1.0), "latent_penalty must not be negative, got -1.0"),
        (lambda: MaximumLikelihood(latent_penalty=math.nan), "latent_penalty .* got nan"),
        (lambda: MaximumLikelihood()(Doubling(), X, None, StepNoise(0), x0=X), "x0: .* leave out the coupling"),
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
