"""Two processes decide alike, and blocks that are recomputed and compiled go with DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_flows.callbacks.preemption import EXIT_STATUS
from tests.modules.test_resume import differences

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes left; the last of their fits is ended by a signal, and they with it."""
    made = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.callbacks.guard_ranks", str(made)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == EXIT_STATUS, result.stderr
    return made


@pytest.fixture(scope="module")
def reports(folder):
    return [torch.load(folder / f"report-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_recomputed_and_compiled_blocks_learn_the_same(reports, strategy):
    for report in reports:
        found = report[strategy]
        assert found["changed"] == pytest.approx(found["losses"], rel=1e-5)
        usual, changed = found["states"]
        assert changed.keys() == usual.keys()
        for name, value in usual.items():
            torch.testing.assert_close(changed[name], value, rtol=1e-4, atol=1e-5)


def test_the_norm_is_that_of_all_ranks_and_all_shards(reports):
    first, second = reports
    assert first["ddp"]["norms"] == second["ddp"]["norms"]
    assert first["fsdp2"]["norms"] == second["fsdp2"]["norms"]
    assert len(first["ddp"]["norms"]) == 4
    assert first["fsdp2"]["norms"] == pytest.approx(first["ddp"]["norms"], rel=1e-5)


def test_a_bad_batch_of_one_rank_is_left_out_by_both(folder, reports):
    first, second = (report["bad"] for report in reports)
    assert first["skipped"] == second["skipped"] == 1
    assert differences(first["weights"], second["weights"]) == []
    for rank, broken in ((0, False), (1, True)):
        content = torch.load(folder / "bad" / "bad_batches" / f"step-1-rank-{rank}.pt", weights_only=True)
        assert (content["rank"], len(content["index"][0])) == (rank, 12)
        assert bool(content["batches"][0]["image"].isnan().any()) is broken


def test_a_signal_to_one_rank_ends_both_and_nothing_is_lost(reports):
    for report, code in zip(reports, (EXIT_STATUS, 0), strict=True):
        assert report["codes"] == [code, code]
        assert report["steps"] == [2, 2]  # the step under way; in the validation after the second step
        for end in report["ends"]:
            assert differences(end, report["ddp"]["states"][0]) == []
