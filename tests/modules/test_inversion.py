"""To noise and back: closed forms of a Gaussian, order of the round trip, limits of the strength, independence."""

import itertools
import math

import pytest
import torch

from lightning_flows.flow import (
    RK4,
    ClassifierFree,
    Condition,
    DormandPrince,
    Euler,
    EulerMaruyama,
    FlowMatching,
    Heun,
    Heun3,
    LogitNormal,
    Midpoint,
    PseudoCorrector,
    SampleNoise,
    StochasticHeun,
    VariancePreserving,
    seeds_from,
)
from lightning_flows.modules.inversion import slerp
from tests.modules.tiny import Affine, ToGaussian, model

LABEL = torch.tensor([0, 1, 2, 2])
CONDITION = Condition(label=LABEL)
MEAN = LABEL.reshape(-1, 1, 1, 1)
STD = 0.5
FINE = {"solver": RK4(), "steps": 24}
DETERMINISTIC = [
    (Euler(), 1, 1),
    (Midpoint(), 2, 3),
    (Heun(), 2, 3),
    (Heun3(), 3, 3),
    (RK4(), 4, 5),
    (RK4("3/8"), 4, 5),
    (PseudoCorrector(), 2, 2),
]


def exact(**options):
    """The exact flow from N(0, 1) to N(label, STD^2)."""
    return model(ToGaussian(std=STD), **{**FINE, **options})


def data(n=4, seed=0):
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) + 1


def noise(seeds):
    return SampleNoise(seeds).normal("source", torch.empty(len(seeds), 1, 2, 2))


# ---------------------------------------------------------------------- inversion


@pytest.mark.parametrize("solver", [RK4(), DormandPrince(1e-6, 1e-6), DormandPrince(1e-6, 1e-6, end="interpolate")])
def test_the_noise_of_data_under_a_gaussian_flow_is_known(solver):
    x = data()
    torch.testing.assert_close(exact(solver=solver).invert(x, CONDITION), (x - MEAN) / STD, rtol=1e-4, atol=1e-4)


def test_noise_is_that_of_the_standardised_latent_of_the_codec():
    made = exact(codec=Affine(gain=4.0, offset=1.0))
    made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
    x = data()
    z = (4 * x + 1 - 2) / 0.25
    torch.testing.assert_close(made.invert(x), z / STD, rtol=1e-4, atol=1e-3)
    found = made.reconstruct(x)
    torch.testing.assert_close(found.x, x, rtol=1e-4, atol=1e-4)


def test_the_noise_of_a_sample_is_the_noise_it_was_made_of():
    made, seeds = exact(), [3, 4, 5, 6]
    x = made.sample(CONDITION, seeds=seeds)
    torch.testing.assert_close(made.invert(x, CONDITION), noise(seeds), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.from_noise(noise(seeds), CONDITION), x, rtol=0, atol=0)


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(("solver", "order", "round_trip"), DETERMINISTIC, ids=str)
def test_errors_fall_with_the_order_of_the_solver(solver, order, round_trip):
    made, x = exact().double(), data().double()
    one_way, both_ways = [], []
    for steps in (8, 16, 32):  # finer ones would show the round-off of a float32 grid
        found = made.reconstruct(x, CONDITION, solver=solver, steps=steps)
        one_way.append(float((found.noise - (x - MEAN) / STD).abs().max()))
        both_ways.append(float((found.x - x).abs().max()))
    assert min(orders(one_way)) > order - 0.35
    assert min(orders(both_ways)) > round_trip - 0.35
    assert both_ways[-1] > 0


def test_the_error_of_a_reconstruction_is_reported_for_every_sample():
    made, x = exact(codec=Affine(gain=4.0, offset=1.0)), data() / 4
    found = made.reconstruct(x, CONDITION, solver=Euler(), steps=8)
    lost = (found.x - x).square().flatten(1).mean(1)
    torch.testing.assert_close(found.rms, 4 * lost.sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.psnr, 10 * torch.log10(4 / lost), rtol=1e-4, atol=1e-4)
    assert found.rms.shape == found.psnr.shape == (4,)
    assert (found.rms > 1e-3).all()


def test_guidance_of_the_inversion_is_that_of_the_module_or_of_the_call():
    rule, x = ClassifierFree(2.0), data()
    plain, guided = exact(steps=12), exact(steps=12, guidance=rule)
    expected = plain.invert(x, CONDITION, guidance=2.0)
    assert torch.equal(guided.invert(x, CONDITION), expected)
    assert (expected - plain.invert(x, CONDITION)).abs().max() > 0.1
    assert torch.equal(guided.invert(x, CONDITION, guidance=1.0), plain.invert(x, CONDITION))
    sample = guided.sample(CONDITION, seeds=[1, 2, 3, 4])
    torch.testing.assert_close(guided.invert(sample, CONDITION), noise([1, 2, 3, 4]), rtol=1e-3, atol=1e-3)


def test_grids_of_shifted_times_are_followed_backwards():
    made = exact(objective=FlowMatching(times=LogitNormal(shift=3.0)))
    x = data()
    torch.testing.assert_close(made.invert(x, CONDITION), (x - MEAN) / STD, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- interpolation


def test_points_on_the_circle_keep_the_length_and_divide_the_angle():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 40, generator=generator)
    b = b * a.norm() / b.norm()
    points = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(points.flatten(1).norm(dim=1), a.norm().expand(5))
    torch.testing.assert_close(points[[0, 4]], torch.stack([a, b]), rtol=0, atol=0)
    steps = torch.nn.functional.cosine_similarity(points[:-1].flatten(1), points[1:].flatten(1))
    torch.testing.assert_close(steps, steps[:1].expand(4))


def test_a_circle_through_one_direction_is_a_line_and_through_opposite_ones_an_error():
    a = torch.tensor([3.0, 4.0])
    expected = torch.tensor([[3.0, 4.0], [4.5, 6.0], [6.0, 8.0]])
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0, 0.5, 1])), expected)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(1,\)"):
        slerp(a, a[:1], torch.tensor([0.5]))


def test_interpolation_of_seeds_begins_and_ends_at_their_samples():
    made, label = exact(), Condition(label=torch.tensor([1]))
    path = made.interpolate(7, 9, 5, label)
    assert path.shape == (5, 1, 2, 2)
    ends = made.sample(Condition(label=torch.tensor([1, 1])), seeds=[7, 9])
    torch.testing.assert_close(path[[0, 4]], ends, rtol=0, atol=1e-6)
    middle = 1 + STD * slerp(*noise([7, 9]), torch.tensor([0.5]))
    torch.testing.assert_close(path[2:3], middle, rtol=1e-4, atol=1e-4)


def test_interpolation_of_data_begins_and_ends_at_the_data_each_under_its_own_condition():
    made, x = exact(), data(2)
    path = made.interpolate(x[0], x[1], 4, Condition(label=torch.tensor([0, 2])))
    torch.testing.assert_close(path[[0, 3]], x, rtol=1e-4, atol=1e-4)
    z = slerp(x[0] / STD, (x[1] - 2) / STD, torch.tensor([1 / 3, 2 / 3]))
    expected = torch.tensor([0.0, 2.0]).reshape(-1, 1, 1, 1) + STD * z
    torch.testing.assert_close(path[1:3], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.interpolate(x[0], 3, 2)[:1], x[:1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- variation


@pytest.mark.parametrize("path", [None, VariancePreserving()])
@pytest.mark.parametrize("solver", [Midpoint(), EulerMaruyama()])
def test_strength_one_is_the_plain_sample_and_strength_zero_the_data(path, solver):
    objective = FlowMatching(**({} if path is None else {"path": path}))
    made, x = exact(objective=objective, solver=solver, steps=6), data()
    assert torch.equal(made.vary(x, 1.0, CONDITION, seed=5), made.sample(CONDITION, seed=5))
    assert torch.equal(made.vary(x, 0.0, CONDITION, seed=5), x)
    assert torch.equal(made.vary(x, 1e-9, CONDITION, seed=5), x)


@pytest.mark.parametrize("solver", [*(case[0] for case in DETERMINISTIC), DormandPrince(1e-6, 1e-6)], ids=str)
@pytest.mark.parametrize("strength", [0.3, 0.55])
def test_a_variation_follows_the_flow_from_the_noised_data(solver, strength):
    """A Gaussian flow keeps a point at its number of deviations: x_t = t m + sqrt(V_t) e goes to m + s e."""
    made, x, t = exact(), data(), 1 - strength
    found = made.vary(x, strength, CONDITION, solver=solver, steps=400 if isinstance(solver, Euler) else 40, seed=2)
    x_t = t * x + strength * noise(seeds_from(2, 4))
    deviation = math.sqrt(t**2 * STD**2 + strength**2)
    tolerance = 1e-2 if isinstance(solver, Euler) else 1e-3
    expected = MEAN + STD * (x_t - t * MEAN) / deviation
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [EulerMaruyama(), StochasticHeun()], ids=str)
def test_a_stochastic_variation_of_many_points_has_the_spread_of_the_data(solver):
    x = 2 + STD * data(250).sub(1)
    made = exact(solver=solver, steps=60)
    found = made.vary(x, 0.5, Condition(label=torch.full((250,), 2)))
    assert found.mean().item() == pytest.approx(2.0, abs=0.06)
    assert found.std().item() == pytest.approx(STD, rel=0.08)


def test_more_strength_leaves_less_of_the_data():
    made, x = model(ToGaussian(std=1.0), **FINE), data(200)
    left = [float(torch.corrcoef(torch.stack([x.flatten(), made.vary(x, s).flatten()]))[0, 1]) for s in (0.2, 0.5, 0.8)]
    expected = [(1 - s) / math.hypot(1 - s, s) for s in (0.2, 0.5, 0.8)]
    assert left == pytest.approx(expected, abs=0.06)


# ---------------------------------------------------------------------- independence and modes


def test_a_result_does_not_depend_on_the_batch_around_it():
    made, x = model(), torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone, first = Condition(label=LABEL[2:3]), seeds_from(3, 4)[2:3]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(made.invert(x, CONDITION)[2:3], made.invert(x[2:3], alone), **close)
    for solver in (Midpoint(), EulerMaruyama()):
        together = made.vary(x, 0.6, CONDITION, seed=3, solver=solver)
        torch.testing.assert_close(together[2:3], made.vary(x[2:3], 0.6, alone, seeds=first, solver=solver), **close)


def test_they_run_in_eval_mode_without_gradients_and_leave_the_mode():
    made = exact(steps=2).train()
    x = data().requires_grad_()
    results = [made.reconstruct(x).x, made.vary(x, 0.5), made.interpolate(1, 2, 2), made.invert(x)]
    assert not any(result.requires_grad for result in results)
    assert not any(made.network.modes)
    assert made.training
    assert made.network.training


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.invert(x, solver=EulerMaruyama()),
        lambda m, x: m.reconstruct(x, solver=EulerMaruyama()),
        lambda m, x: m.interpolate(1, 2, 3, solver=EulerMaruyama()),
        lambda m, x: m.from_noise(x, solver=EulerMaruyama()),
    ],
)
def test_a_stochastic_solver_has_no_inverse(call):
    with pytest.raises(ValueError, match=r"solver must be deterministic for .*, got EulerMaruyama"):
        call(exact(), data())


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_is_a_share(strength):
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got"):
        exact().vary(data(), strength)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.interpolate(1, 2, 1), "n must be at least 2"),
        (lambda m, x: m.interpolate(1, 2, 3, CONDITION), r"batch size 1 \(of all\) or 2 \(of both ends\), got 4"),
        (lambda m, x: m.invert(x[:3], CONDITION), "number of samples disagrees.*'n': 3, 'condition': 4"),
        (lambda m, x: m.from_noise(x[:3], CONDITION), "number of samples disagrees.*'n': 3, 'condition': 4"),
        (lambda m, x: m.vary(x, 0.5, seeds=[1]), "number of samples disagrees.*'n': 4, 'seeds': 1"),
        (lambda m, x: m.vary(x, 0.5, seed=1, seeds=[1, 2, 3, 4]), "exclude each other"),
        (lambda m, x: m.vary(x, 0.5, Condition(vector=torch.zeros(4, 2))), r"'vector', but ToGaussian reads"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(exact(), data())
