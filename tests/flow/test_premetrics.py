"""Laws of the premetrics."""

import pytest
import torch

from lightning_flows.flow.premetrics import PseudoHuber, SquaredError


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)


def test_squared_error_is_the_mean_of_each_sample(pair):
    a, b = pair
    expected = torch.stack([torch.nn.functional.mse_loss(a[i], b[i]) for i in range(4)])
    torch.testing.assert_close(SquaredError()(a, b), expected)


def test_pseudo_huber_is_its_formula_quadratic_near_zero_and_linear_far_off(pair):
    a, b = pair
    d, c = 15, 0.1 * 15
    expected = (torch.sqrt((a - b).flatten(1).square().sum(1) + c**2) - c) / d
    torch.testing.assert_close(PseudoHuber(0.1)(a, b), expected)
    near = PseudoHuber(1e3)(a, b) * 2 * 1e3 * d
    torch.testing.assert_close(near, SquaredError()(a, b), rtol=1e-4, atol=1e-6)
    far = PseudoHuber(1e-6)(a, b)
    torch.testing.assert_close(far, (a - b).flatten(1).norm(dim=1) / d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("premetric", [SquaredError(), PseudoHuber()], ids=repr)
def test_distances_vanish_on_equals_are_symmetric_and_kept_in_float32(premetric, pair):
    a, b = pair
    assert premetric(a, a).abs().max() == 0
    torch.testing.assert_close(premetric(a, b), premetric(b, a))
    assert premetric(a.bfloat16(), b).dtype == torch.float32
    assert premetric(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert premetric(a.double(), b.double()).dtype == torch.float64
    torch.testing.assert_close(premetric(a, b)[:2], premetric(a[:2], b[:2]))


@pytest.mark.parametrize("premetric", [SquaredError(), PseudoHuber()], ids=repr)
def test_gradient_is_finite_where_prediction_and_target_agree(premetric, pair):
    a = pair[0].requires_grad_()
    (gradient,) = torch.autograd.grad(premetric(a, a.detach()).sum(), a)
    assert gradient.abs().max() == 0
