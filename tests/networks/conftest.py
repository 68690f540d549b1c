import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """What is this small is slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
