"""What every module of the house has: an optimizer, keyed noise, one config, and a way to weights and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.flow import StepNoise
from lightning_flows.modules.pretrained import from_pretrained
from lightning_flows.store import Recorded, config_of, save_folder


class Publishable(L.LightningModule, Recorded):
    """Base of all modules, generative ones and autoencoders: optimizer, keyed noise and saving.

    Args:
        optimizer: class of the optimizer, or a ``functools.partial`` of one; called with the parameter groups.
        lr_scheduler: class of a learning-rate scheduler or a partial of one, stepped after every optimizer step.

    Raises:
        ValueError: an argument that a JSON config cannot say, such as a lambda.
    """

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

    def on_fit_start(self) -> None:
        """Training mode for a model straight from `from_pretrained`; a choice made for some parts is kept."""
        if not any(part.training for part in self.modules()):
            self.train()

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

    def data_of(self, batch: Any) -> Tensor:
        """The data of a batch, shape (B, C, H, W).

        Raises:
            ValueError: a batch without images.
        """
        if "image" not in batch:
            raise ValueError(f"the batch has no 'image', only {sorted(batch)}")
        return batch["image"]

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


def _abstract_methods(cls: type) -> list[str]:
    # LightningModule has no ABCMeta, which would refuse such a class by itself.
    return [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
