"""Frozen parts and rates by depth on two processes, sharded or not, and across a change of strategy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.parts_ranks import LATE, NEVER, STEPS, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process before and after those of two."""
    made = tmp_path_factory.mktemp("parts")
    state = torch.get_rng_state()
    run(made, "one", "auto", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.callbacks.parts_ranks", str(made)]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    run(made, "one-again", "auto", 1, ckpt_path=made / "one" / "step=2.ckpt")
    run(made, "one-from-fsdp2", "auto", 1, ckpt_path=made / "fsdp2" / "step=2.ckpt")
    torch.set_rng_state(state)
    return made


def weights(folder, name, file="end.ckpt"):
    return torch.load(folder / name / file, weights_only=True)["current_model_state"]


def test_parts_move_when_they_may(folder):
    early, end = weights(folder, "one", "step=2.ckpt"), weights(folder, "one")
    moved = {name for name, value in end.items() if not torch.equal(value, early[name])}
    assert not any(name.startswith(NEVER) for name in moved)
    assert any(name.startswith(LATE) for name in moved)
    content = torch.load(folder / "one" / "step=2.ckpt", weights_only=True)
    held = sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
    assert 0 < len(content["optimizer_states"][0]["state"]) < held  # those that wait have no moments yet
    assert torch.load(folder / "one" / "end.ckpt", weights_only=True)["global_step"] == STEPS


def test_a_run_that_goes_on_before_parts_are_let_go_is_the_same(folder):
    one, again = weights(folder, "one"), weights(folder, "one-again")
    assert all(torch.equal(again[name], value) for name, value in one.items())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-from-one", "one-from-fsdp2"])
def test_two_processes_train_what_one_trains(folder, name):
    one, other, early = weights(folder, "one"), weights(folder, name), weights(folder, "one", "step=2.ckpt")
    for key, value in one.items():
        if key.startswith(NEVER):
            assert torch.equal(other[key], value), key
        elif not key.endswith("qkv.bias"):  # of keys it has no gradient but round-off, which Adam blows up
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-5, msg=key)
    assert max((one[key] - early[key]).abs().max() for key in one) > 1e-2
