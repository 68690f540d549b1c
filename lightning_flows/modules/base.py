"""What every generative model of the house is: a LightningModule that samples, measures and publishes itself."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.flow import Condition, SampleNoise, Solution, StepNoise, key, seeds_from
from lightning_flows.modules.publishable import Publishable, run_seed

Progress = Callable[[int, int], None]
REQUESTED = {"label": "label", "caption": "tokens", "mask": "spatial"}  # key of a request -> stream of the condition


class GenerativeModule(Publishable):
    """Base of the families: optimizer, keyed noise, sampling and saving; a family adds its losses and its sampler.

    Args:
        optimizer: class of the optimizer, or a ``functools.partial`` of one; called with the parameter groups.
        lr_scheduler: class of a learning-rate scheduler or a partial of one, stepped after every optimizer step.

    Attributes:
        progress: called with (step, steps) while `predict_step` samples, or None.

    Raises:
        ValueError: an argument that a JSON config cannot say, such as a lambda.
    """

    network: nn.Module

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.progress: Progress | None = None

    # ------------------------------------------------------------------ training

    @abstractmethod
    def losses(self, batch: Any, noise: StepNoise) -> Any:
        """Per-sample `flow.Losses` of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch, a scalar; logs ``train/loss``."""
        losses = self.losses(batch, self.training_noise())
        loss = losses.loss.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(losses.loss))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Losses of a batch with the same noise at every validation, each (B,); logs ``val/loss``."""
        losses = self.losses(batch, StepNoise(key("validation", run_seed()), batch_idx, self.global_rank))
        size = len(losses.loss)
        self.log("val/loss", losses.loss.mean(), prog_bar=True, batch_size=size, sync_dist=True)
        return {"loss": losses.loss.mean(), "losses": losses.loss, **losses.logs}

    # ------------------------------------------------------------------ sampling

    @abstractmethod
    def generate(self, condition: Condition | None, noise: SampleNoise, **options: Any) -> Solution:
        """Samples in data space and the number of network calls; ``noise`` has one seed for each sample."""

    @abstractmethod
    def log_prob(self, x: Tensor, condition: Condition | None = None, **options: Any) -> Tensor:
        """Log-density in nats of each sample of ``x`` (B, ...), shape (B,)."""

    def density_dims(self, x: Tensor) -> int:
        """Number of dimensions of the variable whose density `log_prob` gives, for data ``x`` (B, ...)."""
        return x[0].numel()

    @torch.no_grad()
    def sample(
        self,
        condition: Condition | None = None,
        *,
        n: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Tensor:
        """Samples in data space.

        Runs in eval mode. A sample depends on its own seed and condition alone, not on the batch around it.

        Args:
            condition: of the samples; None for none.
            n: number of samples; by default that of the condition, or of the seeds, or 1.
            seed: sample i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each sample, shape (B,).
            batch_size: most samples at a time; all by default.
            progress: called with (step, steps) after each step of the solver.
            options: options of the family's `generate`.

        Returns:
            What the codec decodes to: images in [-1, 1], shape (B, C, H, W).

        Raises:
            ValueError: counts that disagree, both ``seed`` and ``seeds``, or a condition that the network cannot use.
        """
        every = self._seeds(condition, n, seed, seeds)
        size, parts = len(every) if batch_size is None else batch_size, []
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        with evaluation(self):
            for start in range(0, len(every), size):
                chunk = slice(start, start + size)
                part = condition[chunk].to(self.device) if condition is not None else None
                noise = SampleNoise(every[chunk])
                parts.append(self.generate(part, noise, progress=progress, **options).x)
        return torch.cat(parts)

    @staticmethod
    def _seeds(
        condition: Condition | None, n: int | None, seed: int | None, seeds: Sequence[int] | Tensor | None
    ) -> list[int]:
        if seed is not None and seeds is not None:
            raise ValueError("seed and seeds exclude each other")
        given = {
            "n": n,
            "condition": condition.batch_size if condition is not None else None,
            "seeds": len(seeds) if seeds is not None else None,
        }
        counts = {name: count for name, count in given.items() if count is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the number of samples disagrees: {counts}")
        count = next(iter(counts.values()), 1)
        if count < 1:
            raise ValueError(f"n must be at least 1, got {count}")
        return [int(s) for s in (seeds_from(seed or 0, count) if seeds is None else seeds)]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One sample for each request: ``{"id": list of B names, "sample": (B, ...)}``.

        Raises:
            ValueError: the requests give a condition that the network does not read.
        """
        streams = getattr(self.network, "streams", ())
        for name, stream in REQUESTED.items():
            if name in batch and stream not in streams:
                reads = list(streams) or "no condition at all"
                raise ValueError(f"the requests give {name!r}, but {type(self.network).__name__} reads {reads}")
        sample = self.sample(self.condition_of(batch), seeds=batch["seed"], progress=self.progress)
        return {"id": batch["id"], "sample": sample}

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One sample beside each real item, under its condition and a seed of its own index."""
        real, condition = self.data_of(batch), self.condition_of(batch)
        index = batch.get("index", torch.arange(len(real)) + batch_idx * len(real))
        noise = SampleNoise([key("test", run_seed(), int(i)) for i in index])
        start = clock(real.device)
        solution = self.generate(condition, noise)
        seconds = clock(real.device) - start
        return {
            "real": real,
            "sample": solution.x,
            "label": batch.get("label"),
            "index": index,
            "nfe": solution.nfe,
            "seconds": seconds,
        }

    def condition_of(self, batch: Any) -> Condition | None:
        """The condition that the network takes, from the keys of a batch; None where it takes none."""
        if "label" in getattr(self.network, "streams", ()) and batch.get("label") is not None:
            return Condition(label=batch["label"])
        return None


def clock(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode of every part afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
