"""Laws of the paths: ends, derivatives, conversions."""

import itertools

import pytest
import torch

from lightning_flows.flow.paths import QUANTITIES, Linear, Trigonometric, VariancePreserving, expand

PATHS = [Linear(), Linear(sigma_min=1e-5), Linear(sigma_min=0.1), Trigonometric(), VariancePreserving()]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
DIRECTIONS = list(itertools.permutations(QUANTITIES, 2))


def pair(shape=(5, 2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
def test_ends_are_the_noise_and_the_data_exactly(path, dtype):
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert [float(path.alpha(zero)), float(path.sigma(zero))] == [0, 1]
    assert [float(path.alpha(one)), float(path.sigma(one))] == [1, 0]


def test_ends_of_the_other_paths_are_what_they_state():
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert [float(Linear(0.1).alpha(zero)), float(Linear(0.1).sigma(zero))] == [0, 1]
    assert float(Linear(0.1).alpha(one)) == 1
    assert float(Linear(0.1).sigma(one)) == pytest.approx(0.1)
    vp = VariancePreserving()
    assert [float(vp.alpha(one)), float(vp.sigma(one))] == [1, 0]
    assert float(vp.alpha(zero)) == pytest.approx(6.6e-3, rel=0.01)  # by design


@every_path
def test_target_velocity_is_the_time_derivative_of_the_point(path):
    x0, x1 = pair((9, 4))
    t, h = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1e-6
    later, earlier = path.sample(x0, x1, t + h), path.sample(x0, x1, t - h)
    gap = (later.x_t - earlier.x_t) / (2 * h) - path.sample(x0, x1, t).velocity
    assert gap.abs().max() < 1e-9


@every_path
def test_point_and_velocity_are_the_written_combination(path):
    x0, x1 = pair()
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    point, s = path.sample(x0, x1, t), t.reshape(5, 1, 1)
    torch.testing.assert_close(point.x_t, path.alpha(s) * x1 + path.sigma(s) * x0)
    torch.testing.assert_close(point.velocity, path.d_alpha(s) * x1 + path.d_sigma(s) * x0)
    assert point.x0 is x0
    assert point.x1 is x1
    assert point.t is t


def test_velocity_of_the_straight_path_is_data_minus_noise_at_every_time():
    x0, x1 = pair()
    for t in (0.0, 0.3, 1.0):
        velocity = Linear().sample(x0, x1, torch.full((5,), t)).velocity
        torch.testing.assert_close(velocity, x1 - x0, rtol=0, atol=0)


def test_velocity_of_the_straight_path_with_remaining_noise_is_the_published_target():
    x0, x1 = pair()
    t, s = torch.full((5,), 0.3, dtype=torch.float64), 0.1
    point = Linear(sigma_min=s).sample(x0, x1, t)
    torch.testing.assert_close(point.velocity, (x1 - (1 - s) * point.x_t) / (1 - (1 - s) * 0.3))


@every_path
@pytest.mark.parametrize(("given", "to"), DIRECTIONS)
def test_conversions_agree_with_the_pair_and_return(path, given, to):
    x0, x1 = pair()
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    point = path.sample(x0, x1, t)
    sigma = path.sigma(t).reshape(5, 1, 1)
    values = {"velocity": point.velocity, "data": x1, "noise": x0, "score": -x0 / sigma}
    turned = path.convert(values[given], point.x_t, t, given=given, to=to)
    torch.testing.assert_close(turned, values[to], rtol=1e-9, atol=1e-9)
    back = path.convert(turned, point.x_t, t, given=to, to=given)
    torch.testing.assert_close(back, values[given], rtol=1e-9, atol=1e-9)


@every_path
def test_a_conversion_to_itself_returns_the_value(path):
    x0, x1 = pair()
    assert path.convert(x0, x1, torch.tensor(0.5), given="noise", to="noise") is x0


@every_path
def test_one_time_for_all_is_the_same_as_one_each(path):
    x0, x1 = pair()
    one, each = torch.tensor(0.4, dtype=torch.float64), torch.full((5,), 0.4, dtype=torch.float64)
    for given, to in DIRECTIONS:
        torch.testing.assert_close(
            path.convert(x0, x1, one, given=given, to=to), path.convert(x0, x1, each, given=given, to=to)
        )


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
@pytest.mark.parametrize(("given", "to"), DIRECTIONS)
def test_with_a_floor_every_conversion_is_finite_at_both_ends(path, given, to):
    x0, x1 = (x.float() for x in pair())
    for t in (0.0, 1.0):
        assert bool(path.convert(x0, x1, torch.tensor(t), given=given, to=to, floor=0.02).isfinite().all())


@every_path
def test_a_floor_changes_nothing_away_from_the_ends(path):
    x0, x1 = pair()
    t = torch.full((5,), 0.5, dtype=torch.float64)
    for given, to in DIRECTIONS:
        assert torch.equal(
            path.convert(x0, x1, t, given=given, to=to, floor=0.02),
            path.convert(x0, x1, t, given=given, to=to),
        )


@every_path
def test_drift_form_gives_the_velocity_from_the_score(path):
    x0, x1 = pair()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    point, score = path.sample(x0, x1, t), -x0 / path.sigma(t).reshape(5, 1, 1)
    rate, w = (c.reshape(5, 1, 1) for c in path.drift(t))
    torch.testing.assert_close(rate * point.x_t + w * score, point.velocity)


@every_path
def test_determinant_is_negative_everywhere(path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert bool((path.determinant(t) < 0).all())
    assert bool(path.determinant(t).isfinite().all())


@every_path
def test_signal_to_noise_rises(path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert bool(((path.alpha(t) / path.sigma(t)).diff() > 0).all())


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_points_keep_the_dtype_of_the_data(path, dtype):
    x0, x1 = (x.to(dtype) for x in pair())
    point = path.sample(x0, x1, torch.rand(5, generator=torch.Generator().manual_seed(0)))
    assert point.x_t.dtype == point.velocity.dtype == dtype


def test_expand_broadcasts_times_over_samples():
    like = torch.zeros(3, 2, 4, 4)
    assert expand(torch.zeros(3), like).shape == (3, 1, 1, 1)
    assert expand(torch.zeros(()), like).shape == ()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Linear(sigma_min=1.0), "sigma_min"),
        (lambda: Linear(sigma_min=-0.1), "sigma_min"),
        (lambda: VariancePreserving(beta_min=0.0), "beta_min"),
        (lambda: VariancePreserving(beta_min=3.0, beta_max=2.0), "beta_max"),
    ],
)
def test_arguments_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_unknown_quantities_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="given"):
        Linear().convert(x, x, torch.tensor(0.5), given="epsilon", to="data")
    with pytest.raises(ValueError, match="to must"):
        Linear().convert(x, x, torch.tensor(0.5), given="data", to="x1")
