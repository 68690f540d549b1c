"""SamplingSpeed: what is timed, under which conditions, and what is written."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_flows.callbacks import Evaluation, SamplingSpeed, sampling_speed
from lightning_flows.flow import Condition, Solution
from tests.callbacks.evaluation_ranks import Items, Shades, trainer


class Clock:
    """Time that passes only where it is said to."""

    now = 0.0

    def __call__(self, device):
        return self.now


class Slow(Shades):
    """A second for each sample and a third of one for a decoding, on a clock of its own."""

    def __init__(self, clock):
        super().__init__()
        self.asked, self.clock = [], clock

    def condition_of(self, batch):
        return Condition(label=batch["index"])

    def decode(self, z):
        self.clock.now += 1 / 3
        return z

    def generate(self, condition, noise):
        assert not torch.is_grad_enabled()
        self.asked.append(condition.label.tolist())
        self.clock.now += len(noise.seeds)
        return Solution(self.decode(torch.zeros(len(noise.seeds), 1, 2, 2)), 8)


@pytest.fixture
def slow(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sampling_speed, "_clock", clock)
    return Slow(clock)


def speed(folder, model, *callbacks):
    trainer(folder, *callbacks).test(model, DataLoader(Items(), 4), verbose=False)
    return json.loads((folder / "metrics.json").read_text())


def test_decoding_is_in_one_number_and_not_in_the_other(tmp_path, slow):
    content = speed(tmp_path, slow, Evaluation(), SamplingSpeed(repeats=3))
    assert set(content) == {"test", "speed"}
    found = content["speed"]["values"]
    assert set(found) == {"seconds_per_sample[batch=1]", "seconds_per_sample[batch=4]"}
    for size in (1, 4):
        entry = found[f"seconds_per_sample[batch={size}]"]
        whole = pytest.approx(1 + 1 / 3 / size)
        assert entry["value"] == {"with_decode": whole, "without_decode": pytest.approx(1.0)}
        assert (entry["fastest"], entry["slowest"]) == (whole, whole)
        assert (entry["nfe"], entry["repeats"], entry["warm_up"], entry["batch_size"]) == (8, 3, 1, size)
        assert (entry["threads"], entry["precision"], entry["device"]) == (torch.get_num_threads(), "32-true", "cpu")
        assert entry["processor"]
    assert slow.asked == [[0]] * 4 + [[0, 1, 2, 3]] * 4  # the warm-up and three, under the first batch's conditions
    assert "decode" not in vars(slow)


def test_conditions_are_repeated_for_larger_batches_and_time_is_bounded(tmp_path, slow):
    found = speed(tmp_path, slow, SamplingSpeed([6], warm_up=0, repeats=50, max_seconds=1e-9))["speed"]["values"]
    assert slow.asked == [[0, 1, 2, 3, 0, 1]]
    assert found["seconds_per_sample[batch=6]"]["repeats"] == 1


def test_a_module_without_decode_has_no_number_without_it(tmp_path):
    class Plain(Shades):
        decode = None

        def generate(self, condition, noise):
            return Solution(torch.zeros(len(noise.seeds), 1, 2, 2), 8)

    found = speed(tmp_path, Plain(), SamplingSpeed([2], repeats=1))["speed"]["values"]
    assert found["seconds_per_sample[batch=2]"]["value"]["without_decode"] is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1"),
        ({"batch_sizes": []}, "must name at least one size"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"warm_up": -1}, "warm_up must not be negative"),
        ({"max_seconds": 0}, "max_seconds positive"),
    ],
)
def test_wrong_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        SamplingSpeed(**options)
