"""Laws of the Gaussians of tokens and of their guidance."""

import math

import pytest
import torch
from torch.distributions import Normal

from lightning_flows.flow import Affine, GaussianProduct, LogLinear, log_normal

PROGRESS = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(ratio=None):
    """Gaussians of 2 samples of 4 tokens of 5 channels; ``ratio`` bounds log sigma_c - log sigma_u from above."""
    conditional, mean, log_scale = (
        Affine(normal(2, 4, 5), normal(2, 4, 5, seed=1)),
        normal(2, 4, 5, seed=2),
        normal(2, 4, 5, seed=3),
    )
    if ratio is not None:
        log_scale = conditional.log_scale - ratio + log_scale.abs()
    return conditional, Affine(mean, log_scale)


def test_apply_undoes_normalize():
    gaussian, x = pair()[0], normal(2, 4, 5, seed=5)
    z = gaussian.normalize(x)
    torch.testing.assert_close(z, (x - gaussian.mean) / gaussian.log_scale.exp())
    torch.testing.assert_close(gaussian.apply(z), x)
    assert torch.equal(gaussian.rows(slice(1, 2)).mean, gaussian.mean[1:])
    assert torch.equal(gaussian.rows(torch.tensor([1, 0])).log_scale, gaussian.log_scale.flip(0))


@pytest.mark.parametrize("std", [None, torch.tensor([0.5, 2.0, 1.5])])
def test_log_normal_is_that_of_torch(std):
    z = normal(4, 2, 3)
    expected = Normal(0.0, torch.ones(3) if std is None else std).log_prob(z).sum((1, 2))
    torch.testing.assert_close(log_normal(z, std), expected)
    assert log_normal(z, std).dtype == torch.float64
    assert log_normal(z.bfloat16(), std).dtype == torch.float32


# ---------------------------------------------------------------------- STARFlow's rule


@pytest.mark.parametrize("scale", [1.5, 3.0, 20.0])
def test_the_product_is_that_of_the_densities(scale):
    """(1 + w) log p_c - w log p_u differs from log p' by a constant, where the conditional is the more certain."""
    conditional, unconditional = pair(ratio=0.0)
    guided = GaussianProduct(scale)(conditional, unconditional, PROGRESS)

    def log(gaussian, x):
        return Normal(gaussian.mean, gaussian.log_scale.exp()).log_prob(x)

    points = guided.mean + guided.log_scale.exp() * torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    gap = scale * log(conditional, points) - (scale - 1) * log(unconditional, points) - log(guided, points)
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), rtol=1e-9, atol=1e-9)


def test_where_the_unconditional_is_more_certain_the_ratio_is_clipped():
    conditional, unconditional = pair(ratio=0.0)
    w, swapped = 2.5, (unconditional, conditional)
    guided = GaussianProduct(1 + w)(*swapped, PROGRESS)
    torch.testing.assert_close(guided.mean, swapped[0].mean + w * (swapped[0].mean - swapped[1].mean))
    torch.testing.assert_close(guided.log_scale, swapped[0].log_scale)


def test_equal_variances_give_the_linear_rule():
    conditional, other = pair()
    unconditional = other._replace(log_scale=conditional.log_scale)
    product, linear = (rule(3.0)(conditional, unconditional, PROGRESS) for rule in (GaussianProduct, LogLinear))
    torch.testing.assert_close(product, linear)


@pytest.mark.parametrize("scale", [2.0, 1e6])
def test_the_product_never_widens_and_stays_finite(scale):
    conditional, unconditional = pair()
    guided = GaussianProduct(scale)(conditional, unconditional, PROGRESS)
    assert (guided.log_scale <= conditional.log_scale + 1e-12).all()
    certain = conditional.log_scale < unconditional.log_scale - 0.1
    s = (2 * (conditional.log_scale - unconditional.log_scale)).exp()[certain]
    gap = (conditional.mean - unconditional.mean)[certain]
    bound = (s / (1 - s) * gap).abs()  # the limit of large scales
    assert ((guided.mean - conditional.mean)[certain].abs() <= bound + 1e-9).all()


# ---------------------------------------------------------------------- TARFlow's rule


@pytest.mark.parametrize("what", ["both", "scale", "mean"])
@pytest.mark.parametrize("annealed", [False, True])
def test_the_linear_rule_by_hand(what, annealed):
    conditional, unconditional = pair()
    guided = LogLinear(3.0, annealed=annealed, what=what)(conditional, unconditional, PROGRESS)
    w = torch.tensor([0.5, 1.0, 1.5, 2.0] if annealed else [2.0] * 4, dtype=torch.float64)[:, None]
    mean = conditional.mean + w * (conditional.mean - unconditional.mean)
    log_scale = conditional.log_scale + w * (conditional.log_scale - unconditional.log_scale)
    torch.testing.assert_close(guided.mean, conditional.mean if what == "scale" else mean)
    torch.testing.assert_close(guided.log_scale, conditional.log_scale if what == "mean" else log_scale)


# ---------------------------------------------------------------------- both

RULES = [GaussianProduct(4.0), LogLinear(4.0), LogLinear(4.0, annealed=True)]


@pytest.mark.parametrize("rule", RULES)
def test_equal_branches_are_unchanged(rule):
    conditional, _ = pair()
    torch.testing.assert_close(rule(conditional, conditional, PROGRESS), conditional)


@pytest.mark.parametrize("rule", [GaussianProduct(1.0), LogLinear(1.0), LogLinear(1.0, annealed=True, temperature=2.0)])
def test_scale_one_is_off(rule):
    conditional, unconditional = pair()
    found = rule(conditional, unconditional, PROGRESS)
    assert rule.off
    assert not rule.guides(deep=True)
    assert torch.equal(found.mean, conditional.mean)
    assert torch.equal(found.log_scale, conditional.log_scale)


def test_which_blocks_a_rule_guides():
    assert [GaussianProduct(2.0).guides(deep) for deep in (True, False)] == [True, True]
    assert [GaussianProduct(2.0, deep_only=True).guides(deep) for deep in (True, False)] == [True, False]
    assert [LogLinear(2.0, temperature=0.5).null_temperature, GaussianProduct(2.0).null_temperature] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianProduct(0.5), "scale must be .* got 0.5"),
        (lambda: LogLinear(math.nan), "scale must be .* got nan"),
        (lambda: GaussianProduct(math.inf), "scale must be .* got inf"),
        (lambda: LogLinear(2.0, temperature=0.0), "temperature must be .* got 0.0"),
        (lambda: LogLinear(2.0, temperature=math.nan), "temperature must be .* got nan"),
        (lambda: LogLinear(2.0, what="all"), "what must be .* got 'all'"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
