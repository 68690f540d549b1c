"""A job that must go ends its step, writes ``last.ckpt`` and leaves with a status that says: start me again.

Clusters and spot machines warn a job by a signal some time before they kill it. What is saved then is the state
after a whole optimizer step, so that a resumed run equals, bit for bit, one that was never interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a failure that passes, try again


class Preemption(Callback):
    """Saves a complete checkpoint and ends the process when a signal arrives during a fit.

    The signal only sets a flag. After the optimizer step that is under way (all of its micro-batches) the
    checkpoint is written as ``last.ckpt`` beside the others (the folder of the first `ModelCheckpoint`, else
    ``<default_root_dir>/checkpoints``), with the average of `EMA` and the states of all callbacks, and
    `SIGTERMException` (a ``SystemExit``) ends the run: with status 75 on rank zero, 0 on the other ranks, whose
    end would else count as a failure. ``fit`` does not return: what a script does after it is left to the next
    run. During a validation the checkpoint is written before its next batch, as soon as all ranks know of the
    signal; that validation, and one that was due at the last step, is not made up for on resume. During the
    check of the validation before the first step nothing is saved, since nothing has changed.

    It suffices that one rank gets the signal: ranks agree after every optimizer step, which is a small
    exchange between them. Further signals change nothing. The handlers stand from the start to the end of the
    training in the place of others, those of Lightning included: its SIGTERM handler starts an exchange from
    inside of whatever the process is doing, and under SLURM its SIGUSR1 handler saves in the middle of a step.

    A SLURM job with 120 seconds' notice that is queued again with its own command (``--ckpt_path auto`` goes on
    from the newest checkpoint, or begins)::

        #!/bin/bash
        #SBATCH --ntasks-per-node=8 --gpus-per-node=8 --time=4:00:00 --requeue --open-mode=append
        #SBATCH --signal=SIGUSR1@120
        srun lightning-flows fit -c recipe.yaml --ckpt_path auto
        if [ $? -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi

    with, in the recipe::

        trainer:
          callbacks:
            - class_path: lightning_flows.callbacks.Preemption

    Choose a notice longer than an optimizer step and a save together.

    Args:
        signals: names of the signals.

    Raises:
        ValueError: no signal, a name that the system does not know, or a signal that cannot be handled.
        SystemExit: in training, after a signal.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        known = sorted(s.name for s in signal.valid_signals() if isinstance(s, signal.Signals))
        allowed = [name for name in known if name not in ("SIGKILL", "SIGSTOP")]
        unknown = [name for name in signals if name not in allowed]
        if isinstance(signals, str) or not signals or unknown:
            raise ValueError(f"Preemption: signals must be a list of names among {allowed}, got {signals!r}.")
        self.signals = tuple(signals)
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._seen = 0  # trainer.global_step at the last look
        self._between_steps = True
        self._ranks_in_step = True  # whether all ranks have equally many batches of validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stand last, so that every other callback has ended the step that is saved."""
        if stage == "fit":  # a new list: the old one is being walked through
            trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]

    # ------------------------------------------------------------------ handlers

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, and note the step to count from."""
        self._listen()
        self._seen, self._between_steps = trainer.global_step, True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the handlers back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the handlers back."""
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the handlers back."""
        self._restore()

    def _listen(self) -> None:
        if self._before:
            return
        self._received = None
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preemption: signals can be handled in the main thread only; none will be.")
            return
        for name in self.signals:
            number = signal.Signals[name]
            self._before[number] = signal.signal(number, self._note)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note and handler is not None:
                signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        self._received = number  # nothing else: a handler runs in the middle of anything

    # ------------------------------------------------------------------ the places where a run can end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End after an optimizer step."""
        self._between_steps = trainer.global_step != self._seen
        self._seen = trainer.global_step
        self._end_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See whether ranks can ask each other inside this validation."""
        if self._in_fit(trainer) and trainer.world_size > 1:
            own = [float(count) for count in trainer.num_val_batches]
            same = own == trainer.strategy.broadcast(own) and float("inf") not in own
            self._ranks_in_step = trainer.strategy.reduce_boolean_decision(same)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End inside a validation, which may be long."""
        if self._in_fit(trainer) and self._ranks_in_step:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End after a validation."""
        if self._in_fit(trainer):
            self._end_if_asked(trainer)

    @staticmethod
    def _in_fit(trainer: L.Trainer) -> bool:
        return trainer.state.fn == "fit"

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        if not self._between_steps:  # no checkpoint holds a half accumulated gradient
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        if not trainer.sanity_checking and not trainer.fast_dev_run:
            path = self._path(trainer)
            trainer.save_checkpoint(path)
            rank_zero_info(f"Preemption: a signal ended the run at step {trainer.global_step}; saved {path}.")
        raise SIGTERMException(EXIT_STATUS if trainer.is_global_zero else 0)

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        """Where the checkpoint goes, known to the `ModelCheckpoint` there as its newest ``last``."""
        keeper = trainer.checkpoint_callback
        if not isinstance(keeper, ModelCheckpoint) or keeper.dirpath is None:
            return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        path = Path(keeper.dirpath) / "last.ckpt"
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # a link to an older checkpoint, which must not be overwritten
        keeper.last_model_path = str(path)
        return path
