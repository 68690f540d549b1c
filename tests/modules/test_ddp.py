"""Two processes compute what one computes: gradients, samples, and weights that stay the same on both."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.modules.ddp_runs import BATCH, LABELS, everything

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the same runs on two processes and on one."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.modules.ddp_runs", str(two), "2"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    everything(one, 1)
    return two, one


def reports(folder, name, ranks):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_two_halves_of_a_batch_give_the_gradients_of_the_whole(folders):
    (first, second), (whole,) = reports(folders[0], "same", 2), reports(folders[1], "same", 1)
    for step in range(2):
        halves = torch.cat([first["t"][step], second["t"][step]])
        assert torch.equal(halves, whole["t"][step])  # the same noise
        for name, expected in whole["gradients"][step].items():
            found = first["gradients"][step][name]
            assert torch.equal(found, second["gradients"][step][name])
            assert expected.abs().max() > 0, name
            error = (found - expected).norm() / expected.norm()
            assert error < 1e-5, (step, name, float(error))


def test_the_halves_are_of_one_batch(folders):
    (first, second), (whole,) = reports(folders[0], "same", 2), reports(folders[1], "same", 1)
    for step in range(2):
        assert first["index"][step] + second["index"][step] == whole["index"][step]


def test_ranks_see_other_items_and_draw_other_noise(folders):
    first, second = reports(folders[0], "fit", 2)
    seen = [{i for step in rank["index"] for i in step} for rank in (first, second)]
    assert [len(items) for items in seen] == [3 * BATCH // 2] * 2
    assert not seen[0] & seen[1]
    for a, b in zip(first["t"], second["t"], strict=True):
        assert not torch.equal(a, b)


def test_weights_and_statistics_stay_the_same_on_all_ranks(folders):
    (first, second), (single,) = reports(folders[0], "fit", 2), reports(folders[1], "fit", 1)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert any(not torch.equal(value, single["state"][name]) for name, value in first["state"].items())
    for name in ("latent_shift", "latent_scale"):  # of the same items: two halves, or the whole
        torch.testing.assert_close(first["state"][name], single["state"][name], rtol=1e-5, atol=1e-6)


def test_two_processes_write_the_samples_of_one(folders):
    two, one = (
        {file.name: np.asarray(Image.open(file)).astype(int) for file in (folder / "predictions").iterdir()}
        for folder in folders
    )
    assert sorted(two) == sorted(one) == [*(f"{i:05d}-label{y}.png" for i, y in enumerate(LABELS)), "grid.png"]
    for name, image in one.items():
        assert image.shape == two[name].shape
        assert np.abs(image - two[name]).max() <= 1, name
    assert len({image.tobytes() for image in one.values()}) == len(LABELS) + 1  # no sample is another's
