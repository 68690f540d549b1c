"""Draw three images for each of seven masks as one of the processes given; started by `test_evaluation_semantic`."""

import sys

import torch
from torch.utils.data import DataLoader

from lightning_flows.callbacks import Evaluation
from lightning_flows.data.keyed import EvaluationSampler
from lightning_flows.metrics import AskedMask, Calibration, Frechet, LabelAccuracy, MeanIoU, PixelAccuracy
from tests.callbacks.evaluation_ranks import ITEMS, Data, Items, Shades, trainer


class Masked(Items):
    """Images with masks and labels."""

    def __getitem__(self, index):
        mask = torch.zeros(2, 2, dtype=torch.int64)
        mask[0, 0] = index % 2
        return {**super().__getitem__(index), "mask": mask, "label": index % 2}


class MaskedData(Data):
    """Deals them out as `Data` does."""

    def _loader(self, wrap):
        known = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        sampler = EvaluationSampler(ITEMS, wrap=wrap, rank=known["rank"], world_size=known["num_replicas"])
        return DataLoader(Masked(), batch_size=2, sampler=sampler)


class Reader(Shades):
    """Reads every mask rightly but for one pixel, and knows no label where the data have none."""

    def test_step(self, batch, batch_idx):
        outputs = {**super().test_step(batch, batch_idx), "mask": batch.get("mask"), "label": batch.get("label")}
        if batch.get("mask") is not None:
            outputs["segmented"] = batch["mask"].clone()
            outputs["segmented"][batch["index"] == 0, 1, 1] = 2
        if batch.get("label") is not None:
            outputs["class_scores"] = torch.nn.functional.one_hot(batch["label"], 2).float()
        return outputs


def dark(x):
    """A rule that sees the class 0 everywhere."""
    return torch.zeros_like(x[:, 0], dtype=torch.int64)


def semantic():
    return [MeanIoU(4), PixelAccuracy(4), LabelAccuracy(2), Calibration(4), AskedMask(2, dark)]


def evaluate(folder, devices):
    """A test and a look."""
    options = {"strategy": "ddp", "devices": 2} if devices == 2 else {}  # LOCAL_RANK says which one this is
    for on in ("test", "validation"):
        run = trainer(folder, Evaluation([Frechet(), *semantic()], per_item=3, on=on), **options)
        (run.test if on == "test" else run.validate)(Reader(), datamodule=MaskedData(), verbose=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(sys.argv[1], int(sys.argv[2]))
