"""Steps with a gradient that would do harm are left out, counted, and their batches kept to be looked at.

A step is bad when the norm of its whole gradient g, over all ranks and before clipping, is

    not finite,   or   |g| > max_norm,   or   |g| > spike * median(|g| of the last `window` good steps).

A bad step takes every gradient away, so that the optimizer touches neither parameters nor its own state.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

FOLDER = "bad_batches"


@dataclass
class History:
    """What is remembered of one optimizer: norms of the last good steps, and of the bad ones since."""

    good: deque[float]
    bad: list[float] = field(default_factory=list)


class GradientWatch(Callback):
    """Logs ``train/grad_norm`` and ``train/skipped_steps``, and leaves out steps with a bad gradient.

    What a bad step leaves as it was: the parameters and the whole state of the optimizer (AdamW's moments and
    its count of steps). What goes on: ``trainer.global_step`` and the learning-rate schedule, which count every
    step that was tried, and the `EMA`, which averages the unchanged weights once more.

    The norm is that of the optimizer's whole gradient, of all micro-batches and all ranks (after unscaling,
    before the trainer's clipping), so all ranks decide alike: a NaN on one of them is seen by all. It is read
    on the host at every step, which waits for the backward pass. The values are logged at the trainer's logging
    steps.

    The batch of a bad step (with accumulated gradients: all its micro-batches) goes to
    ``<default_root_dir>/bad_batches/step-<n>-rank-<r>.pt``, n being ``trainer.global_step`` before the step:
    ``torch.load(file, weights_only=True)`` gives ``step``, ``rank``, ``norm``, ``reason``, ``index`` (the
    ``index`` entries of the batches, or None) and ``batches``. Only the first ``keep`` bad steps of a run are
    kept. Until a step is taken its micro-batches are held on their device.

    The count, the window and the number of kept steps are saved in checkpoints.

    With ``16-mixed`` a norm that is not finite while the losses are is the gradient scaler's business: it skips
    the step and lowers its scale. Such a step is not counted; a loss that is not finite is a bad step.

    With manual optimization each optimizer has its own window and its own consecutive steps (logged as
    ``train/grad_norm/<number>``), and its norm is what the module has left of it (after its own clipping).

    Args:
        max_norm: largest norm of a good step, None for any.
        spike: largest ratio of the norm to the median of the window, None for any; in force once the window is
            full. Norms that rise for good and by more than this end the run after ``stop_after`` steps.
        window: number of good steps whose median is taken.
        stop_after: bad steps in a row (of one optimizer) after which the run ends; None never ends it.
        keep: bad steps whose batches are written, 0 for none.

    Attributes:
        skipped: bad steps so far, those before a resume included.

    Raises:
        ValueError: an argument that is out of its range.
        RuntimeError: in training, when ``stop_after`` steps in a row were bad.
    """

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        spike: float | None = None,
        window: int = 100,
        stop_after: int | None = 20,
        keep: int = 5,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"GradientWatch: max_norm must be positive or None, got {max_norm}.")
        if spike is not None and not spike > 1:
            raise ValueError(f"GradientWatch: spike must be above 1 or None, got {spike}.")
        if window < 1:
            raise ValueError(f"GradientWatch: window must be at least 1, got {window}.")
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"GradientWatch: stop_after must be at least 1 or None, got {stop_after}.")
        if keep < 0:
            raise ValueError(f"GradientWatch: keep must be at least 0, got {keep}.")
        self.max_norm, self.spike, self.window = max_norm, spike, window
        self.stop_after, self.keep = stop_after, keep
        self.skipped = self._kept = 0
        self._histories: list[History] = []
        self._forget_batches()

    # ------------------------------------------------------------------ the batches of a step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the batch until its step is taken."""
        if self._stepped:
            self._forget_batches()
        self._batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note whether the loss is finite, which tells a bad batch from a scale that is too large."""
        if _scaler(trainer) is not None:
            self._broken_losses.append(~torch.isfinite(loss.detach()).all())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the last batches go."""
        self._forget_batches()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let the last batches go."""
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._batches: list[Any] = []
        self._broken_losses: list[Tensor] = []
        self._stepped = False

    # ------------------------------------------------------------------ the decision

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradient; take it away where it is bad.

        Raises:
            RuntimeError: too many bad steps in a row.
        """
        self._stepped = True
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        _unscale(trainer, optimizer)
        norm = _agreed(total_norm([p.grad for p in params]), trainer)
        value, history = norm.item(), self._history(trainer, optimizer)
        reason = self._reason(value, history)
        if reason is None:
            history.good.append(value)
            history.bad.clear()
        elif not self._left_to_the_scaler(trainer, value):
            for param in params:
                param.grad = None
            self._count(trainer, value, reason, history)
        self._log(trainer, pl_module, optimizer, norm)
        self._stop(trainer, history)

    def _history(self, trainer: L.Trainer, optimizer: Optimizer) -> History:
        which = _number(trainer, optimizer)
        while len(self._histories) <= which:
            self._histories.append(History(deque(maxlen=self.window)))
        return self._histories[which]

    def _reason(self, norm: float, history: History) -> str | None:
        """Why a step with this norm is bad, None where it is good."""
        if not math.isfinite(norm):
            return f"norm {norm} is not finite"
        if self.max_norm is not None and norm > self.max_norm:
            return f"norm {norm:.4g} is above max_norm={self.max_norm:g}"
        if self.spike is not None and len(history.good) == self.window:
            median = statistics.median(history.good)
            if norm > self.spike * median:
                return f"norm {norm:.4g} is above spike={self.spike:g} times the median {median:.4g}"
        return None

    def _left_to_the_scaler(self, trainer: L.Trainer, norm: float) -> bool:
        if math.isfinite(norm) or _scaler(trainer) is None:
            return False
        broken = any(bool(flag) for flag in self._broken_losses)
        return not trainer.strategy.reduce_boolean_decision(broken, all=False)

    def _count(self, trainer: L.Trainer, norm: float, reason: str, history: History) -> None:
        self.skipped += 1
        history.bad.append(norm)
        if self._kept < self.keep:
            self._kept += 1
            self._write(trainer, norm, reason)

    def _stop(self, trainer: L.Trainer, history: History) -> None:
        if self.stop_after is None or len(history.bad) < self.stop_after:
            return
        norms = ", ".join(f"{norm:.4g}" for norm in history.bad[-10:])
        raise RuntimeError(
            f"GradientWatch: {len(history.bad)} steps in a row had a bad gradient, the last at step "
            f"{trainer.global_step}; their last norms were {norms}. "
            + (f"Batches of bad steps lie in {self._folder(trainer)}." if self._kept else "No batch was kept (keep=0).")
        )

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, norm: Tensor) -> None:
        suffix = f"/{_number(trainer, optimizer)}" if len(trainer.optimizers) > 1 else ""
        pl_module.log(f"train/grad_norm{suffix}", norm)
        pl_module.log("train/skipped_steps", float(self.skipped))

    # ------------------------------------------------------------------ files and state

    @staticmethod
    def _folder(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER

    def _write(self, trainer: L.Trainer, norm: float, reason: str) -> None:
        step, rank = trainer.global_step, trainer.global_rank
        path = self._folder(trainer) / f"step-{step}-rank-{rank}.pt"
        batches = [plain(batch) for batch in self._batches]
        index = [b["index"] for b in batches if isinstance(b, dict) and "index" in b] or None
        content = {"step": step, "rank": rank, "norm": norm, "reason": reason, "index": index, "batches": batches}
        try:
            _save(content, path)
        except (OSError, RuntimeError) as error:  # a full disk must not end a run that goes on without this step
            warnings.warn(f"GradientWatch: the batch of step {step} could not be kept in {path}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """Counts and windows."""
        histories = [{"good": list(h.good), "bad": list(h.bad)} for h in self._histories]
        return {"skipped": self.skipped, "kept": self._kept, "histories": histories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self._kept = state_dict["skipped"], state_dict["kept"]
        self._histories = [
            History(deque(state["good"], maxlen=self.window), list(state["bad"])) for state in state_dict["histories"]
        ]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a float32 scalar, the same on all ranks that share DTensors.

    Args:
        gradients: at least one; sharded ones (DTensor) count whole.
    """
    sharded = [g for g in gradients if hasattr(g, "full_tensor")]
    local = [g for g in gradients if not hasattr(g, "full_tensor")]
    norms = [get_total_norm(part) for part in (sharded, local) if part]
    whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.linalg.vector_norm(torch.stack([n.float().to(whole[0].device) for n in whole]))


def plain(value: Any) -> Any:
    """A copy on the CPU made of tensors, dicts, lists, strings and numbers; of anything else its ``repr``."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would bring the whole of its storage
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _save(content: dict[str, Any], path: Path) -> None:
    """Write under a temporary name, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(trainer: L.Trainer, optimizer: Optimizer) -> int:
    """Position of an optimizer among those of the trainer."""
    return next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), 0)


def _scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _unscale(trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Divide by the scale where the optimizer would do it inside its step, as fused ones do."""
    scaler = _scaler(trainer)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def _agreed(norm: Tensor, trainer: L.Trainer) -> Tensor:
    """The norm that rank zero measured: unequal devices may differ in the last bit, and then in the decision."""
    norm = norm.to(trainer.strategy.root_device)
    if trainer.world_size > 1:
        torch.distributed.broadcast(norm, src=0)
    return norm
