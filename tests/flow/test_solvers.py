"""Laws of the deterministic solvers: order, exactness, reversal, counts of calls."""

import math

import pytest
import torch
from torchdiffeq import odeint

from lightning_flows.flow.solvers import RK4, DormandPrince, Euler, Heun, Heun3, Midpoint, PseudoCorrector
from lightning_flows.flow.times import time_grid

FIXED = [
    (Euler(), 1, lambda n: n),
    (Midpoint(), 2, lambda n: 2 * n),
    (Heun(), 2, lambda n: 2 * n),
    (Heun3(), 3, lambda n: 3 * n),
    (RK4(), 4, lambda n: 4 * n),
    (RK4(rule="3/8"), 4, lambda n: 4 * n),
    (PseudoCorrector(), 2, lambda n: n + 1),
]
SOLVERS = [solver for solver, _, _ in FIXED] + [DormandPrince(), DormandPrince(end="interpolate")]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


def grid(n, shift=1.0):
    return time_grid(n, shift, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.linspace(0.2, 0.8, 24, dtype=torch.float64).reshape(4, 2, 3)


def bending(x, t):
    """dx/dt = x^2 cos t: nonlinear and without a symmetry that would flatter a solver."""
    return x**2 * torch.cos(t)


def bent(x, t=1.0):
    return 1 / (1 / x - math.sin(t))


@pytest.mark.parametrize(("solver", "order", "calls"), FIXED, ids=lambda v: repr(v) if callable(v) is False else "")
def test_order_of_convergence(solver, order, calls, x):
    errors = [float((solver.solve(bending, x, grid(n)).x - bent(x)).abs().max()) for n in (16, 32, 64)]
    rates = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert rates[-1] == pytest.approx(order, abs=0.2)
    assert abs(rates[1] - order) < abs(rates[0] - order) + 0.05


@pytest.mark.parametrize(("solver", "order", "calls"), FIXED, ids=lambda v: repr(v) if callable(v) is False else "")
def test_order_holds_on_a_shifted_grid(solver, order, calls, x):
    errors = [float((solver.solve(bending, x, grid(n, 3.0)).x - bent(x)).abs().max()) for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_the_gaussian_field_is_carried_to_its_end_with_the_errors_measured_elsewhere(gaussian_field):
    field = gaussian_field()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = {Euler(): 5.5e-2, Heun(): 1.2e-3, RK4(rule="3/8"): 1.8e-7}
    for solver, error in measured.items():
        ours = (solver.solve(field, x, grid(32)).x - field.flow(x)).abs().max().item()
        assert ours == pytest.approx(error, rel=0.05)
    assert (DormandPrince(1e-8, 1e-8).solve(field, x, grid(1)).x - field.flow(x)).abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(("solver", "order", "calls"), FIXED, ids=lambda v: repr(v) if callable(v) is False else "")
def test_n_intervals_are_n_steps_with_the_stated_calls(solver, order, calls, n, x, counted):
    field = counted(bending)
    steps = list(solver.iterate(field, x, grid(n)))
    assert [step.index for step in steps] == list(range(n))
    assert steps[-1].nfe == field.calls == calls(n)
    assert torch.equal(torch.stack([step.t for step in steps]), grid(n)[1:])
    solution = solver.solve(field, x, grid(n))
    assert torch.equal(solution.x, steps[-1].x)
    assert solution.nfe == calls(n)


@every_solver
def test_one_step_is_allowed_and_a_constant_field_is_exact_in_it(solver, x):
    velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = solver.solve(lambda x, t: velocity, x, grid(1)).x
    torch.testing.assert_close(end, x + velocity, rtol=1e-12, atol=1e-12)


@every_solver
def test_all_calls_lie_inside_the_grid_unless_the_end_is_interpolated(solver, x, counted):
    field = counted(bending)
    solver.solve(field, x, grid(4))
    assert min(field.times) == 0
    if getattr(solver, "end", "clip") == "clip":
        assert max(field.times) <= 1


@every_solver
def test_forward_and_backward_returns(solver, x):
    fine = grid(400)
    back = solver.solve(bending, solver.solve(bending, x, fine).x, fine.flip(0)).x
    tolerance = {Euler: 5e-3, DormandPrince: 1e-3}.get(type(solver), 2e-5)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)


@every_solver
def test_an_intermediate_state_is_the_solution_there(solver, x):
    times = torch.tensor([0.0, 0.1, 0.35, 1.0], dtype=torch.float64)
    for step, t in zip(solver.iterate(bending, x, times), times[1:], strict=True):
        assert float(step.t) == float(t)
        if isinstance(solver, DormandPrince):
            torch.testing.assert_close(step.x, bent(x, float(t)), rtol=2e-4, atol=2e-4)


@every_solver
def test_state_is_at_least_float32_and_the_input_is_not_changed(solver, x):
    low = x.bfloat16()
    kept = low.clone()
    assert solver.solve(bending, low, time_grid(3)).x.dtype == torch.float32
    assert torch.equal(low, kept)
    assert solver.solve(bending, x, grid(3)).x.dtype == torch.float64


@every_solver
def test_gradients_pass_through_the_solution(solver):
    x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(solver.solve(bending, x, grid(64)).x.sum(), x)
    expected = 1 / (1 - 0.5 * math.sin(1.0)) ** 2
    assert gradient.item() == pytest.approx(expected, rel=0.05 if isinstance(solver, Euler) else 1e-3)


@every_solver
@pytest.mark.parametrize(
    "times", [torch.zeros(1), torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 1.0, 0.5]), torch.zeros(2, 2)]
)
def test_grids_that_are_not_monotone_are_refused(solver, times, x):
    with pytest.raises(ValueError, match="grid"):
        solver.solve(bending, x, times)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.adaptive], ids=repr)
def test_fixed_steps_treat_samples_apart(solver, x):
    whole = solver.solve(bending, x, grid(5)).x
    parts = torch.cat([solver.solve(bending, x[i : i + 1], grid(5)).x for i in range(len(x))])
    assert torch.equal(whole, parts)


def test_flags():
    assert [s.adaptive for s in SOLVERS] == [False] * 7 + [True] * 2
    assert not any(s.stochastic for s in SOLVERS)
    with pytest.raises(ValueError, match="rule"):
        RK4(rule="2/3")


def test_a_deterministic_step_has_no_transition_probability(x):
    step = next(Euler().iterate(bending, x, grid(2)))
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob()


# ---------------------------------------------------------------------- Dormand-Prince


def stiffer(x, t):
    return torch.sin(6 * x) * torch.cos(9 * t) + torch.roll(x, 1, -1) ** 2 - x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("rtol", "atol", "n"), [(1e-5, 1e-5, 1), (1e-3, 1e-6, 1), (1e-5, 1e-7, 9)])
def test_dormand_prince_repeats_torchdiffeq(rtol, atol, n, reverse, dtype, x, counted):
    times = grid(n).flip(0) if reverse else grid(n)
    ours, theirs = counted(stiffer), counted(stiffer)
    x = x.to(dtype)
    states = torch.stack([s.x for s in DormandPrince(rtol, atol, end="interpolate").iterate(ours, x, times)])
    expected = odeint(lambda t, x: theirs(x, t), x, times, rtol=rtol, atol=atol, method="dopri5")[1:]
    assert ours.calls == theirs.calls
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # rounding steers the steps
    torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("end", ["clip", "interpolate"])
def test_dormand_prince_error_follows_its_tolerance(tolerance, end, x, counted):
    field = counted(bending)
    solution = DormandPrince(tolerance, tolerance, end=end).solve(field, x, grid(1))
    assert (solution.x - bent(x)).abs().max() < 20 * tolerance
    assert solution.nfe == field.calls
    assert (solution.nfe - 2) % 6 == 0


def test_dormand_prince_gives_up_with_a_reason(x):
    with pytest.raises(RuntimeError, match="attempt"):
        DormandPrince(1e-9, 1e-9, max_attempts=2).solve(stiffer, x, grid(1))
    with pytest.raises(RuntimeError, match="finite"):
        DormandPrince().solve(lambda x, t: x * float("nan"), x, grid(1))
    with pytest.raises(ValueError, match="rtol"):
        DormandPrince(rtol=0.0)
    with pytest.raises(ValueError, match="end"):
        DormandPrince(end="stop")
