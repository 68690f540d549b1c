"""Two processes that see half of the data each compute the value of one that sees all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from safetensors.torch import save_file

from lightning_flows.metrics import (
    LPIPS,
    PRDC,
    AskedMask,
    BitsPerDim,
    BoundaryFScore,
    Calibration,
    Features,
    Frechet,
    InceptionScore,
    KernelDistance,
    LabelAccuracy,
    LossPerTimeBin,
    MeanIoU,
    NearestNeighbour,
    PixelAccuracy,
    SlicedWasserstein,
    collect,
    save_references,
)


def _data():
    return torch.randn(2, 24, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _values(part, folder):
    maps, file = Features(torch.tanh, "maps", channels=1), folder / f"{part.start}.safetensors"
    save_references(file, collect([_data()[0]], maps, features=True))  # a reference is whole on every process
    real, samples = (x[part] for x in _data())
    metrics = [Frechet(), KernelDistance(subsets=4, subset_size=9), PRDC(nearest=3), NearestNeighbour(_data()[0][:5])]
    metrics += [Frechet(maps, str(file)), PRDC(maps, nearest=3, reference=str(file)), SlicedWasserstein(directions=8)]
    metrics += [InceptionScore(Features(torch.Tensor.exp, "logits"), splits=3)]
    for metric in metrics:
        metric.update(real, real=True)
        metric.update(samples, real=False)
    bits, bins = BitsPerDim(), LossPerTimeBin(2)
    bits.update(real.flatten(1).sum(1), 4)
    bins.update(real.flatten(1).sum(1), samples.flatten(1)[:, 0].sigmoid())
    out = {}
    for metric in [*metrics, bits, bins]:
        out |= _flat(metric.name, metric.compute())
    return out | _semantic(part, str(folder / "alexnet.safetensors"))


def _bright(x):
    return (x.mean(1) > 0).long()


def _semantic(part, weights):
    """Values of the metrics of masks, labels and pairs of images."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(4, (24, 9, 9), generator=generator)
    segmented = torch.where(torch.rand(mask.shape, generator=generator) < 0.7, mask, mask.roll(1, 2))
    mask[:, :2, :3] = 255
    scores = torch.randn(24, 5, generator=generator).softmax(1)
    label = torch.randint(5, (24,), generator=generator)
    real, sample = torch.rand(2, 24, 3, 32, 32, generator=generator) * 2 - 1
    asked = torch.randint(2, (24, 32, 32), generator=generator)
    given = [(metric, segmented, mask) for metric in (MeanIoU(4), MeanIoU(4, "paper", 1), PixelAccuracy(4))]
    given += [(metric, scores, label) for metric in (LabelAccuracy(5), LabelAccuracy(5, 2), Calibration(5))]
    given += [(BoundaryFScore(4), segmented, mask), (AskedMask(2, _bright), sample, asked)]
    given += [(LPIPS(backbone_weights=weights), real, sample)]
    values = {}
    for metric, *outputs in given:
        metric.update(*(output[part] for output in outputs))
        values |= _flat(metric.name, metric.compute())
    return values


def _flat(name, value):
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part, held in value.items() for key, item in _flat(f"{name}/{part}", held).items()}


def _worker(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.sync", rank=rank, world_size=2)
    values = _values(slice(rank * 10, 10 + rank * 14), Path(file).parent)  # 10 and 14 items
    if rank == 1:
        torch.save(values, file)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_agree_with_one(tmp_path):
    network = torchvision.models.alexnet(weights=None)
    save_file({f"features.{k}": v for k, v in network.features.state_dict().items()}, tmp_path / "alexnet.safetensors")
    mp.spawn(_worker, args=(str(tmp_path / "values.pt"),), nprocs=2)
    whole, split = _values(slice(None), tmp_path), torch.load(tmp_path / "values.pt", weights_only=True)
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        assert torch.allclose(value.double(), split[name].double(), rtol=1e-9, equal_nan=True), name
