"""Learning rates in closed form, step by step."""

import math

import pytest
import torch

from lightning_flows.modules import WarmupConstant, WarmupCosine


def rates(schedule, steps, **options):
    """Rate of optimizer steps 1 to ``steps``."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, seen = schedule(optimizer, **options), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_constant_after_a_linear_rise(warmup):
    expected = [2.0 * min(1.0, (k + 1) / max(warmup, 1)) for k in range(8)]
    assert rates(WarmupConstant, 8, warmup_steps=warmup) == pytest.approx(expected)


def test_cosine_goes_from_the_rise_to_the_final_fraction():
    seen = rates(WarmupCosine, 14, total_steps=10, warmup_steps=2, final=0.1)
    assert seen[:2] == pytest.approx([1.0, 2.0])
    for k in range(2, 14):
        done = min(1.0, (k - 2) / 8)
        assert seen[k] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2))
    assert seen[6] == pytest.approx(2.0 * 0.55)  # halfway
    assert seen[10:] == pytest.approx([0.2] * 4)


def test_a_rise_may_begin_anywhere():
    seen = rates(WarmupCosine, 12, total_steps=10, warmup_steps=4, final=0.5, start=0.2)
    assert seen[:5] == pytest.approx([2.0 * (0.2 + 0.8 * k / 4) for k in range(5)])
    assert seen[7] == pytest.approx(2.0 * 0.75)  # halfway down
    assert seen[10:] == pytest.approx([1.0] * 2)
    assert rates(WarmupCosine, 9, total_steps=10, warmup_steps=4, first=0.7)[0] == pytest.approx(1.4)
    plain, other = ({"total_steps": 10, "warmup_steps": 4, **more} for more in ({}, {"first": 0.7}))
    assert rates(WarmupCosine, 9, **plain)[1:] == rates(WarmupCosine, 9, **other)[1:]


def test_a_rise_may_be_a_cosine_and_then_is_one_cycle():
    seen = rates(WarmupCosine, 12, total_steps=11, warmup_steps=3, start=0.1, final=0.2, rise="cosine")
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    options = {"max_lr": 2.0, "total_steps": 12, "pct_start": 4 / 12, "div_factor": 10, "final_div_factor": 0.5}
    cycle = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD(parameters, lr=2.0), **options, cycle_momentum=False)
    expected = []
    for k in range(12):
        expected.append(cycle.get_last_lr()[0])
        cycle.optimizer.step()
        if k < 11:
            cycle.step()
    assert seen == pytest.approx(expected)
    assert rates(WarmupCosine, 2, total_steps=9, warmup_steps=4, rise="cosine") == pytest.approx(
        [2.0 * (1 - math.cos(math.pi * k / 4)) / 2 for k in (1, 2)]
    )


def test_a_schedule_goes_on_where_its_state_was_taken():
    whole = rates(WarmupCosine, 10, total_steps=10, warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    first = WarmupCosine(optimizer, total_steps=10, warmup_steps=3)
    for _ in range(4):
        optimizer.step()
        first.step()
    second = WarmupCosine(optimizer, total_steps=10, warmup_steps=3)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    second.step()
    assert optimizer.param_groups[0]["lr"] == whole[5]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (WarmupConstant, {"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        (
            WarmupCosine,
            {"total_steps": 5, "warmup_steps": 5},
            r"warmup_steps must lie in \[0, total_steps=5\), got 5",
        ),
        (WarmupCosine, {"total_steps": 5, "warmup_steps": -1}, "warmup_steps .* got -1"),
        (WarmupCosine, {"total_steps": 5, "final": 1.5}, r"final must lie in \[0, 1\], got 1.5"),
        (WarmupCosine, {"total_steps": 5, "start": -0.1}, r"start must lie in \[0, 1\], got -0.1"),
        (WarmupCosine, {"total_steps": 5, "rise": "square"}, "rise must be 'linear' or 'cosine', got 'square'"),
        (WarmupCosine, {"total_steps": 5, "first": 2.0}, r"first must lie in \[0, 1\], got 2.0"),
    ],
)
def test_numbers_out_of_range_are_named(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        rates(schedule, 1, **options)
