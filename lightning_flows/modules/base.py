"""What every generative model of the house is: a LightningModule that samples, measures and publishes itself."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.flow import Condition, SampleNoise, Solution, StepNoise, key, seeds_from
from lightning_flows.modules.pretrained import from_pretrained
from lightning_flows.store import Recorded, config_of, save_folder

Progress = Callable[[int, int], None]
REQUESTED = {"label": "label", "caption": "tokens", "mask": "spatial"}  # key of a request -> stream of the condition


class GenerativeModule(L.LightningModule, Recorded):
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
        super().__init__()
        if missing := _abstract_methods(type(self)):
            raise TypeError(f"{type(self).__name__} is abstract: it lacks {', '.join(missing)}")
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.progress: Progress | None = None
        config = config_of(self)
        # Lightning rebuilds a module from these, the same for modules built in Python and by the command line.
        self.save_hyperparameters(
            {
                **config["init_args"],
                "_class_path": config["class_path"],
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
            },
            logger=False,
        )

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Training mode for a model straight from `from_pretrained`; a choice made for some parts is kept."""
        if not any(part.training for part in self.modules()):
            self.train()

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

    def training_noise(self) -> StepNoise:
        """The random numbers of this training batch, keyed by (run seed, batch of the run, rank)."""
        return StepNoise(run_seed(), self.trainer.fit_loop.epoch_loop.total_batch_idx, self.global_rank)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, in groups with and without weight decay, and its scheduler."""
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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

    def data_of(self, batch: Any) -> Tensor:
        """The data of a batch, shape (B, C, H, W).

        Raises:
            ValueError: a batch without images.
        """
        if "image" not in batch:
            raise ValueError(f"the batch has no 'image', only {sorted(batch)}")
        return batch["image"]

    def condition_of(self, batch: Any) -> Condition | None:
        """The condition that the network takes, from the keys of a batch; None where it takes none."""
        if "label" in getattr(self.network, "streams", ()) and batch.get("label") is not None:
            return Condition(label=batch["label"])
        return None

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder: str | Path, extra_files: dict[str, str] | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (what is trained, nothing frozen) to a folder.

        Args:
            folder: made if needed; the files appear whole or not at all.
            extra_files: name -> text of other files (card, recipe).

        Returns:
            The folder.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_folder(folder, config_of(self), tensors, extra_files)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, ref: str | Path, **options: Any) -> Self:
        """See `modules.from_pretrained`; a model of another class is a ValueError."""
        return from_pretrained(ref, base=cls, **options)


def run_seed() -> int:
    """The seed of the run (``seed_everything``), 0 where none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and vectors (biases, gains), which are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the module has no trainable parameter")
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def clock(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _abstract_methods(cls: type) -> list[str]:
    # LightningModule has no ABCMeta, which would refuse such a class by itself.
    return [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]


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
