import pytest
import torch
from torch import nn

from lightning_flows.flow import Condition
from lightning_flows.networks import DiT, ReversedTime, check_condition
from lightning_flows.store import Recorded


class TimesX(Recorded, nn.Module):
    """``t x``: a field whose solutions are known."""

    shape, streams, in_channels = (1, 2, 2), (), 1

    def forward(self, x, t, condition=None):
        return x * t.reshape(-1, 1, 1, 1)


def classes():
    network = DiT(4, hidden_size=8, depth=1, num_heads=2, num_classes=3, label_dropout=0.5, in_channels=2)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return network.eval()


def test_a_velocity_is_read_at_the_other_time_and_turned_around():
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(ReversedTime(TimesX())(x, t), -TimesX()(x, 1 - t))


@pytest.mark.parametrize("prediction", ["noise", "data", "score"])
def test_other_predictions_keep_their_sign(prediction):
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0.0, 0.25, 1.0])
    ours = ReversedTime(TimesX(), prediction=prediction)
    torch.testing.assert_close(ours(x, t), TimesX()(x, 1 - t))


def test_twice_reversed_is_the_network_itself():
    network = classes()
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([0.25, 0.75])
    condition = Condition(label=torch.tensor([0, 2]))
    twice = ReversedTime(ReversedTime(network))
    torch.testing.assert_close(twice(x, t, condition), network(x, t, condition))


def test_their_solution_is_ours_run_backwards():
    x, steps = torch.ones(1, 1, 2, 2), 8
    theirs, ours = x, x
    for i in range(steps):  # theirs from 1 to 0, ours from 0 to 1, Euler
        theirs = theirs - TimesX()(theirs, torch.tensor(1 - i / steps)) / steps
        ours = ours + ReversedTime(TimesX())(ours, torch.tensor(i / steps)) / steps
    torch.testing.assert_close(ours, theirs)


def test_everything_else_passes_through():
    network = classes()
    ours = ReversedTime(network)
    label = Condition(label=torch.tensor([0, 1, 2]))
    assert (ours.shape, ours.streams, ours.in_channels) == (network.shape, ("label",), 2)
    assert not ours.null(label, 3).presence("label").any()
    dropped = [n.drop(label, torch.Generator().manual_seed(3)).presence("label") for n in (ours, network)]
    assert torch.equal(*dropped)
    check_condition(ours, label)
    assert all(name.startswith("network.") for name in ours.state_dict())
    assert ours.config["init_args"]["network"] == network.config


def test_an_unknown_prediction_is_an_error():
    with pytest.raises(ValueError, match=r"prediction.*velocity.*'flow'"):
        ReversedTime(TimesX(), prediction="flow")
