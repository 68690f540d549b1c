"""Normalizing flows under DDP and FSDP2 learn what one process learns, and can be sampled while they are sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_flows as lf
from tests.strategies.flow_runs import LABELS, METHODS, RUNS, STEPS, run

ROOT = Path(__file__).parents[2]
EVERY_RUN = pytest.mark.parametrize("name", [f"{kind}-{strategy}" for kind, strategy in RUNS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, state = tmp_path_factory.mktemp("flows"), torch.get_rng_state()
    for kind, _ in RUNS:
        run(made, kind, "auto", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.strategies.flow_runs", str(made)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    torch.set_rng_state(state)
    return made


def one(name):
    return f"{name.partition('-')[0]}-auto"


@EVERY_RUN
def test_two_processes_learn_what_one_learns(folder, name):
    losses = [torch.tensor(torch.load(folder / run / "losses.pt")) for run in (name, one(name))]
    assert len(losses[1]) == STEPS
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    states = [torch.load(folder / run / "end.ckpt", weights_only=True)["state_dict"] for run in (name, one(name))]
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-3, msg=lambda text, k=key: f"{k}: {text}")


def test_the_variance_of_noise_is_that_of_all_processes(folder):
    files = [folder / f"tarflow-{strategy}" / "end.ckpt" for strategy in ("ddp", "auto")]
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    found, expected = (state["network.prior_variance"] for state in states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - 1).abs().min() > 1e-3


@EVERY_RUN
def test_samples_drawn_inside_a_run_are_those_of_its_published_weights(folder, name):
    samples = torch.load(folder / name / "samples.pt")
    model = lf.from_pretrained(folder / name / "model", trust_remote_code=True)
    for (method, guidance), drawn in samples.items():
        options = {"method": METHODS[method], "guidance": guidance, "return_log_prob": True}
        expected = model.sample(LABELS, seed=5, **options)
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert (samples["sequential", 1.0][0] - samples["sequential", 2.0][0]).abs().max() > 1e-3


@EVERY_RUN
def test_every_process_can_draw_samples_of_its_own(folder, name):
    """Jacobi takes as many passes as a sample needs; processes that wait for each other must make equally many."""
    model = lf.from_pretrained(folder / name / "model", trust_remote_code=True)
    for seed, drawn in enumerate(torch.load(folder / name / "own.pt")):
        expected = model.sample(LABELS[:1], seed=seed, guidance=1.0, method=METHODS["sequential"])
        torch.testing.assert_close(drawn, expected, rtol=1e-2, atol=1e-2)  # by default not to the last digit
