"""Test and validate seven items as one of the processes given; started by `test_evaluation_counts`."""

import sys

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_flows.callbacks import EMA, Evaluation, SamplingSpeed
from lightning_flows.data.keyed import EvaluationSampler
from lightning_flows.flow import Solution
from lightning_flows.metrics import PRDC, Frechet, KernelDistance
from lightning_flows.networks.parallel import leave_group_at_exit

ITEMS = 7


class Items(Dataset):
    """Images of one shade each."""

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2), float(index) ** 1.5), "index": index}


class Data(L.LightningDataModule):
    """Deals the items out as the data modules of the house do."""

    def _loader(self, wrap):
        known = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        sampler = EvaluationSampler(ITEMS, wrap=wrap, rank=known["rank"], world_size=known["num_replicas"])
        return DataLoader(Items(), batch_size=2, sampler=sampler)

    def train_dataloader(self):
        return self._loader(True)

    def val_dataloader(self):
        return self._loader(True)

    def test_dataloader(self):
        return self._loader(False)


class Shades(L.LightningModule):
    """Draws the index of an item, times a weight that training raises from 1 to 3 in one step."""

    steps, solver, guidance = 4, None, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.drawn = []

    def setup(self, stage):
        leave_group_at_exit()

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        return {"loss": torch.zeros(())}

    def test_step(self, batch, batch_idx):
        index = batch["index"]
        self.drawn += index.tolist()
        sample = (index * self.weight).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2) + torch.arange(4.0).reshape(2, 2) ** 2
        return {"real": self.data_of(batch), "sample": sample, "nfe": 8 + self.global_rank, "seconds": 0.5}

    def data_of(self, batch):
        return batch["image"]

    def condition_of(self, batch):
        return None

    def decode(self, z):
        return z

    def generate(self, condition, noise):
        return Solution(self.decode(torch.zeros(len(noise.seeds), 1, 2, 2)), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0)


def metrics():
    return [Frechet(), KernelDistance(subsets=3), PRDC(nearest=2)]


def trainer(folder, *callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_progress_bar": False, "use_distributed_sampler": False, "devices": 1}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet | options)


def evaluate(folder, devices, samples):
    """A test with more samples than items, and a look in a fit."""
    options = {"strategy": "ddp", "devices": 2} if devices == 2 else {}  # LOCAL_RANK says which one this is
    test = trainer(f"{folder}/test", Evaluation(metrics(), samples=samples), SamplingSpeed(repeats=1), **options)
    test.test(Shades(), datamodule=Data(), verbose=False)
    look = Evaluation(metrics(), samples=5, on="validation")
    fit = trainer(f"{folder}/fit", EMA(0.5), look, max_steps=1, num_sanity_val_steps=1, val_check_interval=1, **options)
    fit.fit(Shades(), datamodule=Data())


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
