"""Laws of flow matching: its minimum, its minimiser, its samples apart from each other."""

import pytest
import torch
from torch import nn

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.couplings import OptimalTransport
from lightning_flows.flow.noise import StepNoise
from lightning_flows.flow.objectives import FlowMatching
from lightning_flows.flow.paths import QUANTITIES, Linear, Trigonometric
from lightning_flows.flow.premetrics import PseudoHuber
from lightning_flows.flow.times import LogitNormal, Uniform

PATHS = [Linear(), Linear(sigma_min=0.05), Trigonometric()]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", QUANTITIES)


class Oracle(nn.Module):
    """The closed-form minimiser, with a gain and an offset that are right at 1 and 0."""

    def __init__(self, field, prediction):
        super().__init__()
        self.field, self.prediction = field, prediction
        self.gain, self.offset = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self.conditions = []

    def forward(self, x, t, condition=None):
        self.conditions.append(condition)
        value = self.field(x, t)
        value = self.field.path.convert(value, x, t, given="velocity", to=self.prediction)
        return self.gain * value + self.offset

    def drop(self, condition, generator):
        lost = torch.rand(condition.batch_size, generator=generator) < 0.5
        return condition.absent("label", where=lost)


def data(field, n=20_000, dims=4, seed=0):
    x = torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))
    return field.mean + field.scale * x


def least(path, prediction, scale, t):
    """The variance of the target given x_t: what no network can go below."""
    a, s, da, ds = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    total = a**2 * scale**2 + s**2
    if prediction == "velocity":
        return (da * scale) ** 2 + ds**2 - (da * a * scale**2 + ds * s) ** 2 / total
    return (scale * s) ** 2 / total if prediction == "data" else (scale * a) ** 2 / total


@every_path
@every_prediction
def test_the_exact_field_reaches_the_analytic_minimum(path, prediction, gaussian_field):
    field = gaussian_field(path)
    losses = FlowMatching(path, prediction=prediction)(Oracle(field, prediction), data(field), None, StepNoise(0))
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    expected = least(path, prediction, field.scale, t).mean().item()
    assert losses.loss.mean().item() == pytest.approx(expected, rel=0.03)


@every_path
@every_prediction
def test_the_gradient_vanishes_there_and_every_change_costs(path, prediction, gaussian_field):
    field = gaussian_field(path)
    network, x1 = Oracle(field, prediction), data(field)
    objective = FlowMatching(path, times=LogitNormal(), prediction=prediction)

    def loss():
        return objective(network, x1, None, StepNoise(0)).loss.mean()

    base = loss()
    gradients = torch.autograd.grad(base, [network.gain, network.offset])
    assert max(abs(float(g)) for g in gradients) < 0.05
    for parameter, change in ((network.gain, 0.2), (network.gain, -0.2), (network.offset, 0.3)):
        with torch.no_grad():
            parameter += change
            assert loss() > base
            parameter -= change


def test_losses_are_one_a_sample_and_samples_do_not_feel_each_other(gaussian_field):
    field = gaussian_field()
    network, x1 = Oracle(field, "velocity"), data(field, 6)
    losses = FlowMatching(Linear())(network, x1, None, StepNoise(0))
    assert losses.loss.shape == losses.logs["t"].shape == losses.logs["squared_error"].shape == (6,)
    torch.testing.assert_close(losses.loss, losses.logs["squared_error"])
    assert losses.loss.requires_grad
    assert not losses.logs["squared_error"].requires_grad
    changed = x1.clone()
    changed[2] += 1
    after = FlowMatching(Linear())(network, changed, None, StepNoise(0)).loss
    assert torch.equal((after != losses.loss).nonzero().flatten(), torch.tensor([2]))


def test_the_loss_is_repeated_by_its_key_and_changes_with_the_step(gaussian_field):
    field = gaussian_field()
    network, x1, objective = Oracle(field, "velocity"), data(field, 6), FlowMatching(Linear())
    first = objective(network, x1, None, StepNoise(0, step=3)).loss
    assert torch.equal(first, objective(network, x1, None, StepNoise(0, step=3)).loss)
    assert not torch.equal(first, objective(network, x1, None, StepNoise(0, step=4)).loss)
    assert not torch.equal(first, objective(network, x1, None, StepNoise(0, step=3, rank=1)).loss)


def test_the_loss_is_the_written_formula(gaussian_field):
    field = gaussian_field()
    network, x1, noise = Oracle(field, "velocity"), data(field, 5), StepNoise(7)
    losses = FlowMatching(Linear())(network, x1, None, noise)
    x0, t = noise.normal("source", x1), losses.logs["t"][:, None]
    x_t = t * x1 + (1 - t) * x0
    expected = (field(x_t, losses.logs["t"]) - (x1 - x0)).square().mean(1)
    torch.testing.assert_close(losses.loss.detach(), expected)


def test_given_noise_is_used_as_it_is_and_drawn_noise_is_coupled(gaussian_field):
    field = gaussian_field()
    network, x1, noise = Oracle(field, "velocity"), data(field, 8), StepNoise(1)
    drawn = noise.normal("source", x1)
    plain = FlowMatching(Linear())
    coupled = FlowMatching(Linear(), coupling=OptimalTransport())
    x0, _, _ = OptimalTransport()(drawn, x1)
    assert not torch.equal(x0, drawn)
    expected = plain(network, x1, None, noise, x0=x0).loss
    assert torch.equal(coupled(network, x1, None, noise).loss, expected)
    assert torch.equal(coupled(network, x1, None, noise, x0=x0).loss, expected)
    assert torch.equal(plain(network, x1, None, noise, x0=drawn).loss, plain(network, x1, None, noise).loss)


def test_conditions_are_dropped_in_training_only(gaussian_field):
    field = gaussian_field()
    network, x1, objective = Oracle(field, "velocity"), data(field, 32), FlowMatching(Linear())
    condition = Condition(label=torch.arange(32))
    objective(network.train(), x1, condition, StepNoise(0))
    objective(network.eval(), x1, condition, StepNoise(0))
    shown = [c.presence("label").sum().item() for c in network.conditions]
    assert 0 < shown[0] < 32
    assert shown[1] == 32
    assert bool(condition.presence("label").all())


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
def test_noise_loss_weighted_by_velocity_is_the_velocity_loss(path, gaussian_field):
    field = gaussian_field(path)
    x1, times = data(field, 64), LogitNormal()
    velocity, noise = Oracle(field, "velocity"), Oracle(field, "noise")
    plain = FlowMatching(path, times=times)(velocity, x1, None, StepNoise(0)).loss
    weighted = FlowMatching(path, times=times, prediction="noise", weighting="velocity")
    torch.testing.assert_close(weighted(noise, x1, None, StepNoise(0)).loss, plain, rtol=1e-3, atol=1e-4)


def test_score_loss_is_sigma_score_plus_noise(gaussian_field):
    field = gaussian_field()
    x1, times = data(field, 16), LogitNormal()
    score = FlowMatching(Linear(), times=times, prediction="score")(Oracle(field, "score"), x1, None, StepNoise(0))
    noise = FlowMatching(Linear(), times=times, prediction="noise")(Oracle(field, "noise"), x1, None, StepNoise(0))
    torch.testing.assert_close(score.loss, noise.loss, rtol=1e-3, atol=1e-5)


def test_times_follow_their_law(gaussian_field):
    field = gaussian_field()
    network, x1 = Oracle(field, "velocity"), data(field)
    for law, mean in ((Uniform(), 0.5), (Uniform(shift=3.0), None), (LogitNormal(mean=1.0), None)):
        t = FlowMatching(Linear(), times=law)(network, x1, None, StepNoise(0)).logs["t"]
        middles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        expected = (middles * law.density(middles)).mean().item() if mean is None else mean
        assert t.mean().item() == pytest.approx(expected, abs=0.01)


def test_another_premetric_changes_the_loss_and_not_the_logged_error(gaussian_field):
    field = gaussian_field()
    network, x1 = Oracle(field, "velocity"), data(field, 6)
    plain = FlowMatching(Linear())(network, x1, None, StepNoise(0))
    huber = FlowMatching(Linear(), premetric=PseudoHuber(0.1))(network, x1, None, StepNoise(0))
    assert torch.equal(plain.logs["squared_error"], huber.logs["squared_error"])
    assert not torch.equal(plain.loss, huber.loss)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prediction": "epsilon"}, "prediction"),
        ({"weighting": "min-snr"}, "weighting"),
        ({"weighting": "velocity"}, "weighting"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        FlowMatching(Linear(), **arguments)
