"""Low-rank adapters for a run: what is trained is a small addition to weights that stay as they are.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_flows.callbacks.ema import EMA
from lightning_flows.networks import adapters_of, add_lora, save_adapter
from lightning_flows.networks.adapter_record import RECORD, restore_record


class LoRA(Callback):
    """Trains an adapter instead of the module (see `networks.add_lora`).

    The adapter is put on before the optimizer is made and before a checkpoint is resumed; everything else is frozen.
    Checkpoints hold the whole model with its adapter: they are resumed with this callback, and whatever reads weights
    from them (`from_pretrained`, `init_from`, test, predict, export) gets a plain model with the adapter merged.
    An average of the weights (`EMA`) is one of the adapter.

    After the fit the adapter stays on the module, and lies in a folder of the run by itself, ready for
    `networks.load_adapter` and for the Hub.

    Args:
        rank: of the adapter.
        alpha: the adapter is scaled by ``alpha / rank``; ``rank`` by default.
        targets: patterns of the layers to adapt; Linears and 1x1 convolutions of the blocks by default.
        train: patterns of parameters that are trained in full, such as ``y_embedder.*``.
        dropout: rate before the first factor. It draws from the global stream: a run that is resumed then differs
            from one that never stopped.
        name: of the adapter.
        save_to: folder for the adapter, inside the run's folder; None writes none.
        seed: of the adapter's start.

    Raises:
        ValueError: see `networks.add_lora`; when the fit starts.
    """

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        targets: list[str] | None = None,
        train: list[str] | None = None,
        dropout: float = 0.0,
        name: str = "default",
        save_to: str | None = "adapter",
        seed: int = 0,
    ) -> None:
        self.rank, self.alpha, self.targets, self.train = rank, alpha, targets, train
        self.dropout, self.name, self.save_to, self.seed = dropout, name, save_to, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the adapter on when a fit begins, unless the module has it from an earlier one."""
        if stage != "fit" or self.name in adapters_of(pl_module):
            return
        trained = add_lora(
            pl_module,
            self.rank,
            alpha=self.alpha,
            targets=self.targets,
            train=self.train or (),
            dropout=self.dropout,
            name=self.name,
            seed=self.seed,
        )
        whole = sum(parameter.numel() for parameter in pl_module.parameters())
        rank_zero_info(f"LoRA: {sum(trained.values()):,} of {whole:,} parameters are trained")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over what the run began from: the module itself was built from merged weights."""
        if RECORD in checkpoint and adapters_of(pl_module):
            restore_record(pl_module, checkpoint[RECORD])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the adapter, averaged where the run averages."""
        if self.save_to is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        average = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        with average.averaged() if average else nullcontext():
            save_adapter(pl_module, Path(trainer.default_root_dir) / self.save_to, name=self.name)
