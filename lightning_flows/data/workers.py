"""What a run says when one of its data workers dies."""

from __future__ import annotations

DEAD = ("DataLoader worker", "Pin memory thread exited")  # how torch's errors about dead workers begin


def explain_dead_worker(error: BaseException, num_workers: int) -> None:
    """Add to torch's error about a dead data worker what has probably happened, and what to do.

    Args:
        error: any error; another one is left as it is.
        num_workers: of the data module.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(DEAD):
        error.add_note(
            "A data worker (a process that reads and augments items) was ended from outside, most often by the system "
            f"because memory ran out. Lower num_workers (now {num_workers}; 0 reads in the process of the training), "
            "batch_size or the size of the images, ask for more memory, or, in a container, for more shared memory "
            "(/dev/shm). Then resume with --ckpt_path last: nothing that was saved is lost."
        )
