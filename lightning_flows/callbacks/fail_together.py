"""When one process of a run fails, all end within seconds, and what the user reads last is what went wrong there.

Without it the others wait in an exchange that never completes, until a time limit of minutes, or fail with a message
about a lost connection that hides the cause.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_flows.networks.parallel import leave_group_at_exit

log = logging.getLogger(__name__)

POLL = 1.0  # seconds between two looks for the errors of other ranks
STUCK = 30.0  # seconds after which a failed process that does not come to its end is ended


class FailTogether(Callback):
    """Ends all processes of a run when one of them raises an error.

    The failing rank writes its traceback to ``<default_root_dir>/errors/rank-R.txt``; a thread in each of the others
    looks there once a second, and ends its process: the first of each machine with status 1 and that traceback in
    its log, the rest silently. An error that another rank's end provokes (a closed connection) carries the
    traceback of that rank as a note. Under torchrun, which ends the other processes itself, they wait ten seconds
    for that, and the traceback is in its summary.

    It needs a folder that all machines see; without one, and with a single process, nothing changes. Our command
    line always adds it. ``KeyboardInterrupt`` and ``SystemExit`` (see `Preemption`) are no failures.
    """

    def __init__(self) -> None:
        self._since = time.time()
        self._elastic = "TORCHELASTIC_RUN_ID" in os.environ
        self._folder: Path | None = None
        self._rank = 0
        self._failed: float | None = None  # when this process failed
        self._finished: threading.Event | None = None  # made in the process that waits for it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to look for the errors of others."""
        leave_group_at_exit()
        self._find_folder(trainer)
        if self._folder is not None and self._finished is None:
            self._finished, self._failed = threading.Event(), None
            args = (trainer, self._finished)
            threading.Thread(target=self._watch, args=args, name="fail-together", daemon=True).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The run has ended well."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say what went wrong, and that the others must end."""
        self._find_folder(trainer)
        if self._folder is None or not isinstance(exception, Exception):
            self._stop()
            return
        self._failed = time.time()
        if (first := self._error_of_another()) is not None:
            exception.add_note(first)
            return
        self._write(exception)
        if self._elastic:
            _tell_torchrun(exception)
        elif not self._leads:
            time.sleep(2.5 * POLL)  # Lightning kills the first process, without a word, as soon as this one has ended

    @property
    def _leads(self) -> bool:
        """Whether this is the first process of its machine: the one whose log and status are seen."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def _find_folder(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1 and "://" not in str(trainer.default_root_dir):
            self._folder, self._rank = Path(trainer.default_root_dir) / "errors", trainer.global_rank

    def _write(self, exception: Exception) -> None:
        assert self._folder is not None
        file = self._folder / f"rank-{self._rank}.txt"
        partial = file.with_name(f".{file.name}.partial")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text("".join(traceback.format_exception(exception)), encoding="utf-8")
                partial.replace(file)
            except OSError:  # the disk is full: an empty file says enough
                partial.unlink(missing_ok=True)
                file.unlink(missing_ok=True)
                file.touch()

    def _error_of_another(self) -> str | None:
        """What another rank of this run wrote; None where none failed."""
        assert self._folder is not None
        with suppress(OSError):
            for file in sorted(self._folder.glob("rank-*.txt")):
                if file.stem != f"rank-{self._rank}" and file.stat().st_mtime >= self._since:
                    what = file.read_text(encoding="utf-8").strip() or "its message could not be written"
                    return f"{file.stem.replace('-', ' ')} failed first:\n\n{what}"
        return None

    def _stop(self) -> None:
        if self._finished is not None:
            self._finished.set()
            self._finished = None

    def _watch(self, trainer: L.Trainer, finished: threading.Event) -> None:
        while not finished.wait(POLL):
            if self._failed is not None:
                self._end_if_stuck(trainer)
            elif (error := self._error_of_another()) is not None and not finished.wait(10.0 if self._elastic else 0.0):
                self._end(error)

    def _end_if_stuck(self, trainer: L.Trainer) -> None:
        if trainer.state.stage is None:  # Lightning has torn down, and the error goes its way
            self._stop()
        elif self._failed is not None and time.time() - self._failed > STUCK:
            self._end(f"rank {self._rank} failed and could not end by itself")

    def _end(self, why: str) -> None:
        if self._leads:
            log.error("rank %d ends: %s", self._rank, why)
        # os._exit: the main thread may wait for ever in an exchange. Status 0 of the rest: Lightning would else kill
        # the first process before it has told its error.
        os._exit(1 if self._leads else 0)


def _tell_torchrun(exception: Exception) -> None:
    """The file that torchrun names for errors, which it shows in its summary."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(exception)
