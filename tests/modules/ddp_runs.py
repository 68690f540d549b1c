"""Gradients, three steps and predictions on the number of processes given; started by `test_ddp`."""

import functools
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_flows.callbacks import EMA, PredictionWriter
from lightning_flows.data import Digits, Requests
from lightning_flows.flow import StepNoise
from lightning_flows.modules import LatentFlowMatching
from tests.modules.tiny import dit

BATCH = 24  # of all devices together
LABELS = [3, 1, 4, 1, 5, 9, 2]


class Rows(StepNoise):
    """The rows of one rank of the draws for all: rank r of B rows has rows rB to (r + 1)B - 1."""

    def __init__(self, seed, step, *, rank, rows):
        super().__init__(seed, step)
        self.start, self.rows = rank * rows, rows

    def draw(self, purpose, shape, sampler):
        whole = super().draw(purpose, (BATCH, *shape[1:]), sampler)
        return whole[self.start : self.start + self.rows]

    def generator(self, purpose):
        generator = super().generator(purpose)
        if purpose in ("time", "drop") and self.start:  # skip the numbers of the ranks before
            dtype = torch.float64 if purpose == "time" else torch.float32
            torch.rand(self.start, generator=generator, dtype=dtype)
        return generator


class OneNoise(LatentFlowMatching):
    """Draws the same noise on any number of devices, in the same order of the items: rank by rank."""

    def training_noise(self):
        rows = BATCH // self.trainer.world_size
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return Rows(7, step, rank=self.global_rank, rows=rows)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.world_size == 1:  # rank r of two has every second item, from r on
            order = torch.cat([torch.arange(0, BATCH, 2), torch.arange(1, BATCH, 2)])
            return {name: value[order] for name, value in batch.items()}
        return batch


def build(cls=LatentFlowMatching, **options):
    network = dit(input_size=8, patch_size=4, num_classes=10)
    return cls(network=network, steps=4, optimizer=functools.partial(torch.optim.SGD, lr=0.01), **options)


def trainer(folder, devices, callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )


def digits(devices):
    return Digits(batch_size=BATCH // devices, val_fraction=0.05, test_fraction=0.9)


class Report(Callback):
    """Saves what a rank saw to ``NAME-RANK.pt``."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        self.found = {"index": [], "t": [], "gradients": []}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.found["index"].append(batch["index"].tolist())
        self.found["t"].append(module.losses(batch, module.training_noise()).logs["t"])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found["gradients"].append({n: p.grad.clone() for n, p in module.named_parameters()})

    def on_train_end(self, trainer, module):
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save({**self.found, "state": state}, self.folder / f"{self.name}-{trainer.global_rank}.pt")


def everything(folder, devices):
    """All runs, one after the other in the same processes."""
    torch.set_num_threads(1)
    same = trainer(folder, devices, [Report(folder, "same")], max_steps=2)
    same.fit(build(OneNoise), digits(devices))
    fit = trainer(folder, devices, [Report(folder, "fit"), EMA(decay=0.5)], max_steps=3)
    fit.fit(build(standardize=1), digits(devices))
    predict = trainer(folder, devices, [PredictionWriter()])
    predict.predict(build(), Requests(labels=LABELS, seed=5, batch_size=2), return_predictions=False)


if __name__ == "__main__":
    everything(sys.argv[1], int(sys.argv[2]))
