"""How long a sample takes: alone and in a batch, with the codec's decoding and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_flows.callbacks import results
from lightning_flows.callbacks.results import Json
from lightning_flows.callbacks.throughput import batch_size
from lightning_flows.flow import SampleNoise, seeds_from


class Timing(NamedTuple):
    """One drawing of a batch.

    Attributes:
        total: seconds of the whole batch.
        decode: seconds of it in the module's ``decode``.
        nfe: network calls per sample.
    """

    total: float
    decode: float
    nfe: int


class SamplingSpeed(Callback):
    """Times `generate` after a test and writes the block ``speed`` of `<default_root_dir>/metrics.json`.

    Its values ``seconds_per_sample[batch=N]`` hold ``with_decode`` and ``without_decode`` (null where the module has no
    ``decode``): medians over the repeats after the warm-up, in seconds of one sample, waiting for the device at both
    ends; beside them the fastest and the slowest repeat, network calls, solver, guidance, hardware, threads, processes
    and precision. Samples are drawn under the conditions of the first test batch, as the trainer draws them
    (precision, weights); what is written to files afterwards is not counted. With several processes all draw at the
    same time and the figures are those of the first.

    Args:
        batch_sizes: what to time; None is 1 and the size of the first test batch.
        repeats: timed drawings of each size.
        warm_up: drawings before the clock starts.
        max_seconds: no further repeat of a size begins after so many seconds (the first always does).

    Raises:
        ValueError: a count below 1, or a negative warm-up.
    """

    def __init__(
        self,
        batch_sizes: list[int] | None = None,
        *,
        repeats: int = 10,
        warm_up: int = 1,
        max_seconds: float = 5.0,
    ) -> None:
        for name, value in (("repeats", repeats), *(("batch_sizes", size) for size in batch_sizes or [])):
            if value < 1:
                raise ValueError(f"SamplingSpeed: {name} must be at least 1, got {value}.")
        if batch_sizes is not None and not batch_sizes:
            raise ValueError("SamplingSpeed: batch_sizes must name at least one size or be None, got [].")
        if warm_up < 0 or max_seconds <= 0:
            raise ValueError(
                f"SamplingSpeed: warm_up must not be negative and max_seconds positive, got {warm_up}, {max_seconds}."
            )
        self.batch_sizes, self.repeats, self.warm_up, self.max_seconds = batch_sizes, repeats, warm_up, max_seconds
        self._first: Any = None
        self._entries: dict[str, Json] = {}

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batch: its conditions are drawn under."""
        if batch_idx == dataloader_idx == 0:
            self._first = batch

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and time."""
        batch, self._first, self._entries = self._first, None, {}
        if batch is None:
            return
        with trainer.precision_plugin.forward_context():
            for size in dict.fromkeys(self.batch_sizes or [1, batch_size(batch)]):
                setting = results.setting(trainer, pl_module) | results.hardware(trainer, pl_module.device)
                self._entries[f"seconds_per_sample[batch={size}]"] = self._entry(pl_module, batch, size) | setting

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        if trainer.is_global_zero and self._entries:
            block = {"values": self._entries, "versions": results.versions()}
            results.update_json(Path(trainer.default_root_dir) / results.FILE, "speed", block)

    def _entry(self, pl_module: L.LightningModule, batch: Any, size: int) -> Json:
        timings = self._timings(pl_module, _condition(pl_module, batch, size), size)
        totals = [timing.total / size for timing in timings]
        without = [(timing.total - timing.decode) / size for timing in timings]
        decodes = getattr(pl_module, "decode", None) is not None
        return {
            "value": {
                "with_decode": statistics.median(totals),
                "without_decode": statistics.median(without) if decodes else None,
            },
            "fastest": min(totals),
            "slowest": max(totals),
            "batch_size": size,
            "repeats": len(timings),
            "warm_up": self.warm_up,
            "nfe": max(timing.nfe for timing in timings),
        }

    def _timings(self, pl_module: L.LightningModule, condition: Any, size: int) -> list[Timing]:
        for _ in range(self.warm_up):
            timed(pl_module, condition, size)
        timings, start = [], time.perf_counter()
        while len(timings) < self.repeats and (not timings or time.perf_counter() - start < self.max_seconds):
            timings.append(timed(pl_module, condition, size))
        return timings


def timed(pl_module: L.LightningModule, condition: Any, size: int) -> Timing:
    """Draw ``size`` samples under a condition of so many rows (or None), with the clock running."""
    decode: list[float] = []
    noise = SampleNoise([int(seed) for seed in seeds_from(0, size)])
    with _clocked(pl_module, "decode", decode):
        start = _clock(pl_module.device)
        solution = pl_module.generate(condition, noise)
        total = _clock(pl_module.device) - start
    return Timing(total, sum(decode), int(solution.nfe))


@contextmanager
def _clocked(module: Any, method: str, seconds: list[float]) -> Iterator[None]:
    """Collect how long each call of a method takes, where the module has it."""
    original: Callable[..., Tensor] | None = getattr(module, method, None)
    if original is None:
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Tensor:
        start = _clock(module.device)
        result = original(*args, **kwargs)
        seconds.append(_clock(module.device) - start)
        return result

    object.__setattr__(module, method, call)
    try:
        yield
    finally:
        object.__delattr__(module, method)


def _clock(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _condition(pl_module: L.LightningModule, batch: Any, size: int) -> Any:
    """The condition of the batch, its rows repeated in turn until there are ``size``; None where there is none."""
    condition = pl_module.condition_of(batch)
    if condition is None:
        return None
    rows = torch.arange(size) % condition.batch_size
    return condition[rows.to(pl_module.device)]
