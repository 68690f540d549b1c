"""Laws of the stochastic solvers: marginals of the flow, finite ends, transitions."""

import math

import pytest
import torch

from lightning_flows.flow.noise import SampleNoise, StepNoise
from lightning_flows.flow.paths import Linear, Trigonometric
from lightning_flows.flow.solvers import Diffusion, EulerMaruyama, Heun, StochasticHeun
from lightning_flows.flow.solvers.stochastic import FORMS, LASTS
from lightning_flows.flow.times import time_grid

SOLVERS = [EulerMaruyama, StochasticHeun]
every_solver = pytest.mark.parametrize("solver", SOLVERS)
N = 20_000


def source(n=N, shape=(1,), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@every_solver
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
def test_moments_of_the_flow_are_kept_for_every_diffusion(solver, form, path, gaussian_field):
    field = gaussian_field(path, mean=1.0, scale=0.5)
    end = solver(Diffusion(form)).solve(field, source(), time_grid(200), StepNoise(1)).x
    # five standard errors at 20,000 samples, and the bias of 200 steps
    assert end.mean().item() == pytest.approx(1.0, abs=0.018 + 0.01)
    assert end.std().item() == pytest.approx(0.5, abs=0.0125 + 0.01)


@pytest.mark.parametrize("solver", [StochasticHeun(), StochasticHeun(noise_at="start"), EulerMaruyama()], ids=repr)
def test_moments_are_kept_on_the_way_too(solver, gaussian_field):
    field = gaussian_field(mean=1.0, scale=0.5)
    for step in solver.iterate(field, source(), time_grid(100), StepNoise(2)):
        if step.index in (24, 49, 74):
            t = float(step.t)
            assert step.x.mean().item() == pytest.approx(t, abs=0.04)
            assert step.x.std().item() == pytest.approx(float(field.std(t)), abs=0.03)


@every_solver
@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_ends_are_finite_for_every_diffusion_last_step_and_number_of_steps(solver, form, last, n, gaussian_field):
    field = gaussian_field()
    end = solver(Diffusion(form), last).solve(field, source(8), time_grid(n), StepNoise(0)).x
    assert bool(end.isfinite().all())
    assert end.shape == (8, 1)


@every_solver
def test_without_diffusion_it_is_the_flow(solver, gaussian_field):
    field, x = gaussian_field(), source(16)
    end = solver(Diffusion("constant", scale=0.0)).solve(field, x, time_grid(50), StepNoise(0)).x
    torch.testing.assert_close(end, field.flow(x.double()).float(), atol=0.1, rtol=0)
    if solver is StochasticHeun:
        flow = Heun().solve(field, x, time_grid(50)[:-1]).x
        steps = list(solver(Diffusion("constant", scale=0.0)).iterate(field, x, time_grid(50), StepNoise(0)))
        torch.testing.assert_close(steps[-2].x, flow)


@pytest.mark.parametrize(("solver", "calls"), [(EulerMaruyama, 1), (StochasticHeun, 2)])
@pytest.mark.parametrize("n", [1, 6])
def test_calls(solver, calls, n, gaussian_field):
    for last, expected in (("mean", calls * (n - 1) + 1), ("noise", calls * n)):
        field = gaussian_field()
        solution = solver(last=last).solve(field, source(4), time_grid(n), StepNoise(0))
        assert solution.nfe == field.calls == expected


@every_solver
def test_a_sample_depends_on_its_seed_alone(solver, gaussian_field):
    field, x, grid = gaussian_field(), source(4, (2, 3)), time_grid(5)
    whole = solver().solve(field, x, grid, SampleNoise([5, 6, 7, 8])).x
    order = [3, 1]
    part = solver().solve(field, x[order], grid, SampleNoise([8, 6])).x
    torch.testing.assert_close(part, whole[order])
    assert not torch.equal(solver().solve(field, x, grid, SampleNoise([1, 2, 3, 4])).x, whole)


def test_transitions_of_euler_maruyama_are_the_stated_gaussians(gaussian_field):
    field, x = gaussian_field(mean=1.0, scale=0.5), source(4, (2, 3)).double()
    grid = time_grid(4, dtype=torch.float64)
    before = x
    for step in EulerMaruyama(Diffusion("linear")).iterate(field, x, grid, StepNoise(0)):
        t, h = grid[step.index], 0.25
        if step.index == 3:
            assert step.mean is None
            continue
        velocity, w = field(before, t), float(1 - t)
        noise = field.path.convert(velocity, before, t, given="velocity", to="noise")
        mean = before + h * (velocity - w / (1 - t) * noise)
        std = math.sqrt(2 * w * h)
        torch.testing.assert_close(step.mean, mean)
        assert step.std == pytest.approx(std)
        z = ((step.x - mean) / std).flatten(1)
        expected = -0.5 * z.square().sum(1) - 6 * (math.log(std) + 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(step.log_prob(), expected)
        before = step.x


def test_tweedie_ends_at_the_expected_data(gaussian_field):
    field, x, grid = gaussian_field(), source(4).double(), time_grid(3, dtype=torch.float64)
    steps = list(EulerMaruyama(last="tweedie").iterate(field, x, grid, StepNoise(0)))
    t, before = grid[-2], steps[-2].x
    gain = t * 0.3**2 / (t**2 * 0.3**2 + (1 - t) ** 2)
    torch.testing.assert_close(steps[-1].x, 2 + gain * (before - t * 2))


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_diffusions_are_those_of_the_table(path, t):
    time = torch.tensor(t, dtype=torch.float64)
    sigma, rate = float(path.sigma(time)), float(path.d_alpha(time) / path.alpha(time))
    expected = {
        "sigma": 0.7 * sigma,
        "sbdm": 0.7 * (rate * sigma**2 - sigma * float(path.d_sigma(time))),
        "linear": 0.7 * (1 - t),
        "decreasing": 0.25 * (0.7 * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": 0.7 * math.sin(math.pi * t) ** 2,
        "constant": 0.7,
    }
    for form in FORMS:
        assert Diffusion(form, scale=0.7)(path, time) == pytest.approx(expected[form])


@every_solver
def test_what_is_missing_or_impossible_is_named(solver, gaussian_field):
    field, x, grid = gaussian_field(), source(2), time_grid(2)
    with pytest.raises(ValueError, match="noise"):
        solver().solve(field, x, grid)
    with pytest.raises(ValueError, match="path"):
        solver().solve(lambda x, t: x, x, grid, StepNoise(0))
    with pytest.raises(ValueError, match="grid"):
        solver().solve(field, x, grid.flip(0), StepNoise(0))
    end = solver(path=Linear()).solve(lambda x, t: field(x, t), x, grid, StepNoise(0)).x
    assert torch.equal(end, solver().solve(field, x, grid, StepNoise(0)).x)
    with pytest.raises(ValueError, match="last"):
        solver(last="first")
    with pytest.raises(ValueError, match="form"):
        Diffusion("cubic")
    with pytest.raises(ValueError, match="scale"):
        Diffusion(scale=-1.0)
    assert solver.stochastic
