"""A run that is killed, and started again by the same command, ends with the bits of one that nobody disturbed."""

import random
import signal

import pytest

from benchmarks import kills
from lightning_flows.strategies import newest_checkpoint
from lightning_flows.strategies.checkpoint_io import damage

STEPS = 18  # two epochs of nine; a checkpoint every three, a validation every four


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = kills.prepare(tmp_path_factory.mktemp("whole"), kills.recipe(STEPS, 0))
    kills.complete(folder)
    return folder


def checkpoints(folder):
    return folder / "runs/kills/checkpoints"


@pytest.mark.timeout(300)
def test_kills_in_a_step_a_write_and_a_validation_lose_nothing(whole, tmp_path):
    folder = kills.prepare(tmp_path, kills.recipe(STEPS, 0))
    assert kills.finish(folder, kill_at="write:3") == -signal.SIGKILL  # the first checkpoint of all
    assert [file.name[-8:] for file in checkpoints(folder).iterdir()] == [".partial"]
    assert kills.finish(folder, kill_at="write:6") == -signal.SIGKILL
    assert newest_checkpoint(checkpoints(folder)).name == "last.ckpt"  # of step 3
    assert kills.finish(folder, kill_at="validation:8") == -signal.SIGKILL
    assert kills.finish(folder, kill_at="step:11") == -signal.SIGKILL
    kills.kill_at_random(folder, 5, random.Random(0))
    kills.complete(folder)
    assert kills.compare(whole, folder) == []
    assert [file for file in checkpoints(folder).iterdir() if damage(file)] == []


@pytest.mark.timeout(60)
def test_the_comparison_can_fail(whole, tmp_path):
    folder = kills.prepare(tmp_path, kills.recipe(STEPS, 0) | {"seed_everything": 1})
    kills.complete(folder)
    found = kills.compare(whole, folder)
    assert any(place.startswith("state_dict") for place in found)
    assert any(place.startswith("optimizer_states") for place in found)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("remove:9", {"save_last": "link"}),
        ("link:9", {"save_last": "link"}),
        ("write:9", {"save_last": True, "save_top_k": 0}),
    ],
)
def test_no_moment_leaves_a_run_without_a_checkpoint(whole, tmp_path, moment, options):
    folder = kills.prepare(tmp_path, kills.recipe(STEPS, 0, **options))
    assert kills.finish(folder, kill_at=moment) == -signal.SIGKILL
    assert newest_checkpoint(checkpoints(folder)) is not None
    last = (*kills.COMMAND[:-1], "last")  # where there is no last.ckpt, another is taken
    assert kills.finish(folder, command=last) == 0, kills.output(folder)
    assert kills.compare(whole, folder) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments(tmp_path):
    report = kills.experiment(tmp_path, 20, workers=0, steps=120, seed=0)
    assert report["differences"] == []
    assert report["kills"] >= 18, report  # a run that ends before its kill is none


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_with_data_workers(tmp_path):
    report = kills.experiment(tmp_path, 6, workers=2, steps=60, seed=0)
    assert report["differences"] == []
    assert report["kills"] >= 5, report
