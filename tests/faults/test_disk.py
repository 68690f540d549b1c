"""A full disk and a folder that cannot be written: nothing half-written stays, and the message says what happened."""

import os
import resource
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.callbacks.pictures import write_png
from lightning_flows.cli.log import RunLog
from lightning_flows.data.latent_writer import _save_array
from lightning_flows.store import save_tensors, write_text

LIMIT = 8192


@contextmanager
def full_disk():
    """No file may grow beyond 8 kB: writing fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def noise(side):
    return np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)


WRITERS = {
    "sample.png": lambda path, side: write_png(Image.fromarray(noise(side)), path),
    "latents.safetensors": lambda path, side: save_tensors(path, {"latent": torch.from_numpy(noise(side))}),
    "latents.npy": lambda path, side: _save_array(path, torch.from_numpy(noise(side))),
    "index.json": lambda path, side: write_text(path, "7" * side**2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_former_file_and_nothing_half_written(tmp_path, name):
    path, write = tmp_path / name, WRITERS[name]
    write(path, 8)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=rf"{name} was not written: .*(File too large|is the disk full)"):
        write(path, 256)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == before


def rows(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize("header", [False, True], ids=["rows", "new header"])
def test_the_log_of_a_run_ends_with_a_whole_row(tmp_path, header):
    log = RunLog(tmp_path, name="log", version=0, flush_logs_every_n_steps=10_000)
    path = tmp_path / "log/version_0/metrics.csv"
    for step in range(400):
        log.log_metrics({"loss": 0.123456789}, step)
    log.save()
    before = rows(path)
    assert len(before) == 401
    assert path.stat().st_size < LIMIT
    for step in range(300):
        log.log_metrics({"loss": 0.123456789, **({"another quantity": 1.0} if header else {})}, 400 + step)
    with full_disk(), pytest.raises(OSError, match=r"metrics\.csv was not written: File too large \(the rows before"):
        log.save()
    kept = rows(path)
    assert [line.split(",")[-2:] for line in kept[1:]] == [line.split(",")[-2:] for line in before[1:]]
    assert os.listdir(path.parent) == ["metrics.csv"]
    log.save()  # there is room again: nothing is lost
    assert len(rows(path)) == 701


def test_a_log_like_that_of_lightning(tmp_path):
    log = RunLog(tmp_path, name="log")
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    log.log_metrics({"b": 2.0}, 1)
    log.save()
    assert rows(tmp_path / "log/version_0/metrics.csv") == ["a,b,step", "1.0,,0", ",2.0,1"]
