"""What sampling and training are measured against is the same model, and the bars are read from the tables."""

import pytest
import torch

from benchmarks import flow_sampling, flow_step
from benchmarks.published_flow import PublishedTARFlow
from lightning_flows.flow import Condition, LogLinear
from lightning_flows.networks import Sequential

SIZES = {"input_size": 8, "hidden_size": 32, "num_blocks": 3, "depth": 1, "head_size": 16, "num_classes": 3}
LABEL = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("how", ["list", "running"])
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_the_published_loop_draws_what_ours_draws(how, weight):
    ours = flow_step.network(**SIZES).eval()
    z = torch.randn(4, *ours.shape)
    guidance = LogLinear(1 + weight)
    with torch.no_grad():
        found = ours.inverse(z, Condition(label=LABEL), guidance=guidance, method=Sequential())
    torch.testing.assert_close(PublishedTARFlow(ours).sample(z, LABEL, weight, how), found, rtol=1e-4, atol=1e-5)


def test_the_published_step_has_the_loss_of_ours():
    ours = flow_step.network(**SIZES)
    x = torch.rand(4, *ours.shape) * 2 - 1
    own, published = flow_step.losses(ours, PublishedTARFlow(ours), x, LABEL)
    torch.testing.assert_close(own, published)
    assert abs(float(own.detach())) > 1e-3


def test_steps_are_taken_in_turn_and_timed():
    made = flow_step.contenders(flow_step.network(**SIZES), 4, mixed=False)
    before = [p.detach().clone() for p in made["ours"].network.parameters()]
    flow_step.measure(made, 2)
    assert all(len(contender.wall) == len(contender.cpu) == 2 for contender in made.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, made["ours"].network.parameters(), strict=True))


def test_a_choice_that_is_slower_than_token_by_token_misses_its_bar():
    rows = [
        {"method": name, "batch": 1, "cpu_ratio": ratio}
        for name, ratio in (("token by token", 1.0), ("Jacobi 16", 1.2), ("automatic", 1.2))
    ]
    assert len(flow_sampling.missed_jacobi(rows)) == 2
    for row in rows:
        row["cpu_ratio"] = min(row["cpu_ratio"], 0.9)
    assert flow_sampling.missed_jacobi(rows) == []
