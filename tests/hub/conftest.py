"""A model folder fit to be published, and the real client of the Hub in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from lightning_flows.hub import write_card
from lightning_flows.store import save_folder

CONFIG = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}


@pytest.fixture
def folder(tmp_path):
    tensors = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.zeros(3)}
    extra = {"metrics.json": '{"kid": {"value": 0.5, "samples": 10}}', "recipe.yaml": "model: {}\n"}
    target = save_folder(tmp_path / "tiny", CONFIG, tensors, extra)
    write_card(target, CONFIG, {"kid": {"value": 0.5, "samples": 10}}, licence="apache-2.0", data="digits")
    return target


@pytest.fixture
def client(tmp_path):
    """Runs Python code whose Hub is at a given address; returns its lines of output."""

    def run(code, url):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "client"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        result = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().split("\n")

    return run
