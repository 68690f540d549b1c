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


def test_wrong_numbers_of_codes_are_named():
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
