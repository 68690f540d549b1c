"""What every module of the house has: an optimizer, keyed noise, one config, and a way to weights and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_flows.flow import StepNoise
from lightning_flows.modules.pretrained import from_pretrained
from lightning_flows.networks import shard_blocks
from lightning_flows.networks.adapter_record import RECORD, check_record, plain_state, record
from lightning_flows.networks.parallel import is_sharded, leave_group_at_exit, whole
from lightning_flows.networks.parts import factors_of
from lightning_flows.store import Recorded, config_of, save_folder


class Publishable(L.LightningModule, Recorded):
    """Base of all modules, generative ones and autoencoders: optimizer, keyed noise and saving.

    Args:
        optimizer: class of the optimizer, or a ``functools.partial`` of one; called with the parameter groups.
        lr_scheduler: class of a learning-rate scheduler or a partial of one, stepped after every optimizer step.

    Attributes:
        learning_rates: name or pattern of parameters -> factor on the learning rate, the first that fits; None for one
            rate. It belongs to a run, not to the config; see `callbacks.LearningRates`.

    Raises:
        ValueError: an argument that a JSON config cannot say, such as a lambda.
    """

    learning_rates: Mapping[str, float] | None = None

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

    def setup(self, stage: str) -> None:
        """Lets a run of several processes end well."""
        leave_group_at_exit()

    def configure_model(self) -> None:
        """Spreads the network over the devices of a strategy that has a mesh of them (`strategies.FSDP2`).

        Raises:
            ValueError: a strategy that splits tensors among devices, or a module that cannot be spread.
        """
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"tensor_parallel_size must be 1, got {mesh['tensor_parallel'].size()}: use strategy='fsdp2', or "
                "ModelParallelStrategy(data_parallel_size=DEVICES, tensor_parallel_size=1)"
            )
        self.shard(mesh["data_parallel"])

    def shard(self, mesh: DeviceMesh) -> None:
        """Spreads what is trained over the devices of a mesh of one axis; by default ``self.network``.

        Raises:
            ValueError: a module without ``network``, or one that trains something beside it: nobody would add up the
                gradients of that.
        """
        network = getattr(self, "network", None)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{type(self).__name__} has no network to shard: use strategy='ddp'")
        named = self.named_parameters()
        if others := [name for name, p in named if p.requires_grad and not name.startswith("network.")]:
            raise ValueError(
                f"strategy 'fsdp2' spreads the network alone, and {', '.join(others[:3])} are trained as well: use "
                "strategy='ddp'"
            )
        shard_blocks(network, mesh)

    def on_fit_start(self) -> None:
        """Training mode for a model straight from `from_pretrained`; a choice made for some parts is kept."""
        if not any(part.training for part in self.modules()):
            self.train()

    def training_noise(self) -> StepNoise:
        """The random numbers of this training batch, keyed by (run seed, batch of the run, rank)."""
        return StepNoise(run_seed(), self.trainer.fit_loop.epoch_loop.total_batch_idx, self.global_rank)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, in groups with and without weight decay, and its scheduler."""
        optimizer = self.optimizer_over(self, self.make_optimizer)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_over(self, part: nn.Module, make: OptimizerCallable) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters of a part (or all) of the module, at their `learning_rates`.

        Raises:
            ValueError: nothing to train; a pattern of `learning_rates` that fits nothing, a factor not above 0.
        """
        if self.learning_rates is None:
            return make(parameter_groups(part))
        named = dict(self.named_parameters())
        factors = factors_of(named, self.learning_rates, argument="learning_rates")
        optimizer = make(parameter_groups(part, {named[name]: factor for name, factor in factors.items()}))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["lr_factor"]
        return optimizer

    def data_of(self, batch: Any) -> Tensor:
        """The data of a batch, shape (B, C, H, W).

        Raises:
            ValueError: a batch without images.
        """
        if "image" not in batch:
            raise ValueError(f"the batch has no 'image', only {sorted(batch)}")
        return batch["image"]

    # ------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says which adapters the weights of a checkpoint carry, if any."""
        if (said := record(self)) is not None:
            checkpoint[RECORD] = said

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other adapters.

        Raises:
            ValueError: the model has not the adapters of the checkpoint.
        """
        check_record(self, checkpoint.get(RECORD))

    def save_pretrained(self, folder: str | Path, extra_files: dict[str, str] | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (what is trained, nothing frozen) to a folder.

        Adapters in use are merged in the file (`networks.save_adapter` writes one by itself). Of a model that is spread
        over devices every process must call it; the first one writes.

        Args:
            folder: made if needed; the files appear whole or not at all.
            extra_files: name -> text of other files (card, recipe).

        Returns:
            The folder.
        """
        tensors = {name: whole(value).detach().cpu().contiguous() for name, value in self.state_dict().items()}
        tensors = plain_state(tensors, record(self))
        sharded = is_sharded(self)
        if not sharded or dist.get_rank() == 0:
            save_folder(folder, config_of(self), tensors, extra_files)
        if sharded:
            dist.barrier()
        return Path(folder)

    @classmethod
    def from_pretrained(cls, ref: str | Path, **options: Any) -> Self:
        """See `modules.from_pretrained`; a model of another class is a ValueError."""
        return from_pretrained(ref, base=cls, **options)


def run_seed() -> int:
    """The seed of the run (``seed_everything``), 0 where none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def parameter_groups(module: nn.Module, factors: Mapping[nn.Parameter, float] | None = None) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and vectors (biases, gains), which are not decayed.

    With ``factors``, in two for each factor, in order of appearance, with a ``name`` and their ``lr_factor``.

    Raises:
        ValueError: nothing to train.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the module has no trainable parameter")
    if factors is None:
        return _by_shape(trained)
    alike: dict[str, list[nn.Parameter]] = {}
    for parameter in trained:
        alike.setdefault(f"x{factors[parameter]:.6g}", []).append(parameter)
    return [
        {**group, "name": name + ("/vectors" if "weight_decay" in group else ""), "lr_factor": factors[members[0]]}
        for name, members in alike.items()
        for group in _by_shape(members)
    ]


def _by_shape(trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _abstract_methods(cls: type) -> list[str]:
    # LightningModule has no ABCMeta, which would refuse such a class by itself.
    return [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
