"""A picture of what the model draws now: same seeds and labels at every look, so that pictures compare."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor, nn

from lightning_flows.callbacks.ema import EMA
from lightning_flows.callbacks.pictures import contact_sheet, to_image, write_png
from lightning_flows.flow.condition import Condition


class SampleGrid(Callback):
    """Draws samples with the averaged weights and writes them as one PNG under `<default_root_dir>/samples/`.

    Looks are taken after the validation of every `every_n_epochs`-th epoch (after the epoch itself where
    nothing is validated), every `every_n_steps` optimizer steps, and at the end of the fit; never twice at
    one step. The picture also goes to TensorBoard and Weights & Biases loggers. Every rank draws the same
    samples, since a sharded module needs them all; rank zero writes. The global random state is as before.

    Args:
        every_n_steps: optimizer steps between looks, None for none.
        every_n_epochs: epochs between looks, None for none.
        n: number of samples; by default 64, or as many whole rounds of `labels` as fit in 64 (at least one).
        labels: classes to draw, repeated in turn until there are `n`; None draws without condition.
        prompts: texts to draw, likewise, for a module that reads captions.
        seed: seed of all looks.
        nrow: pictures per row; by default one round of labels, else a square.
        at_fit_end: also look when the fit ends.
        filename: pattern with the field `step`, ends in `.png`.

    Raises:
        ValueError: a count below 1, empty labels or prompts, both of them, a bad pattern, or a module that does not
            sample (B, C, H, W).
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        n: int | None = None,
        labels: list[int] | None = None,
        prompts: list[str] | None = None,
        seed: int = 0,
        nrow: int | None = None,
        at_fit_end: bool = True,
        filename: str = "step-{step:06d}.png",
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "n": n, "nrow": nrow}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"SampleGrid: {name} must be at least 1 or None, got {value}.")
        if labels is not None and not labels:
            raise ValueError("SampleGrid: labels must name at least one class or be None, got [].")
        if prompts is not None and (labels is not None or not prompts):
            raise ValueError(f"SampleGrid: prompts must be at least one text, and without labels, got {prompts}.")
        if not filename.endswith(".png") or filename.format(step=1) == filename.format(step=2):
            raise ValueError(f"SampleGrid: filename must contain {{step}} and end in .png, got {filename!r}.")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        named = labels or prompts
        self.n = n or (len(named) * max(1, 64 // len(named)) if named else 64)
        self.labels, self.prompts = labels, prompts
        self.seed = seed
        self.nrow = nrow or (len(named) if named else math.ceil(math.sqrt(self.n)))
        self.at_fit_end = at_fit_end
        self.filename = filename
        self._drawn_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed step was looked at before."""
        self._drawn_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every `every_n_steps` optimizer steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look after a validation inside a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_due(trainer):
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look after an epoch that was not validated."""
        if self._is_due(trainer):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the result."""
        if self.at_fit_end:
            self._look(trainer, pl_module)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._drawn_at:
            return
        self._drawn_at = step
        samples = self._draw(trainer, pl_module)  # (n, C, H, W)
        if trainer.is_global_zero:
            sheet = contact_sheet([to_image(sample) for sample in samples], self.nrow)
            write_png(sheet, Path(trainer.default_root_dir) / "samples" / self.filename.format(step=step))
            for logger in trainer.loggers:
                _log_picture(logger, sheet, step)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        with (
            isolate_rng(),
            _averaged_weights(trainer),
            _evaluating(pl_module),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            samples = self._samples(trainer, pl_module)
        if not isinstance(samples, Tensor) or samples.ndim != 4:
            got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise ValueError(f"SampleGrid: {type(pl_module).__name__} must give (B, C, H, W), got {got}.")
        return samples

    def _samples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        return pl_module.sample(self._condition(pl_module), n=self.n, seed=self.seed)

    def _condition(self, pl_module: L.LightningModule) -> Condition | None:
        named = self.labels or self.prompts
        if named is None:
            return None
        every = (named * -(-self.n // len(named)))[: self.n]
        if self.prompts is not None:
            return pl_module.condition_of({"caption": every})
        return Condition(label=torch.tensor(every, device=pl_module.device))


def _averaged_weights(trainer: L.Trainer) -> contextlib.AbstractContextManager[None]:
    """The weights that are published: those of the EMA callback, if there is one."""
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            return callback.averaged()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each submodule's own mode again (frozen parts may have been in it already)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _log_picture(logger: Logger, sheet: Image.Image, step: int) -> None:
    """Hand the picture to loggers that take one: W&B `log_image`, TensorBoard `experiment.add_image`."""
    if hasattr(logger, "log_image"):
        logger.log_image(key="samples", images=[sheet], step=step)
    elif hasattr(logger.experiment, "add_image"):
        pixels = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
        logger.experiment.add_image("samples", pixels.view(sheet.height, sheet.width, 3), step, dataformats="HWC")
