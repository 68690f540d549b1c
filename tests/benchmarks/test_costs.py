"""Costs that are counted agree with the formulas of docs/scaling.md; the table of speeds says what it measured."""

import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import communication, memory, speed
from lightning_flows.networks import DiT

NETWORK = {
    "input_size": 16,
    "patch_size": 2,
    "hidden_size": 64,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
    "label_dropout": 0.1,
}


def apart(function, *arguments):
    """The result of a function in a process of its own: it may start threads of autograd, after which none can fork."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of a small DiT in 16 bits."""
    monkeypatch.setattr(memory, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs/own/small256.yaml"
    file.parent.mkdir(parents=True)
    entry = {"class_path": "lightning_flows.networks.DiT", "init_args": NETWORK}
    content = {
        "model": {"init_args": {"network": entry}},
        "data": {"init_args": {"batch_size": 8}},
        "trainer": {"precision": "bf16-mixed"},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def cost_of(recipe):
    memory.CONFIGS = recipe.parents[1]
    return memory.cost(recipe)


def test_counted_costs_of_a_dit_follow_the_formulas(recipe):
    found = apart(cost_of, recipe)
    assert (found.recipe, found.batch) == ("configs/own/small256.yaml", 8)
    assert found.parameters == sum(p.numel() for p in DiT(**NETWORK).parameters())
    flops, activations, checkpointed = found.predicted
    assert found.forward_flops == pytest.approx(flops, rel=0.05)
    assert found.activations == pytest.approx(activations, rel=0.1)
    assert checkpointed < found.checkpointed < 0.2 * found.activations
    row = memory.row(found, devices=4)
    assert row[:4] == ["own/small256.yaml", "0 M", f"{found.forward_flops / 1e9:.1f}", "8"]


def test_traffic_of_two_processes():
    found = communication.formulas(1000)
    assert found == {"ddp": (4000.0, 16000.0), "fsdp2": (6000.0, 8000.0)}
    traffic = communication.Traffic()
    traffic.reduce(4000)  # gradients of DDP
    assert traffic.bytes == found["ddp"][0]
    traffic.bytes = 0
    for _ in range(3):
        traffic.gather_or_scatter(4000)
    assert traffic.bytes == found["fsdp2"][0]


def asked(**changed):
    sizes = {"batch": 2, "steps": 2, "solver_steps": 1, "peak": 1e12}
    return speed.Setting("tiny", "cpu", "32-true", False, **sizes)._replace(**changed)


CASES = {"tiny": speed.Case("a family", "tiny", functools.partial(DiT, **NETWORK), (2, 2))}


def measured():
    speed.CASES = CASES
    return speed.work(asked()), speed.operations(CASES["tiny"])


def test_a_case_is_trained_sampled_and_written_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "CASES", CASES)
    found, operations = apart(measured)
    assert found["forward_flops"] == operations
    assert found["samples_per_second"] == pytest.approx(2 / found["seconds_per_step"])
    assert found["utilisation"] == pytest.approx(3 * found["forward_flops"] * found["samples_per_second"] / 1e12)
    assert min(found["latency_seconds"], found["heun_seconds"], found["loss"]) > 0
    monkeypatch.setattr(speed, "run", lambda setting: found)
    monkeypatch.setattr("sys.argv", ["speed", "--device", "cpu", "--cases", "tiny", "--out", str(tmp_path)])
    speed.main()
    table = (tmp_path / "speed-cpu.md").read_text()
    assert "## a family" in table
    assert "| tiny | 0.3 M |" in table
    assert table in capsys.readouterr().out
    assert json.loads((tmp_path / "speed-cpu.json").read_text())["cases"][0] == found


def test_ratios_compare_one_batch_in_both_modes():
    fast = {"case": "a", "compiled": True, "batch": 4, "seconds_per_step": 1.0, "heun_seconds": 2.0, "loss": 1.5}
    slow = {**fast, "compiled": False, "seconds_per_step": 1.5, "heun_seconds": 3.0, "loss": 1.0}
    assert speed.ratios([fast, slow]) == {"a": {"training": 1.5, "guided sampling": 1.5, "loss": 0.5}}
    assert speed.ratios([fast, {**slow, "batch": 8}]) == {}


def test_fill_doubles_until_memory_ends(monkeypatch):
    monkeypatch.setattr(speed, "run", lambda setting: setting if setting.batch <= 8 else None)
    assert speed.fill(asked()).batch == 8


def test_memory_that_ends_is_no_error_but_another_failure_is(monkeypatch):
    done = SimpleNamespace(returncode=1, stderr="torch.OutOfMemoryError: ...", stdout="")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: done)
    assert speed.run(asked()) is None
    done.stderr = "KeyError: 'x'"
    with pytest.raises(RuntimeError, match=r"KeyError: 'x'"):
        speed.run(asked())
