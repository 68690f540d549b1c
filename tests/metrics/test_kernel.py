"""Kernel distance: the double sum, unbiasedness, seeds."""

import pytest
import torch

from lightning_flows.metrics import KernelDistance


def _metric(real, samples, **options):
    metric = KernelDistance(**options)
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return metric


def test_one_full_subset_is_the_double_sum_of_the_definition():
    x, y = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def k(a, b):
        return (a.dot(b).item() / 3 + 1) ** 3

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    same = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    cross = sum(k(x[i], y[j]) for i, j in pairs) / n**2
    value = _metric(x, y, subsets=1, subset_size=7).compute()
    assert value["mean"].item() == pytest.approx(same - 2 * cross, rel=1e-10)
    assert value["std"] == 0


def test_the_estimate_is_unbiased_for_equal_distributions():
    generator = torch.Generator().manual_seed(1)
    values = torch.stack(
        [_metric(*torch.randn(2, 20, 4, generator=generator), subsets=1).compute()["mean"] for _ in range(200)]
    )
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / 200**0.5


def test_the_value_depends_on_the_seed_only_and_leaves_the_global_state_alone():
    x, y = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(2))
    before = torch.get_rng_state()
    first, again = (_metric(x, y, subset_size=10, seed=3).compute() for _ in range(2))
    other = _metric(x, y, subset_size=10, seed=4).compute()
    assert torch.equal(torch.get_rng_state(), before)
    assert first["mean"] == again["mean"] != other["mean"]
    assert first["std"] > 0


def test_caution_speaks_when_subsets_are_reduced():
    assert "reduced to 30" in KernelDistance(subset_size=100).caution(50, 30)
    assert KernelDistance(subset_size=100).caution(100, 200) is None


@pytest.mark.parametrize("option", [{"subsets": 0}, {"subset_size": 1}, {"degree": 0}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be at least"):
        KernelDistance(**option)
