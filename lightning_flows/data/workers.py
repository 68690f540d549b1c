"""What a run says when one of its data workers dies."""

from __future__ import annotations

import traceback

from torch.utils.data import dataloader

LOADER = dataloader.__file__
DEAD = ("DataLoader worker", "Pin memory thread exited")  # how torch's errors about dead workers begin


def explain_dead_worker(error: BaseException, num_workers: int) -> None:
    """Add to an error about a dead data worker what has probably happened, and what to do.

    Args:
        error: any error; another one is left as it is.
        num_workers: of the data module.
    """
    if _tells_of_a_dead_worker(error) or (num_workers and _broke_off(error)):
        error.add_note(
            "A data worker (a process that reads and augments items) was ended from outside, most often by the system "
            f"because memory ran out. Lower num_workers (now {num_workers}; 0 reads in the process of the training), "
            "batch_size or the size of the images, ask for more memory, or, in a container, for more shared memory "
            "(/dev/shm). Then resume with --ckpt_path last: nothing that was saved is lost."
        )


def _tells_of_a_dead_worker(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith(DEAD)


def _broke_off(error: BaseException) -> bool:
    """The worker died while it handed over a batch, before torch could notice.

    What a worker itself raises arrives as "Caught ... in DataLoader worker process ...".
    """
    if not isinstance(error, (ConnectionError, EOFError)) or str(error).startswith("Caught"):
        return False
    return any(frame.f_code.co_filename == LOADER for frame, _ in traceback.walk_tb(error.__traceback__))
