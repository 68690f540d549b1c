"""How fast training runs, and how much of the device's arithmetic it uses.

    utilisation = (operations of one forward and backward pass) x (batches per second) / (peak of the
    device)

as in "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022), appendix B, except that
operations are counted as executed, so recomputed activations count twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# Dense peak in operations per second, bfloat16 (float16 for V100), by torch.cuda.get_device_name.
PEAK_FLOPS = {
    r"A100": 312e12,
    r"H100 80GB HBM3": 989e12,  # the SXM board; PCIe and NVL boards are slower
    r"H200(?! NVL)": 989e12,
    r"L4\b": 121e12,
    r"RTX 4090(?! D| Laptop)": 165.2e12,
    r"V100-SXM": 125e12,
}
WARM_UP = 2  # batches before the clock starts: counting operations, choosing kernels


class Throughput(Callback):
    """Logs `throughput/` `samples_per_second`, `step_seconds` and `model_flops_utilisation`.

    Windows of `every_n_steps` optimizer steps are timed on the host, without waiting for the device: its
    queue is short against a window, so the figures are right to about one step in a window. Time spent in
    validation is left out. Samples of all ranks are counted (as rank zero's times the number of ranks). The
    utilisation is logged where the peak is known: operations are counted during the first batch, which runs
    as usual. The peak is that of dense 16-bit matrix products: a run in float32 is measured against the
    same number.

    Args:
        every_n_steps: optimizer steps in a window.
        peak_flops: peak of one device, operations per second; None looks the GPU up in `PEAK_FLOPS`.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(self, every_n_steps: int = 50, *, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Throughput: every_n_steps must be at least 1, got {every_n_steps}.")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"Throughput: peak_flops must be positive or None, got {peak_flops}.")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self.flops_per_batch: int | None = None
        self._counter: FlopCounterMode | None = None
        self._warm_up = WARM_UP

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look the peak up and wait for the warm-up."""
        self._peak = self.peak_flops or known_peak(pl_module.device)
        self.flops_per_batch = None
        self._warm_up = WARM_UP
        self._open(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations of the first batch."""
        if self._peak is not None and self.flops_per_batch is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the window when it is full."""
        self._stop_counting()
        if self._warm_up > 0:
            self._warm_up -= 1
            self._open(trainer)
            return
        self._batches += 1
        self._samples += batch_size(batch)
        if trainer.global_step - self._first_step >= self.every_n_steps:
            self._log(trainer)
            self._open(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start += time.perf_counter() - self._paused_at

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no counter behind."""
        self._stop_counting()

    def _open(self, trainer: L.Trainer) -> None:
        self._start, self._first_step = time.perf_counter(), trainer.global_step
        self._batches = self._samples = 0

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops_per_batch = self._counter.get_total_flops()
            self._counter = None

    def _log(self, trainer: L.Trainer) -> None:
        seconds = time.perf_counter() - self._start
        metrics = {
            "throughput/samples_per_second": self._samples * trainer.world_size / seconds,
            "throughput/step_seconds": seconds / (trainer.global_step - self._first_step),
        }
        if self._peak is not None and self.flops_per_batch:
            speed = self.flops_per_batch * self._batches / seconds
            metrics["throughput/model_flops_utilisation"] = speed / self._peak
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def known_peak(device: torch.device) -> float | None:
    """Dense 16-bit peak of a GPU in operations per second, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor.

    Raises:
        ValueError: there is no tensor in it.
    """
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.ndim > 0:
            return len(part)
    raise ValueError(f"batch must be a tensor, or a mapping or sequence with one, got {type(batch).__name__}.")
