"""Two processes that see half of the data each compute the value of one that sees all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_flows.metrics import (
    PRDC,
    BitsPerDim,
    Features,
    Frechet,
    InceptionScore,
    KernelDistance,
    LossPerTimeBin,
    NearestNeighbour,
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
        value = metric.compute()
        out |= {f"{metric.name}/{k}": v for k, v in (value if isinstance(value, dict) else {"": value}).items()}
    return out


def _worker(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.sync", rank=rank, world_size=2)
    values = _values(slice(rank * 10, 10 + rank * 14), Path(file).parent)  # 10 and 14 items
    if rank == 1:
        torch.save(values, file)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path / "values.pt"),), nprocs=2)
    whole, split = _values(slice(None), tmp_path), torch.load(tmp_path / "values.pt", weights_only=True)
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        assert torch.allclose(value.double(), split[name].double(), rtol=1e-9), name
