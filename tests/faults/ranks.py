"""Two processes of which one fails; run by ``test_ranks.py`` (by torchrun too)."""

import os
import sys
import time

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_flows.callbacks import FailTogether


class Toy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 1))

    def training_step(self, batch):
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Fail(Callback):
    """Rank ``rank`` raises in the second step; ``wait``: the others hang as in an exchange without a time limit."""

    def __init__(self, rank, wait):
        self.rank, self.wait = rank, wait

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1 and trainer.global_rank == self.rank:
            raise ValueError(f"rank {self.rank} found a broken batch")
        if batch_idx == 1 and self.wait:
            time.sleep(1000)


def fit(folder, rank, wait):
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=4, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[FailTogether(), Fail(rank, wait)],
    )  # fmt: skip
    trainer.fit(Toy())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fit(sys.argv[1], int(sys.argv[2]), wait=len(sys.argv) > 3)
