"""Every test starts from the same random state, whatever ran before it."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of each would wait for those of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
