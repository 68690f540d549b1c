"""A run of the digits recipe, small enough for a test, made once."""

import os
from pathlib import Path

import pytest
import torch

from lightning_flows.cli import dispatch

SMALL = [
    "--model.init_args.network.init_args.hidden_size=16",
    "--model.init_args.network.init_args.depth=1",
    "--model.init_args.network.init_args.num_heads=2",
    "--model.init_args.steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
RECIPE = ["-c", "configs/lfm/digits.yaml"]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which ``runs/digits`` holds one epoch of training."""
    torch.set_num_threads(1)
    folder, before = tmp_path_factory.mktemp("cli"), Path.cwd()
    os.chdir(folder)
    try:
        dispatch(["fit", *RECIPE, *SMALL, "--trainer.max_epochs=1"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def in_run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as working directory."""
    monkeypatch.chdir(finished_run)
    return finished_run
