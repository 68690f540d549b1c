"""When one rank fails the others end within seconds, and the last that is read is what went wrong there."""

import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import ranks

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank(number, folder, failing, port):
    """One of two processes, as a cluster starts them."""
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    sys.stderr = (folder / f"output-{number}.txt").open("w", buffering=1)
    logging.basicConfig(stream=sys.stderr, force=True)
    ranks.fit(folder, failing, wait=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_would_wait_for_ever_ends_with_the_message_of_the_one_that_failed(tmp_path, failing):
    context, port = multiprocessing.get_context("spawn"), free_port()  # autograd may have run here: no fork
    processes = [context.Process(target=rank, args=(number, tmp_path, failing, port)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == ([1, 0] if failing == 0 else [1, 1])  # the first process is the one whose status counts
    said = (tmp_path / "output-0.txt").read_text().strip()
    assert said.endswith(f"ValueError: rank {failing} found a broken batch")
    assert ("rank 0 ends: rank 1 failed first" in said) == (failing == 1)
    files = [file.name for file in (tmp_path / "errors").iterdir()]
    assert files == [f"rank-{failing}.txt"]


def ends(command, *, within=300):
    """Status and error output of a command whose process group must be gone at its end."""
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, process_group=0, **streams)
    try:
        errors = process.communicate(timeout=within)[1]  # until the last process has closed it
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_the_others_do_not_wait_for_a_rank_that_failed(tmp_path):
    """Rank 1 fails, and rank 0 would wait for ever."""
    status, errors = ends([sys.executable, "-m", "tests.faults.ranks", str(tmp_path), "1", "wait"])
    now = time.time()
    assert status == 1, errors
    assert errors.strip().endswith("ValueError: rank 1 found a broken batch")
    assert "rank 0 ends: rank 1 failed first" in errors
    assert "zombies" not in errors
    file = tmp_path / "errors/rank-1.txt"
    assert "found a broken batch" in file.read_text()
    assert now - file.stat().st_mtime < 30


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_torchrun_says_it_in_its_summary(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    status, errors = ends([*torchrun, "-m", "tests.faults.ranks", str(tmp_path), "1"])
    assert status == 1
    summary = errors[errors.rindex("Root Cause") :]
    assert "rank      : 1" in summary
    assert "found a broken batch" in summary
