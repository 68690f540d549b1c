"""Exponential moving average of the trained weights.

    average <- d_n average + (1 - d_n) weights,      d_n = min(decay, (1 + n) / (10 + n))

after every optimizer step, n being the number of updates made so far. The first update copies the weights:
the average of a run that has not updated yet equals its weights. A run that validates, saves, stops and
resumes equals one that does not, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_flows.callbacks.averaged_weights import AveragedWeights


class EMA(Callback):
    """Averages the trainable parameters for validation, samples, checkpoints and the finished module.

    Counted in optimizer steps, not in micro-batches of an accumulated gradient. Frozen parameters and
    buffers are left alone. The average lives in float32 on the device of its parameter and costs one
    foreach call per update; the raw weights are copied only while the average stands in for them: from the
    start to the end of a validation (test, predict) inside a fit, and from the end of the training on.

    Checkpoints have the layout of `lightning.pytorch.callbacks.WeightAveraging`: averaged weights in
    `state_dict`, raw ones in `current_model_state`, the counter in `averaging_state`; each reads the
    other's files. A checkpoint saved with `save_weights_only=True` holds the average only. After `fit` the
    module holds the average, and `trainer.save_checkpoint` still writes both; a further `fit` without
    `ckpt_path` starts a new average from there. An exception leaves the raw weights in the module.

    Parameters sharded by `fully_shard` are averaged shard by shard, without gathering; a checkpoint holds whole
    tensors (strategy "fsdp2", see `strategies.FSDP2`), which any other strategy reads.

    Averages of iterates: "Acceleration of stochastic approximation by averaging" (Polyak, Juditsky, 1992).
    The warm-up is that of TensorFlow's `ExponentialMovingAverage`.

    Args:
        decay: weight of the past in an update, in [0, 1).
        warmup: raise the decay as (1 + n) / (10 + n) until it reaches `decay`; False keeps it constant.
        update_every: optimizer steps between updates; the first of them counts.
        start_step: optimizer steps before the first update. Until then the average is the weights
        themselves.

    Raises:
        ValueError: an argument is outside its range, or the trainer has a second averaging callback.
    """

    def __init__(
        self, decay: float = 0.999, *, warmup: bool = True, update_every: int = 1, start_step: int = 0
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}.")
        if update_every < 1:
            raise ValueError(f"EMA: update_every must be at least 1, got {update_every}.")
        if start_step < 0:
            raise ValueError(f"EMA: start_step must be at least 0, got {start_step}.")
        self.decay = decay
        self.warmup = warmup
        self.update_every = update_every
        self.start_step = start_step
        self._reset()

    def _reset(self) -> None:
        self.updates = 0
        self._weights = AveragedWeights()
        self._loaded: Mapping[str, Tensor] | None = None  # the average of a checkpoint, until parameters are ready
        self._seen = 0  # trainer.global_step at the last call
        self._running = False

    def decay_at(self, updates: int) -> float:
        """Decay of the next update when `updates` have been made."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the module being fitted holds the average; the raw weights return afterwards."""
        entered = self._running and self._weights.enter()
        try:
            yield
        finally:
            if entered:
                self._weights.leave()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start afresh when a fit begins."""
        if stage != "fit":
            return
        averaging = [c for c in trainer.callbacks if isinstance(c, (EMA, WeightAveraging))]
        if len(averaging) > 1:
            names = [type(c).__name__ for c in averaging]
            raise ValueError(f"EMA: one averaging callback is allowed in trainer.callbacks, got {names}.")
        self._reset()
        _unpublish(pl_module)
        pl_module.on_save_checkpoint = _Publish(self, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the parameters and the step to count from; take over a resumed average."""
        self._bind(pl_module)
        self._seen = trainer.global_step
        self._running = True
        if trainer.checkpoint_callbacks and not trainer.strategy.lightning_restore_optimizer:
            raise ValueError(
                f"EMA: checkpoints of {type(trainer.strategy).__name__} cannot hold an average: use "
                "strategy='fsdp2' or 'ddp', or Trainer(enable_checkpointing=False)."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in parameters that were unfrozen since the last epoch."""
        self._bind(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update if an optimizer step was taken."""
        self._advance(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module."""
        self._weights.enter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module also when there was nothing left to train."""
        self._bind(pl_module)
        self._weights.enter()
        self._running = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Follow the module to the CPU, where the strategy puts it after a fit."""
        if stage == "fit":
            _unpublish(pl_module)
            self._weights.to_cpu()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the raw weights back; checkpoint callbacks come after this one and save a complete state."""
        if self._running:
            self._weights.leave()
            self._advance(trainer.global_step)
            self._running = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._swap_in()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the raw weights."""
        self._swap_out()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Test the average when a test runs inside a fit."""
        self._swap_in()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the raw weights."""
        self._swap_out()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict with the average when a prediction runs inside a fit."""
        self._swap_in()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the raw weights."""
        self._swap_out()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average to `state_dict`, the raw weights to `current_model_state`."""
        if self._loaded is not None:
            self._bind(pl_module)
        if self._running and self._weights.raw is None:
            self._advance(trainer.global_step)  # saved between an optimizer step and the end of its batch
        if not self._stands_for(pl_module):
            return
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = self._weights.raw_state(pl_module, state)
        checkpoint["state_dict"] = self._weights.averaged_state(pl_module, state)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume a fit from the raw weights and keep the average; other stages want just the average."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "averaging_state" not in checkpoint or "current_model_state" not in checkpoint:
            rank_zero_warn(
                "EMA: the checkpoint has no `averaging_state` and `current_model_state`: it was written "
                "without weight averaging. Training resumes from its `state_dict` with a new average."
            )
            return
        self.updates = int(checkpoint["averaging_state"]["n_averaged"])
        self._loaded = checkpoint["state_dict"]
        trainer.strategy.load_model_state_dict(
            {"state_dict": checkpoint["current_model_state"]}, strict=pl_module.strict_loading
        )

    def _bind(self, pl_module: L.LightningModule) -> None:
        self._weights.bind(pl_module)
        if self._loaded is not None and self.updates > 0:
            self._weights.restore(pl_module, self._loaded)
        self._loaded = None

    def _advance(self, step: int) -> None:
        """Update once if a due optimizer step lies between the last call and `step`."""
        last, self._seen = self._seen, step
        every = self.update_every
        if step > self.start_step and (step - 1) // every > (last - 1) // every:
            self._weights.update(1.0 - self.decay_at(self.updates))
            self.updates += 1

    def _swap_in(self) -> None:
        if self._running:
            self._weights.enter()

    def _swap_out(self) -> None:
        if self._running:
            self._weights.leave()

    def _stands_for(self, pl_module: L.LightningModule) -> bool:
        """Whether this state describes the module: after a fit its weights may have been replaced."""
        if not self._weights.positions(pl_module):
            return False
        return self._running or self._weights.raw is None or self._weights.stands_in()


class _Publish:
    """The module's `on_save_checkpoint` during a fit: for weights alone, Lightning does not ask callbacks."""

    def __init__(self, ema: EMA, pl_module: L.LightningModule) -> None:
        self.ema = ema
        self.pl_module = pl_module
        self.original = pl_module.on_save_checkpoint

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if "averaging_state" not in checkpoint and self.ema._stands_for(self.pl_module):
            weights = self.ema._weights
            checkpoint["state_dict"] = weights.averaged_state(self.pl_module, checkpoint["state_dict"])
        self.original(checkpoint)


def _unpublish(pl_module: L.LightningModule) -> None:
    """Take away the stand-in of this or an earlier (interrupted) fit."""
    if isinstance(vars(pl_module).get("on_save_checkpoint"), _Publish):
        del pl_module.on_save_checkpoint
