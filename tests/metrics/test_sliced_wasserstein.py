"""Sliced Wasserstein: exact lines, bounds of the controls, their variance, bias of the coefficient."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from lightning_flows.metrics import SlicedWasserstein, sliced_wasserstein_squared, wasserstein_1d
from lightning_flows.metrics.sliced_wasserstein import _factor, _variance


def _gen(seed):
    return torch.Generator().manual_seed(seed)


def _pair(n=300, m=300, dim=20, shift=0.5):
    generator = _gen(0)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return x, torch.randn(m, dim, generator=generator, dtype=torch.float64) * 1.2 + shift


def test_on_a_line_it_is_the_best_of_all_assignments():
    x, y = torch.randn(2, 5, 1, generator=_gen(1), dtype=torch.float64)
    best = min(((x[:, 0] - y[list(p), 0]) ** 2).mean().item() for p in itertools.permutations(range(5)))
    assert wasserstein_1d(x, y).item() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(4, 6), (5, 3), (1, 4)])
def test_unequal_sizes_equal_the_transport_linear_programme(n, m):
    x, y = (
        torch.randn(n, 1, generator=_gen(2), dtype=torch.float64),
        torch.randn(m, 1, generator=_gen(3)).double(),
    )
    cost = ((x - y.T) ** 2).numpy()
    rows = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)]
    cols = [np.kron(np.ones(n), np.eye(m)[j]) for j in range(m)]
    right = np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]
    optimum = linprog(cost.ravel(), A_eq=np.stack(rows + cols), b_eq=right).fun
    assert wasserstein_1d(x, y).item() == pytest.approx(optimum, rel=1e-8)


@pytest.mark.parametrize("control", ["none", "lower", "upper"])
def test_a_pure_shift_gives_its_length(control):
    x = torch.randn(50, 8, generator=_gen(4), dtype=torch.float64)
    shift = torch.randn(8, generator=_gen(5), dtype=torch.float64)
    value = sliced_wasserstein_squared(x, x + shift, generator=_gen(6), directions=4000, control=control)
    expected = shift.square().sum().item() / 8
    assert value.item() == pytest.approx(expected, rel=1e-9 if control == "lower" else 0.05)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 35)])
def test_every_slice_lies_between_its_controls(n, m):
    x, y = _pair(n, m, dim=5)
    theta = torch.randn(200, 5, generator=_gen(7), dtype=torch.float64)
    theta = theta / theta.norm(dim=1, keepdim=True)
    values = wasserstein_1d(x @ theta.T, y @ theta.T)
    low, high = ((theta @ _factor(x, y, side).T).square().sum(1) for side in ("lower", "upper"))
    assert (low <= values + 1e-12).all()
    assert (values <= high + 1e-12).all()


@pytest.mark.parametrize("control", ["lower", "upper"])
@pytest.mark.parametrize("n", [3, 300])
def test_mean_and_variance_of_the_control_are_the_closed_forms(control, n):
    x, y = _pair(n, n, dim=6)
    factor = _factor(x, y, control)
    theta = torch.randn(50_000, 6, generator=_gen(8), dtype=torch.float64)
    values = (theta / theta.norm(dim=1, keepdim=True) @ factor.T).square().sum(1)
    assert values.mean().item() == pytest.approx(factor.square().sum().item() / 6, rel=0.02)
    assert _variance(factor).item() == pytest.approx(values.var().item(), rel=0.05)


def _spread(control, coefficient, directions=10, runs=150):
    x, y = _pair(100, 100)
    options = {"directions": directions, "control": control, "coefficient": coefficient}
    return torch.stack([sliced_wasserstein_squared(x, y, generator=_gen(s), **options) for s in range(runs)])


@pytest.fixture(scope="module")
def truth():
    x, y = _pair(100, 100)
    return sliced_wasserstein_squared(x, y, generator=_gen(999), directions=20_000, control="none").item()


# A coefficient from few directions is noisy: half of thirty do, and the exact variance under a noisy
# covariance does not cancel its noise, so "closed" needs more.
@pytest.mark.parametrize("control", ["lower", "upper"])
@pytest.mark.parametrize(("coefficient", "directions"), [("same", 10), ("split", 30), ("closed", 100)])
def test_controls_reduce_the_spread(control, coefficient, directions):
    plain = _spread("none", "same", directions).std()
    assert _spread(control, coefficient, directions).std() < 0.75 * plain


def test_split_halves_are_unbiased_at_ten_directions(truth):
    values = _spread("lower", "split", runs=600)
    assert abs(values.mean().item() - truth) < 3.5 * values.std().item() / 600**0.5 + 0.002 * truth


def test_an_estimate_below_zero_becomes_distance_zero():
    x = torch.randn(40, 10, generator=_gen(10))
    metric = SlicedWasserstein(directions=8)
    metric.update(x, real=True)
    metric.update(x, real=False)
    assert metric.compute().item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("control", ["lower", "upper"])
@pytest.mark.parametrize("coefficient", ["same", "split", "closed"])
def test_equal_means_and_one_dimension_do_not_divide_by_zero(control, coefficient):
    x = torch.randn(20, 1, generator=_gen(11), dtype=torch.float64)
    y = x * 2 - x.mean()
    value = sliced_wasserstein_squared(x, y, generator=_gen(12), directions=8, control=control, coefficient=coefficient)
    assert value.item() == pytest.approx(wasserstein_1d(x, y).item(), rel=1e-9)


def test_the_metric_is_the_root_and_depends_on_its_seed_only():
    x, y = _pair(30, 20, dim=4)
    metric = SlicedWasserstein(directions=50, seed=3)
    metric.update(x[:10], real=True)
    metric.update(x[10:], real=True)
    metric.update(y, real=False)
    expected = sliced_wasserstein_squared(x, y, generator=_gen(3), directions=50).sqrt()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-12)
    assert metric.name == "sliced_wasserstein[pixels]"


@pytest.mark.parametrize(
    "option",
    [{"control": "both"}, {"coefficient": "best"}, {"directions": 3}, {"directions": 0, "control": "none"}],
)
def test_wrong_options_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        SlicedWasserstein(**option)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"x and y must be \(N, D\) and \(M, D\)"):
        sliced_wasserstein_squared(torch.zeros(3, 2), torch.zeros(3, 4), generator=_gen(0))
