"""The preconditioned velocity: nothing to copy, no noise shown as data, the exact velocity for the exact F."""

import pytest
import torch

from lightning_flows import Condition
from lightning_flows.flow import Linear
from lightning_flows.networks import ADMUNet, Preconditioned
from lightning_flows.store import Recorded, build, config_of
from tests.modules.tiny import awake, dit

TIMES = [0.0, 0.1, 0.5, 0.9, 1.0]


class Known(Recorded, torch.nn.Module):
    """F of known ends, and what it was called with."""

    ends: tuple[torch.Tensor, torch.Tensor]

    def __init__(self):
        super().__init__()

    def forward(self, x, t, condition=None):
        self.seen = x
        x0, x1 = self.ends
        t = t.reshape(-1, 1, 1, 1)
        return ((1 - t) * x1 - t * x0) / (t**2 + (1 - t) ** 2).sqrt()


def preconditioned(*ends, **options):
    known = Known()
    known.ends = ends
    return Preconditioned(known, **options)


@pytest.mark.parametrize("t", TIMES)
def test_the_exact_f_gives_the_exact_velocity(t):
    x0, x1 = torch.randn(2, 5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    point = Linear().sample(x0, x1, torch.full((5,), t))
    found = preconditioned(x0, x1)(point.x_t, point.t)
    torch.testing.assert_close(found, point.velocity, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("t", TIMES)
def test_the_target_has_unit_variance_and_is_uncorrelated_with_the_point(t):
    x0, x1 = torch.randn(2, 4000, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = preconditioned(x0, x1)
    network, point = whole.network, Linear().sample(x0, x1, torch.full((4000,), t))
    whole(point.x_t, point.t)
    target = network(network.seen, point.t)
    assert target.std().item() == pytest.approx(1, abs=0.01)
    assert (point.x_t * target).mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("t", TIMES)
def test_each_channel_is_seen_as_the_best_linear_estimate_of_its_clean_end(t):
    x0, x1 = torch.randn(2, 4000, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = preconditioned(x0, x1, codes=1)
    point = Linear().sample(x0, x1, torch.full((4000,), t))
    whole(point.x_t, point.t)
    for channel, clean in ((0, x1), (1, x0)):
        seen, x, wanted = whole.network.seen[:, channel], point.x_t[:, channel], clean[:, channel]
        slope = (x * wanted).mean() / x.square().mean()
        torch.testing.assert_close(seen, slope * x, atol=0.06, rtol=0)


@pytest.mark.parametrize(("t", "silent"), [(0.0, 0), (1.0, 1)])
def test_a_channel_of_noise_is_silent(t, silent):
    x0, x1 = torch.randn(2, 5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = preconditioned(x0, x1, codes=1)
    whole(torch.randn(5, 2, 3, 4), torch.full((5,), t))
    assert not whole.network.seen[:, silent].any()
    assert whole.network.seen[:, 1 - silent].all()


def planes(count, places=(3, 4)):
    """Clean codes that are the same at every place, and their noise."""
    values = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    return values.expand(-1, -1, *places).contiguous(), torch.randn(count, 2, *places)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_constant_planes_have_the_exact_velocity_from_the_exact_mean(t):
    y, e = planes(5)
    whole = preconditioned(y, e, codes=2, constant=2)
    point = Linear().sample(y, e, torch.full((5,), t))
    found = whole(point.x_t, point.t)
    mean = e.mean((2, 3), keepdim=True) if t == 0 else e  # at t = 0 nothing is known of the noise at a place
    torch.testing.assert_close(found, mean - y, atol=5e-3, rtol=5e-3)


def test_a_network_sees_the_mean_of_constant_planes_and_places_vote():
    y, e = planes(5)
    image = torch.randn(5, 1, 3, 4)
    whole = preconditioned(torch.randn(5, 3, 3, 4), torch.randn(5, 3, 3, 4), codes=2, constant=2)
    x, t = torch.cat([image, 0.5 * y + 0.5 * e], dim=1), torch.tensor(0.5)
    first = whole(x, t)
    seen = whole.network.seen
    torch.testing.assert_close(seen[:, :1], image)  # t s^2 is 1 there
    torch.testing.assert_close(seen[:, 1:], x[:, 1:].mean((2, 3), keepdim=True).expand(-1, -1, 3, 4))
    x0, x1 = whole.network.ends
    whole.network.ends = (x0, x1.flip(3))  # other words at each place, the same mean of them
    second = whole(x, t)
    torch.testing.assert_close(second[:, 1:], first[:, 1:])
    assert (second[:, :1] - first[:, :1]).abs().max() > 1e-2


def test_one_step_from_an_image_reads_constant_planes_that_are_constant():
    whole = preconditioned(torch.randn(5, 3, 3, 4), torch.randn(5, 3, 3, 4), codes=2, constant=2)
    x = torch.randn(5, 3, 3, 4)
    read = (x - whole(x, torch.ones(5)))[:, 1:]
    torch.testing.assert_close(read, read[..., :1, :1].expand_as(read), atol=1e-5, rtol=1e-5)
    assert read.std() > 0.1


@pytest.mark.parametrize("t", [0.0, 1e-4, 1e-3, 1e-2])
def test_planes_that_should_be_constant_and_are_not_give_a_bounded_velocity(t):
    whole = preconditioned(torch.zeros(5, 2, 3, 4), torch.zeros(5, 2, 3, 4), codes=2, constant=2)
    x = torch.randn(5, 2, 3, 4)
    assert whole(x, torch.tensor(t)).abs().max() < 51 * x.abs().max() + 1


def test_wrong_numbers_of_codes_are_named():
    with pytest.raises(ValueError, match="constant must lie between 0 and codes=2, got 3"):
        Preconditioned(Known(), codes=2, constant=3)
    with pytest.raises(ValueError, match="codes must not be negative, got -1"):
        Preconditioned(Known(), codes=-1)
    with pytest.raises(ValueError, match="3 codes"):
        Preconditioned(Known(), codes=3)(torch.randn(1, 2, 3, 4), torch.tensor(0.5))


def test_times_of_one_and_of_each_sample_agree():
    network, x = Preconditioned(awake(dit(num_classes=3))), torch.randn(4, *dit().shape)
    condition = Condition(label=torch.tensor([0, 1, 2, 0]))
    each = network(x, torch.full((4,), 0.3), condition)
    assert torch.equal(network(x, torch.tensor(0.3), condition), each)
    assert network.streams == ("label",)
    assert network.shape == dit().shape


def test_its_config_builds_it_again():
    network = Preconditioned(
        ADMUNet(input_size=8, in_channels=2, hidden_size=32, channel_mult=[1], attention_factors=[])
    )
    again = build(config_of(network), torch.nn.Module)
    assert isinstance(again, Preconditioned)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert config_of(again) == config_of(network)
