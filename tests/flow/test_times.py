"""Laws of the time samplers: densities, shifts, grids."""

import dataclasses
import math

import pytest
import torch

from lightning_flows.flow.times import (
    CosMap,
    LogitNormal,
    Mode,
    Stratified,
    Uniform,
    UShaped,
    shift_time,
    time_grid,
)

SMOOTH = [
    Uniform(),
    Uniform(shift=3.0),
    Stratified(),
    Stratified(LogitNormal(0.4, 1.2, 2.0)),
    LogitNormal(),
    LogitNormal(mean=-0.4, std=0.7),
    LogitNormal(mean=0.4, std=1.0, shift=3.0),
    Mode(),
    Mode(scale=-0.8, shift=0.5),
    CosMap(),
    CosMap(shift=2.0),
    UShaped(),
    UShaped(a=0.01),
    UShaped(a=30.0, shift=1.5),
]
SINGULAR = [Mode(scale=2 / (math.pi - 2)), Mode(scale=-1.0)]
every_law = pytest.mark.parametrize("law", SMOOTH + SINGULAR, ids=repr)
smooth_law = pytest.mark.parametrize("law", SMOOTH, ids=repr)


def draw(law, n, seed=0):
    return law(n, torch.Generator().manual_seed(seed))


@every_law
def test_draws_are_finite_float32_times_repeatable_from_the_generator_alone(law):
    state = torch.get_rng_state()
    t = draw(law, 4096)
    assert t.shape == (4096,)
    assert t.dtype == torch.float32
    assert bool(t.isfinite().all())
    assert bool(((t >= 0) & (t <= 1)).all())
    assert torch.equal(t, draw(law, 4096))
    assert not torch.equal(t, draw(law, 4096, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_even_an_absurd_spread_stays_in_the_unit_interval():
    t = draw(LogitNormal(std=1e4), 1000)
    assert bool(t.isfinite().all())
    assert t.min() == 0
    assert t.max() == 1
    assert bool(draw(UShaped(a=100.0), 1000).isfinite().all())


@smooth_law
def test_density_integrates_to_one(law):
    n = 40_000
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert law.density(middles).mean().item() == pytest.approx(1, abs=1e-5)


@every_law
def test_density_is_the_derivative_of_the_distribution_function(law):
    u = torch.linspace(0.013, 0.987, 98, dtype=torch.float64).requires_grad_()
    t = law.quantile(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(law.density(t.detach()) * slope, torch.ones_like(u), rtol=1e-6, atol=0)


@every_law
def test_histogram_of_draws_agrees_with_the_density(law):
    n, bins, fine = 100_000, 20, 500
    counts = torch.histc(draw(law, n).double(), bins, 0, 1)
    middles = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) / (bins * fine)
    expected = n * law.density(middles).reshape(bins, fine).mean(1) / bins
    # five standard deviations, and what the midpoint rule loses at an integrable singularity
    allowed = 5 * expected.sqrt() + 2 + 0.1 * expected * (law in SINGULAR)
    assert bool(((counts - expected).abs() < allowed).all())


@every_law
def test_density_is_zero_outside_and_keeps_shape_and_dtype(law):
    t = torch.tensor([[-0.1, 0.3], [0.7, 1.1]])
    density = law.density(t)
    assert density.shape == t.shape
    assert density.dtype == t.dtype
    assert density[0, 0] == density[1, 1] == 0
    assert density[0, 1] > 0


def test_logit_normal_density_is_that_of_a_squashed_normal_with_the_shift_in_its_mean():
    law = LogitNormal(mean=0.4, std=0.8, shift=3.0)
    normal = torch.distributions.Normal(torch.tensor(0.4 - math.log(3), dtype=torch.float64), 0.8)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.SigmoidTransform())
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(law.density(t), squashed.log_prob(t).exp())
    assert law.density(torch.tensor([0.0, 1.0])).tolist() == [0, 0]


def test_logit_normal_with_positive_mean_prefers_data():
    t = draw(LogitNormal(mean=1.0), 20_000)
    assert t.median().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_cosmap_and_u_shape_have_the_published_densities():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(CosMap().density(t), 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2))
    a = 4.0
    published = a * (torch.exp(a * t) + torch.exp(a * (1 - t))) / (2 * (math.exp(a) - 1))
    torch.testing.assert_close(UShaped(a).density(t), published)


def test_cosmap_draws_are_the_published_map_of_uniform_numbers():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(CosMap().quantile(u), 1 - 1 / (1 + torch.tan(math.pi / 2 * u)))


def test_mode_is_the_published_map_in_the_noise_level():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    torch.testing.assert_close(1 - Mode(1.29).quantile(u), sigma)


@pytest.mark.parametrize("law", [Uniform(), LogitNormal(0.4, 1.2, 2.0)], ids=repr)
def test_stratified_draws_fall_once_in_each_bin_of_equal_probability(law):
    n = 64
    t = draw(Stratified(law), n).double()
    edges = law.quantile(torch.arange(1, n, dtype=torch.float64) / n)
    assert torch.equal(torch.bucketize(t, edges).sort().values, torch.arange(n))
    assert not torch.equal(t, t.sort().values)


def test_the_first_row_of_a_stratified_draw_follows_the_whole_law():
    first = torch.stack([draw(Stratified(), 8, seed)[0] for seed in range(2000)])
    assert first.mean().item() == pytest.approx(0.5, abs=0.03)
    assert first.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_stratified_mean_varies_less_than_independent_draws():
    def variance(law):
        return torch.stack([draw(law, 32, seed).mean() for seed in range(200)]).var()

    assert variance(Stratified()) < 0.1 * variance(Uniform())


@pytest.mark.parametrize("shift", [1 / 3, 1.0, 3.0])
def test_shift_moves_the_noise_level_by_its_formula_with_fixed_ends_and_order(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shift_time(t, shift)
    sigma = 1 - t
    torch.testing.assert_close(1 - moved, shift * sigma / (1 + (shift - 1) * sigma))
    assert moved[0] == 0
    assert moved[-1] == 1
    assert bool((moved.diff() > 0).all())


def test_shift_of_one_is_the_identity_to_the_bit_shifts_compose_and_invert():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift_time(t, 1.0), t)
    t = t.double()
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.5), shift_time(t, 7.0))
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)


def test_a_shifted_law_is_the_shift_of_its_draws():
    torch.testing.assert_close(draw(Mode(1.0, shift=3.0), 500), shift_time(draw(Mode(1.0), 500), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (10, 1.0), (250, 3.0), (1000, 0.2)])
def test_grid_has_n_intervals_with_exact_ends(steps, shift, dtype):
    grid = time_grid(steps, shift, dtype=dtype)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == dtype
    assert grid[0] == 0
    assert grid[-1] == 1
    assert bool((grid.diff() > 0).all())
    equal = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(grid.double(), equal / (equal + shift * (1 - equal)), rtol=1e-6, atol=1e-7)


@every_law
def test_a_law_makes_the_grid_of_its_shift(law):
    assert torch.equal(law.grid(10), time_grid(10, law.shift))
    assert law.grid(4, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: shift_time(torch.zeros(1), 0.0), "shift"),
        (lambda: time_grid(0), "steps"),
        (lambda: time_grid(2.5), "steps"),
        (lambda: time_grid(True), "steps"),
        (lambda: time_grid(4, -1.0), "shift"),
        (lambda: time_grid(1000, dtype=torch.bfloat16), "dtype"),
        (lambda: Uniform(shift=float("nan")), "shift"),
        (lambda: LogitNormal(std=0.0), "std"),
        (lambda: LogitNormal(mean=float("inf")), "mean"),
        (lambda: LogitNormal(shift=-1.0), "shift"),
        (lambda: Mode(scale=1.76), "scale"),
        (lambda: Mode(scale=-1.01), "scale"),
        (lambda: CosMap(shift=0.0), "shift"),
        (lambda: UShaped(a=0.0), "a must"),
        (lambda: UShaped(a=101.0), "a must"),
    ],
)
def test_arguments_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@every_law
def test_laws_are_frozen_values(law):
    assert law == dataclasses.replace(law)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(law, dataclasses.fields(law)[0].name, 2.0)
