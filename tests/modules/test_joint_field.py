"""The field of a pair: hidden codes on their line, guidance of the image alone, an image that is held."""

import pytest
import torch
from torch import nn

from lightning_flows.flow import ClassifierFree, Euler, Heun, Linear, RatioAware, SampleNoise, ZeroStar
from lightning_flows.flow.times import time_grid
from lightning_flows.modules.joint_field import Held, Hidden, JointField, joint

C, S = 2, 3
PATH = Linear(1e-4)
SEEDS = [5, 6, 7]


class Net(nn.Module):
    """A velocity that mixes all channels and depends on time; counts its rows."""

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(C + S, C + S, generator=torch.Generator().manual_seed(0)) / 3
        self.rows = []

    def forward(self, x, t, condition=None):
        assert condition is None
        self.rows.append(len(x))
        return torch.einsum("oc,bchw->bohw", self.mix, x).tanh() + t


def state(seeds=SEEDS):
    return SampleNoise(seeds).normal("state", torch.empty(len(seeds), C + S, 2, 2))


def hidden(seeds=SEEDS):
    return Hidden(SampleNoise(seeds), torch.empty(len(seeds), S, 2, 2), PATH)


def field(network=None, seeds=SEEDS, **options):
    options = {"hidden": hidden(seeds), **options}
    return JointField(network or Net(), C, PATH, **options)


T = torch.tensor(0.4)


def test_without_guidance_it_is_the_network():
    network = Net()
    assert torch.equal(JointField(network, C, PATH)(state(), T), network(state(), T))
    assert network.rows == [3, 3]


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_hidden_channels_follow_their_own_line(steps, solver):
    given, line = torch.zeros(3, S, dtype=torch.bool), hidden()
    given[0], given[1, 1] = True, True
    start = state()
    start[:, C:] = torch.where(given[:, :, None, None], start[:, C:], line.start)
    for step in solver.iterate(field(given=given), start, time_grid(steps)):
        expected = PATH.alpha(step.t) * line.end + PATH.sigma(step.t) * line.start
        torch.testing.assert_close(step.x[:, C:][~given], expected[~given], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(step.x[:, C:][given], line.end[given]).all()


def test_given_channels_and_the_image_move_by_the_network():
    given = torch.tensor([[True, False, True]]).expand(3, S)
    plain, found = Net()(state(), T), field(given=given)(state(), T)
    assert torch.equal(found[:, :C], plain[:, :C])
    assert torch.equal(found[:, C:][given], plain[:, C:][given])


# ------------------------------------------------------------------ guidance


def test_guidance_extrapolates_the_image_and_never_the_code():
    network, w = Net(), 2.5
    found = field(network, guidance=ClassifierFree(w))(state(), T)
    assert network.rows == [6]  # both branches in one call
    wanted = network(state(), T)
    without = network(joint(state()[:, :C], hidden().at(T)), T)
    torch.testing.assert_close(found[:, :C], without[:, :C] + w * (wanted[:, :C] - without[:, :C]))
    torch.testing.assert_close(found[:, C:], wanted[:, C:])
    assert not torch.isclose(found[:, :C], wanted[:, :C]).any()


def test_scale_one_is_off():
    network = Net()
    found = field(network, guidance=ClassifierFree(1.0))(state(), T)
    assert network.rows == [3]
    assert torch.equal(found, network(state(), T))


def test_outside_of_its_interval_guidance_costs_nothing():
    network = Net()
    guided = field(network, guidance=ClassifierFree(3.0, interval=(0.5, 1.0)))
    assert torch.equal(guided(state(), T), network(state(), T))
    guided(state(), torch.tensor(0.6))
    assert network.rows == [3, 3, 6]


def test_a_code_that_is_hidden_altogether_is_not_guided():
    given = torch.ones(3, S, dtype=torch.bool)
    given[1] = False
    x = state()
    x[:, C:] = torch.where(given[:, :, None, None], x[:, C:], hidden().at(T))
    guided, plain = (field(given=given, guidance=rule)(x, T) for rule in (ClassifierFree(4.0), None))
    torch.testing.assert_close(guided[1], plain[1])
    assert not torch.isclose(guided[0, :C], plain[0, :C]).any()


@pytest.mark.parametrize("rule", [None, ClassifierFree(3.0), RatioAware(3.0)])
def test_a_sample_depends_on_its_own_seed_alone(rule):
    given = torch.tensor([[True] * 3, [False] * 3, [True, False, True]])
    together = field(given=given, guidance=rule)(state(), T)
    for i, seed in enumerate(SEEDS):
        alone = field(seeds=[seed], given=given[[i]], guidance=rule)(state([seed]), T)
        torch.testing.assert_close(together[[i]], alone)


def test_a_rule_that_lets_the_image_stand_still_does_not_stop_the_code():
    network = Net()
    guided = field(network, guidance=ZeroStar(2.0, zero_init_steps=1))
    assert guided.stateful
    first, second = guided(state(), T), guided(state(), T)
    assert torch.equal(first[:, :C], torch.zeros_like(first[:, :C]))
    assert torch.equal(first[:, C:], network(state(), T)[:, C:])
    assert (second[:, :C] != 0).all()
    assert not field(guidance=ClassifierFree(2.0)).stateful


# ------------------------------------------------------------------ held images


@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_a_held_image_follows_its_path_and_the_network_sees_it(solver):
    network, inside = Net(), torch.zeros(3, 1, 2, 2, dtype=torch.bool)
    inside[:, :, 0, 0] = True
    start, end = state()[:, :C], state([1, 2, 3])[:, :C]
    held = Held(field(network), start, end, inside, PATH)
    wrong = joint(torch.full_like(start, 9.0), state()[:, C:])  # outside, what stands in the state is not read
    right = joint(torch.where(inside, 9.0, PATH.sample(start, end, T).x_t), state()[:, C:])
    free = inside.expand(-1, C, -1, -1)
    assert torch.equal(held(wrong, T)[:, :C][free], network(right, T)[:, :C][free])
    assert torch.equal(held(wrong, T)[:, C:], network(right, T)[:, C:])
    for step in solver.iterate(held, state(), time_grid(4)):
        expected = PATH.alpha(step.t) * end + PATH.sigma(step.t) * start
        torch.testing.assert_close(step.x[:, :C][~free], expected[~free], rtol=1e-5, atol=1e-5)
    assert not held.stateful
