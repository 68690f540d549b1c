"""Runs of one small model under several strategies; started by `test_strategies` on two processes.

    python -m tests.strategies.runs FOLDER first|second

``FOLDER/NAME/losses.pt`` holds the losses of all steps, ``FOLDER/NAME/step=N.ckpt`` the run after N steps, ``end.ckpt``
what is written when it is over, and ``model`` the model.
"""

import functools
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_flows.strategies  # noqa: F401  (registers fsdp2)
from lightning_flows.callbacks import EMA
from lightning_flows.data import Digits
from lightning_flows.modules import WarmupCosine
from lightning_flows.networks import checkpoint_blocks
from tests.modules.ddp_runs import OneNoise
from tests.modules.tiny import dit

BATCH = 24  # of all devices together
STEPS = 20


class SameRows(OneNoise):
    """Validation batches stay as they are."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return super().on_after_batch_transfer(batch, dataloader_idx) if self.trainer.training else batch


class Losses(Callback):
    """The mean loss over the ranks at every optimizer step, of its micro-batches together."""

    def __init__(self):
        self.losses, self.parts = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.parts.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
        if trainer.global_step > len(self.losses):
            self.losses.append(sum(self.parts) / len(self.parts))
            self.parts = []


def model(**options):
    """A DiT of three blocks, optimised as the recipes do."""
    network = dit(input_size=8, patch_size=4, depth=3, num_classes=10, **options)
    return SameRows(
        network=network,
        steps=2,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=40, warmup_steps=5),
        standardize=1,
    )


def trainer(folder, strategy, devices, steps, callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[EMA(decay=0.9), *callbacks],
        **options,
    )


def run(folder, name, strategy, devices, steps=STEPS, *, ckpt_path=None, change=None, **options):
    """A fit with validations on the way; its checkpoints are written in the middle and at the end."""
    L.seed_everything(7, verbose=False)
    folder, losses = Path(folder) / name, Losses()
    fitted = model()
    if change is not None:
        change(fitted.network)
    batch_size = BATCH // devices // options.get("accumulate_grad_batches", 1)
    data = Digits(batch_size=batch_size, val_fraction=0.05, test_fraction=0.75)
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    made = trainer(folder, strategy, devices, steps, [losses, every], val_check_interval=7, **options)
    made.fit(fitted, data, ckpt_path=ckpt_path)
    made.save_checkpoint(folder / "end.ckpt")
    fitted.save_pretrained(folder / "model")
    if made.global_rank == 0:
        torch.save(losses.losses, folder / "losses.pt")


def first(folder):
    """Runs of two processes, some from the middle of that of a single one."""
    half = folder / "one" / f"step={STEPS // 2}.ckpt"
    run(folder, "ddp", "ddp", 2)
    run(folder, "fsdp2", "fsdp2", 2)
    run(folder, "fsdp2-from-one", "fsdp2", 2, ckpt_path=half)
    run(folder, "ddp-from-one", "ddp", 2, ckpt_path=half)
    run(folder, "fsdp2-recomputed", "fsdp2", 2, change=checkpoint_blocks)
    for precision in ("bf16-mixed", "bf16-true"):
        run(folder, precision, "fsdp2", 2, STEPS // 2, precision=precision)


def second(folder):
    """A run that is over, back from a single process: nothing is left to do but to write it down again."""
    run(folder, "fsdp2-again", "fsdp2", 2, ckpt_path=folder / "one-from-fsdp2" / "end.ckpt")


if __name__ == "__main__":
    from tests.strategies import runs  # classes of __main__ cannot be named in a config

    torch.set_num_threads(1)
    {"first": runs.first, "second": runs.second}[sys.argv[2]](Path(sys.argv[1]))
