"""Laws of guidance, and its numbers against diffusers' guiders."""

import dataclasses

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.fields import Field, Velocity
from lightning_flows.flow.guidance import (
    AdaptiveProjected,
    Autoguidance,
    ClassifierFree,
    RatioAware,
    ZeroStar,
)
from lightning_flows.flow.paths import Linear, Trigonometric
from lightning_flows.flow.solvers import DormandPrince, Euler
from lightning_flows.flow.times import time_grid


class Toy:
    """A conditional velocity network (B, 4, 3, 3) that notes the batch size and the times of each call."""

    streams = ("label",)

    def __init__(self, path=None, gain=1.0):
        weights = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(0))
        self.path, self.weights, self.gain, self.batches = path or Linear(), weights, gain, []

    def __call__(self, x, t, condition=None):
        self.batches.append(len(x))
        condition = condition or Condition()
        row = torch.full((len(x),), 3)
        if condition.label is not None:
            row = torch.where(condition.presence("label"), condition.label, 3)
        time = t.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1).to(x.dtype)
        return torch.sin(self.gain * self.weights[row].to(x) * x + time) + self.weights[row].to(x)

    def null(self, condition, batch_size):
        return condition.absent()


class Unconditional(Toy):
    streams = ()


class Guide(Toy):
    def __init__(self):
        super().__init__(gain=0.5)


RULES = [
    ClassifierFree(3.0),
    ZeroStar(3.0, zero_init_steps=0),
    AdaptiveProjected(3.0),
    AdaptiveProjected(3.0, eta=0.5, norm_threshold=1.0, momentum=-0.5),
    RatioAware(3.0, alpha=1.0),
    RatioAware(3.0, alpha=0.5, power=2),
    Autoguidance(Guide(), 3.0),
]
NULL_RULES = RULES[:-1]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
null_rule = pytest.mark.parametrize("rule", NULL_RULES, ids=repr)


@pytest.fixture
def point():
    x = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor(0.4), Condition(label=torch.tensor([0, 1, 2]))


def branches(network, x, t, condition):
    return network(x, t, condition), network(x, t, condition.absent())


@every_rule
def test_scale_one_is_the_conditional_velocity_in_one_plain_call(rule, point):
    network = Toy()
    off = dataclasses.replace(rule, scale=1.0).begin()
    assert torch.equal(off(network, *point), Toy()(*point))
    assert network.batches == [3]
    assert not off.stateful


@pytest.mark.parametrize("scale", [1.001, 0.999])
@every_rule
def test_scale_near_one_is_near_the_conditional_velocity(rule, scale, point):
    near = dataclasses.replace(rule, scale=scale).begin()(Toy(), *point)
    torch.testing.assert_close(near, Toy()(*point), atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
@null_rule
def test_equal_branches_are_left_as_they_are_by_any_scale(rule, scale, point):
    x, t, condition = point
    unknown = condition.absent()
    guided = dataclasses.replace(rule, scale=scale).begin()(Toy(), x, t, unknown)
    torch.testing.assert_close(guided, Toy()(x, t, unknown), atol=2e-6, rtol=1e-6)


@null_rule
def test_both_branches_share_one_call_on_a_doubled_batch(rule, point):
    network = Toy()
    rule.begin()(network, *point)
    assert network.batches == [6]


@every_rule
def test_every_channel_is_guided(rule, point):
    change = rule.begin()(Toy(), *point) - Toy()(*point)
    assert bool((change.abs().amax((2, 3)) > 1e-3).all())


@every_rule
def test_times_may_be_one_number_or_one_a_sample(rule, point):
    x, t, condition = point
    torch.testing.assert_close(rule.begin()(Toy(), x, t.expand(3), condition), rule.begin()(Toy(), x, t, condition))


@every_rule
def test_samples_do_not_feel_each_other(rule, point):
    x, t, condition = point
    alone = torch.cat([rule.begin()(Toy(), x[i : i + 1], t, condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(rule.begin()(Toy(), x, t, condition), alone)


@every_rule
def test_outside_the_interval_only_the_conditional_branch_is_called(rule, point):
    x, _, condition = point
    limited = dataclasses.replace(rule, interval=(0.2, 0.5))
    for time in (0.1, 0.6):
        network, t = Toy(), torch.tensor(time)
        assert torch.equal(limited.begin()(network, x, t, condition), Toy()(x, t, condition))
        assert network.batches == [3]
    for time in (0.2, 0.4, 0.5):
        t = torch.tensor(time, dtype=torch.float64)
        assert torch.equal(limited.begin()(Toy(), x, t, condition), rule.begin()(Toy(), x, t, condition))


@every_rule
def test_an_interval_holds_for_each_sample_apart(rule, point):
    x, _, condition = point
    limited, t = dataclasses.replace(rule, interval=(0.2, 0.5)), torch.tensor([0.1, 0.4, 0.9])
    mixed = limited.begin()(Toy(), x, t, condition)
    plain, guided = Toy()(x, t, condition), rule.begin()(Toy(), x, t, condition)
    torch.testing.assert_close(mixed, torch.stack([plain[0], guided[1], plain[2]]))


@null_rule
def test_a_network_without_condition_or_a_call_without_one_is_refused(rule, point):
    x, t, condition = point
    with pytest.raises(ValueError, match="scale"):
        rule.begin()(Unconditional(), x, t, condition)
    for missing in (None, Condition()):
        with pytest.raises(ValueError, match="condition"):
            rule.begin()(Toy(), x, t, missing)
    off = dataclasses.replace(rule, scale=1.0).begin()
    assert off(Unconditional(), x, t, None).shape == x.shape


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_goes_through(rule, dtype, point):
    x, t, condition = point
    assert rule.begin()(Toy(), x.to(dtype), t, condition).dtype == dtype


@every_rule
def test_gradients_pass_through(rule, point):
    x, t, condition = point
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rule.begin()(Toy(), x, t, condition).sum(), x)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().sum() > 0


# ---------------------------------------------------------------------- formulas, and diffusers


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_classifier_free_equals_diffusers(scale, point):
    wanted, worse = branches(Toy(), *point)
    theirs = ClassifierFreeGuidance(guidance_scale=scale).forward(wanted, worse).pred
    torch.testing.assert_close(ClassifierFree(scale)(Toy(), *point), theirs)
    torch.testing.assert_close(theirs, worse + scale * (wanted - worse))


@pytest.mark.parametrize("zero_init_steps", [0, 1, 2])
def test_zero_star_equals_diffusers_step_by_step(zero_init_steps, point):
    x, _, condition = point
    theirs = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=zero_init_steps)
    ours = ZeroStar(4.0, zero_init_steps=zero_init_steps).begin()
    for step, t in enumerate(time_grid(4)[:-1]):
        theirs.set_state(step, 4, None)
        wanted, worse = branches(Toy(), x, t, condition)
        torch.testing.assert_close(ours(Toy(), x, t, condition), theirs.forward(wanted, worse).pred)


def test_zero_star_rescales_a_parallel_null_velocity_away(point):
    class Parallel(Toy):
        def __call__(self, x, t, condition=None):
            known = condition.presence("label").reshape(-1, 1, 1, 1)
            return torch.where(known, 1.0, 0.3) * x

    x, t, condition = point
    guided = ZeroStar(5.0, zero_init_steps=0)(Parallel(), x, t, condition)
    torch.testing.assert_close(guided, x)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
@pytest.mark.parametrize(
    ("eta", "threshold", "momentum"),
    [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.3, 2.0, 0.0), (0.0, 0.0, -0.5), (0.5, 1.5, 0.4)],
)
def test_adaptive_projected_equals_diffusers_on_data_predictions(path, eta, threshold, momentum, point):
    x, _, condition = point
    scale, network = 4.0, Toy(path)
    # their "original formulation" is c + w (c - u), off at w = 0: ours with scale = 1 + w
    theirs = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        adaptive_projected_guidance_momentum=momentum or None,
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
        use_original_formulation=True,
    )
    ours = AdaptiveProjected(scale, eta=eta, norm_threshold=threshold, momentum=momentum).begin()
    for step, t in enumerate(time_grid(5)[:-1]):
        theirs.set_state(step, 5, None)
        theirs.prepare_inputs({"x": (x, x)})
        wanted, worse = (path.convert(v, x, t, given="velocity", to="data") for v in branches(network, x, t, condition))
        data = theirs.forward(wanted, worse).pred
        guided = ours(network, x, t, condition)
        torch.testing.assert_close(path.convert(guided, x, t, given="velocity", to="data"), data, atol=1e-5, rtol=1e-4)


def test_plain_projection_settings_are_classifier_free_guidance(point):
    plain = AdaptiveProjected(4.0, eta=1.0)
    torch.testing.assert_close(plain(Toy(), *point), ClassifierFree(4.0)(Toy(), *point))


def test_projected_guidance_moves_the_data_prediction_no_further_than_its_threshold(point):
    x, t, condition = point
    network, scale, radius = Toy(), 5.0, 0.25
    guided = AdaptiveProjected(scale, eta=1.0, norm_threshold=radius)(network, x, t, condition)
    moved = (1 - t) * (guided - network(x, t, condition))
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((3,), (scale - 1) * radius))


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_projected_guidance_is_finite_at_both_ends(momentum, point):
    x, _, condition = point
    rule = AdaptiveProjected(4.0, norm_threshold=1.0, momentum=momentum).begin()
    for t in time_grid(3):
        assert bool(rule(Toy(), x, t, condition).isfinite().all())


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_autoguidance_equals_diffusers(scale, point):
    guide, network = Guide(), Toy()
    theirs = AutoGuidance(guidance_scale=scale, auto_guidance_layers=[0], dropout=0.1)
    expected = theirs.forward(network(*point), guide(*point)).pred
    torch.testing.assert_close(Autoguidance(guide, scale)(network, *point), expected)


def test_autoguidance_calls_each_network_once_and_serves_unconditional_ones(point):
    x, t, _ = point
    guide, network = Guide(), Unconditional()
    Autoguidance(guide, 2.0)(network, x, t, None)
    assert (network.batches, guide.batches) == ([3], [3])
    Autoguidance(guide, 1.0)(network, x, t, None)
    assert guide.batches == [3]


@pytest.mark.parametrize("power", [1, 2])
def test_ratio_aware_follows_its_formula(power, point):
    wanted, worse = branches(Toy(), *point)
    rho = ((wanted - worse).flatten(1).norm(dim=1) / worse.flatten(1).norm(dim=1)) ** power
    weight = (1 + 5 * torch.exp(-2.0 * rho)).reshape(-1, 1, 1, 1)
    expected = worse + weight * (wanted - worse)
    torch.testing.assert_close(RatioAware(6.0, alpha=2.0, power=power)(Toy(), *point), expected)


def test_ratio_aware_with_alpha_zero_is_plain_guidance_and_survives_a_still_null_branch(point):
    torch.testing.assert_close(RatioAware(4.0, alpha=0.0)(Toy(), *point), ClassifierFree(4.0)(Toy(), *point))
    x = point[0]
    still = RatioAware(4.0)._combine(x, torch.zeros_like(x), x, point[1], Linear())
    torch.testing.assert_close(still, x)  # infinite ratio: weight 1
    rest = RatioAware(4.0)._combine(0 * x, 0 * x, x, point[1], Linear())
    assert torch.equal(rest, 0 * x)


# ---------------------------------------------------------------------- state


def test_flags_say_who_remembers():
    stateful = [ZeroStar(2.0), AdaptiveProjected(2.0, momentum=-0.5)]
    stateless = [
        ClassifierFree(2.0),
        ZeroStar(2.0, zero_init_steps=0),
        AdaptiveProjected(2.0),
        RatioAware(2.0),
    ]
    assert all(rule.stateful for rule in stateful)
    assert not any(rule.stateful for rule in [*stateless, Autoguidance(Guide(), 2.0)])


@pytest.mark.parametrize("rule", [ZeroStar(3.0), AdaptiveProjected(3.0, momentum=-0.5)], ids=repr)
def test_each_solve_starts_afresh_and_the_configuration_is_never_touched(rule, point):
    x, _, condition = point
    grid = time_grid(4)

    def solve():
        return Euler().solve(Field(Velocity(Toy()), condition, rule), x, grid).x

    before = (repr(rule), dict(dataclasses.asdict(rule)))
    assert torch.equal(solve(), solve())
    assert (repr(rule), dict(dataclasses.asdict(rule))) == before
    with pytest.raises(RuntimeError, match="begin"):
        rule(Toy(), x, grid[0], condition)


def test_a_new_beginning_forgets(point):
    rule = ZeroStar(3.0).begin()
    assert rule(Toy(), *point).abs().sum() == 0
    assert rule(Toy(), *point).abs().sum() > 0
    assert rule.begin()(Toy(), *point).abs().sum() == 0


def test_adaptive_solvers_refuse_a_guidance_that_remembers(point):
    x, _, condition = point
    with pytest.raises(ValueError, match="ZeroStar"):
        DormandPrince().solve(Field(Velocity(Toy()), condition, ZeroStar(2.0)), x, time_grid(1))
    end = DormandPrince().solve(Field(Velocity(Toy()), condition, ClassifierFree(2.0)), x, time_grid(1)).x
    assert bool(end.isfinite().all())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ClassifierFree(-1.0), "scale"),
        (lambda: ClassifierFree(float("nan")), "scale"),
        (lambda: ClassifierFree(2.0, (0.5, 0.5)), "interval"),
        (lambda: ClassifierFree(2.0, (-0.1, 0.5)), "interval"),
        (lambda: ClassifierFree(2.0, (0.0, 1.5)), "interval"),
        (lambda: ZeroStar(2.0, zero_init_steps=-1), "zero_init_steps"),
        (lambda: ZeroStar(2.0, zero_init_steps=0.5), "zero_init_steps"),
        (lambda: AdaptiveProjected(2.0, norm_threshold=-1.0), "norm_threshold"),
        (lambda: AdaptiveProjected(2.0, momentum=1.0), "momentum"),
        (lambda: AdaptiveProjected(2.0, eta=float("inf")), "eta"),
        (lambda: AdaptiveProjected(2.0, floor=0.0), "floor"),
        (lambda: RatioAware(2.0, alpha=-1.0), "alpha"),
        (lambda: RatioAware(2.0, power=3), "power"),
    ],
)
def test_arguments_out_of_range_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_an_interval_from_yaml_is_a_list_and_means_the_same():
    assert ClassifierFree(2.0, [0, 0.5]) == ClassifierFree(2.0, (0.0, 0.5))
