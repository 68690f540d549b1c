"""One process, DDP and FSDP2 train the same model, and each goes on where another stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_flows as lf
from lightning_flows.store import load_tensors
from tests.modules.test_resume import STATE, differences
from tests.strategies.runs import STEPS, run
from tests.strategies.runs import model as model_of_a_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs: those of one process before and after those of two."""
    made = tmp_path_factory.mktemp("strategies")
    state = torch.get_rng_state()
    run(made, "one", "auto", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for part in ("first", "second"):
        command = [sys.executable, "-m", "tests.strategies.runs", str(made), part]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        if part == "first":
            run(made, "one-from-fsdp2", "auto", 1, ckpt_path=made / "fsdp2" / f"step={STEPS}.ckpt")
            run(made, "one-from-half-fsdp2", "auto", 1, ckpt_path=made / "fsdp2" / f"step={STEPS // 2}.ckpt")
    torch.set_rng_state(state)
    return made


def losses(folder, name):
    return torch.tensor(torch.load(folder / name / "losses.pt"))


def checkpoint(folder, name, file="end.ckpt"):
    return torch.load(folder / name / file, weights_only=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_lose_what_one_loses(folder, name):
    one, two = losses(folder, "one"), losses(folder, name)
    assert len(one) == STEPS
    assert one[-5:].mean() < 0.7 * one[0]  # it learns
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


def test_recomputed_blocks_change_nothing(folder):
    assert torch.equal(losses(folder, "fsdp2-recomputed"), losses(folder, "fsdp2"))
    assert differences(*(checkpoint(folder, name)["state_dict"] for name in ("fsdp2-recomputed", "fsdp2"))) == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sharded_runs_in_16_bits(folder, precision):
    torch.testing.assert_close(losses(folder, precision), losses(folder, "one")[: STEPS // 2], rtol=0.05, atol=0)
    weights = checkpoint(folder, precision)["state_dict"]
    assert weights["latent_scale"].dtype == torch.float32
    assert {value.dtype for value in weights.values()} == {torch.float32}  # the average
    raw = {
        value.dtype for name, value in checkpoint(folder, precision)["current_model_state"].items() if "block" in name
    }
    assert raw == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


MOVES = {
    "from FSDP2 to one": (("fsdp2", f"step={STEPS}.ckpt"), ("one-from-fsdp2", "end.ckpt")),
    "and back": (("one-from-fsdp2", "end.ckpt"), ("fsdp2-again", "end.ckpt")),
}


@pytest.mark.parametrize("files", MOVES.values(), ids=MOVES)
def test_a_checkpoint_is_the_same_after_a_change_of_strategy(folder, files):
    before, after = (checkpoint(folder, *file) for file in files)
    assert len(before["optimizer_states"][0]["state"]) == len(before["state_dict"]) - 2  # all but the latents' buffers
    assert differences(before["state_dict"], before["current_model_state"]) != []
    for part in STATE:
        assert differences(before[part], after[part], part) == []


@pytest.mark.parametrize("name", ["fsdp2-from-one", "ddp-from-one", "one-from-half-fsdp2"])
def test_a_run_goes_on_under_another_strategy(folder, name):
    whole, rest = losses(folder, "one"), losses(folder, name)
    assert len(rest) == STEPS // 2
    torch.testing.assert_close(rest, whole[STEPS // 2 :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "ddp", "fsdp2"])
def test_the_average_is_published_whatever_trained_it(folder, name):
    saved, averaged = (
        load_tensors(folder / name / "model" / "model.safetensors"),
        checkpoint(folder, name)["state_dict"],
    )
    assert differences(saved, dict(averaged)) == []
    model, again = (
        lf.from_pretrained(folder / name / file, trust_remote_code=True) for file in ("model", f"step={STEPS}.ckpt")
    )
    condition = lf.Condition(label=torch.arange(3))
    assert torch.equal(model.sample(condition, seed=1), again.sample(condition, seed=1))


def test_other_sizes_of_the_mesh_are_refused():
    class Mesh:
        def __getitem__(self, name):
            return self

        def size(self):
            return 2

    fitted = model_of_a_run()
    fitted._device_mesh = Mesh()
    with pytest.raises(ValueError, match=r"tensor_parallel_size must be 1, got 2.*fsdp2"):
        fitted.configure_model()
