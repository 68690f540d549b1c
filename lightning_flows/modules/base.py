"""What every generative model of the house is: a LightningModule that samples, measures and publishes itself."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.codecs import TextEncoder
from lightning_flows.flow import Condition, SampleNoise, Solution, StepNoise, Tokens, key, seeds_from
from lightning_flows.modules.cached_latents import check_tokens
from lightning_flows.modules.publishable import Publishable, run_seed

Progress = Callable[[int, int], None]
REQUESTED = {"label": "label", "caption": "tokens", "mask": "spatial"}  # key of a request -> stream of the condition


class Sampled(NamedTuple):
    """What a family draws whose density is known.

    Attributes:
        x: samples in data space, shape (B, ...).
        nfe: network calls.
        log_prob: log-density with which each was drawn, nats, shape (B,).
    """

    x: Tensor
    nfe: int
    log_prob: Tensor


class GenerativeModule(Publishable):
    """Base of the families: optimizer, keyed noise, sampling and saving; a family adds its losses and its sampler.

    Args:
        optimizer: class of the optimizer, or a ``functools.partial`` of one; called with the parameter groups.
        lr_scheduler: class of a learning-rate scheduler or a partial of one, stepped after every optimizer step.

    Attributes:
        progress: called with (step, steps) while `predict_step` samples, or None.
        text: makes the tokens of captions, for a network that reads tokens; None unless a family sets it.

    Raises:
        ValueError: an argument that a JSON config cannot say, such as a lambda.
    """

    network: nn.Module
    knows_sample_density = False  # whether `generate` tells the density of what it draws
    tasks: tuple[str, ...] = ("sample",)  # what requests may ask for

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.progress: Progress | None = None
        self.text: TextEncoder | None = None  # here: a class attribute would hide a submodule of this name

    def setup(self, stage: str) -> None:
        """Refuses cached tokens that are not this model's, before a step is taken.

        Raises:
            ValueError: tokens of another text encoder.
        """
        super().setup(stage)
        check_tokens(self.trainer.datamodule, self.text)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams of a condition that the model reads."""
        return tuple(getattr(self.network, "streams", ()))

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
        return_log_prob: bool = False,
        **options: Any,
    ) -> Any:
        """Samples in data space.

        Runs in eval mode. A sample depends on its own seed and condition alone, not on the batch around it.

        Args:
            condition: of the samples; None for none.
            n: number of samples; by default that of the condition, or of the seeds, or 1.
            seed: sample i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each sample, shape (B,).
            batch_size: most samples at a time; all by default.
            progress: called with (step, steps) after each step of the solver.
            return_log_prob: also give the log-density with which each sample was drawn, where a family knows it.
            options: options of the family's `generate`.

        Returns:
            What the codec decodes to: images in [-1, 1], shape (B, C, H, W); with ``return_log_prob``, that and nats
            of each, (B,).

        Raises:
            ValueError: counts that disagree, both ``seed`` and ``seeds``, a condition that the network cannot use, or
                a density that the family does not know.
        """
        if return_log_prob and not self.knows_sample_density:
            raise ValueError(f"return_log_prob: {type(self).__name__} does not know it; use log_prob on the samples")
        every = self._seeds(condition, n, seed, seeds)
        size, parts, densities = len(every) if batch_size is None else batch_size, [], []
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        with evaluation(self):
            for start in range(0, len(every), size):
                chunk = slice(start, start + size)
                part = condition[chunk].to(self.device) if condition is not None else None
                noise = SampleNoise(every[chunk])
                here = {name: v[chunk] if _has_rows(v) else v for name, v in options.items()}
                drawn = self.generate(part, noise, progress=progress, **here)
                parts.append(drawn.x)
                densities += [drawn.log_prob] if return_log_prob else []
        return (torch.cat(parts), torch.cat(densities)) if return_log_prob else torch.cat(parts)

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
            ValueError: see `check_requests`.
        """
        self.check_requests(batch)
        options = {"progress": self.progress, **self.options_of(batch)}
        sample = self.sample(self.condition_of(batch), seeds=batch["seed"], **options)
        return {"id": batch["id"], "sample": sample}

    def check_requests(self, batch: Any) -> None:
        """Refuse a batch of requests that would be ignored in part.

        Raises:
            ValueError: another task than this family's, images for samples that read none, or a condition that the
                network does not read.
        """
        task, streams = batch.get("task") or "sample", self.streams
        if task not in self.tasks:
            raise ValueError(f"the requests ask for the task {task!r}, but {type(self).__name__} has {self.tasks}")
        for name, stream in REQUESTED.items():
            hole = name == "mask" and task == "inpaint"  # no condition
            if name in batch and stream not in streams and not hole:
                reads = list(streams) or "no condition at all"
                raise ValueError(f"the requests give {name!r}, but {type(self.network).__name__} reads {reads}")
        if task == "sample" and batch.get("image") is not None:
            raise ValueError(f"the requests give images, but no task with a use for them; there are {self.tasks}")

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

    def options_of(self, batch: Any) -> dict[str, Any]:
        """What a batch of requests asks of `generate` beside its condition."""
        return {}

    def condition_of(self, batch: Any) -> Condition | None:
        """The condition that the network takes, from the keys of a batch; None where it takes none.

        Tokens are those that were cached, else those of the captions.

        Raises:
            ValueError: captions for a network that reads tokens, but no text encoder.
        """
        given = {
            "label": batch.get("label") if "label" in self.streams else None,
            "tokens": self._tokens_of(batch) if "tokens" in self.streams else None,
        }
        return None if all(value is None for value in given.values()) else Condition(**given)

    def _tokens_of(self, batch: Any) -> Tokens | None:
        if batch.get("tokens") is not None:
            return Tokens(batch["tokens"].float(), batch["tokens_mask"])
        if batch.get("caption") is None:
            return None
        if self.text is None:
            raise ValueError(
                f"the batch has a 'caption' and {type(self.network).__name__} reads tokens, but there is no text "
                f"encoder: give {type(self).__name__} text=..., such as codecs.FrozenText or codecs.WordEncoder"
            )
        return self.text.encode(batch["caption"], device=self.device, **self.text.facts_of(batch))

    def null_condition(self, condition: Condition | None, batch_size: int | None = None, **facts: Any) -> Condition:
        """The same condition with every stream of the network absent; with a text encoder, tokens of the null prompt.

        Args:
            condition: of B samples; None for none.
            batch_size: number of samples where there is no condition to tell it: a network that reads tokens is then
                given those of the null prompt too.
            facts: see `filled`.
        """
        null = self.network.null(condition, batch_size)
        size = null.batch_size or batch_size
        lacking = null.tokens is None and "tokens" in getattr(self.network, "streams", ())
        if self.text is not None and lacking and size is not None:
            return replace(null, tokens=self.text.null(size, device=self.device, **facts))
        return self.filled(null, **facts)

    def filled(self, condition: Condition | None, **facts: Any) -> Condition | None:
        """Values and mask of absent tokens replaced by those of the null prompt, which then is their prompt: present.

        For what a network's ``drop`` or ``null`` made: whatever absent tokens are to the network, it sees what an empty
        caption is encoded to. Without a text encoder, the condition itself.

        Args:
            condition: of B samples; None for none.
            facts: about the data, for the template of the prompts: ``self.text.facts_of(batch)``.

        Raises:
            ValueError: tokens of another length or width than those of the text encoder.
        """
        if self.text is None or condition is None or condition.tokens is None or "tokens" not in condition.present:
            return condition
        values, mask = condition.tokens
        if values.shape[1:] != (self.text.length, self.text.size):
            raise ValueError(
                f"condition.tokens must have shape (B, {self.text.length}, {self.text.size}), those of the text "
                f"encoder, got {tuple(values.shape)}"
            )
        null = self.text.null(len(values), device=values.device, **facts)
        here = condition.presence("tokens", device=values.device)
        filled = Tokens(
            torch.where(here[:, None, None], values, null.values.to(values.dtype)),  # (B, L, D)
            torch.where(here[:, None], mask, null.mask),
        )
        others = {name: present for name, present in condition.present.items() if name != "tokens"}
        return replace(condition, tokens=filled, present=others)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Condition) and value.batch_size is not None


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
