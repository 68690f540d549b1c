"""A picture of both directions of a `SymmFlow`: what it reads from images, and what it draws from their semantics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_flows.callbacks.sample_grid import SampleGrid
from lightning_flows.codecs import painted
from lightning_flows.flow import seeds_from

KEYS = ("image", "latent", "mask", "label")  # of the items that are looked at


class SymmetryGrid(SampleGrid):
    """Writes a row for each of a few items, when and where `SampleGrid` writes samples.

    A row shows the image, its mask, the mask that is read from the image, and the image that is drawn from the mask
    (and label). Of a model that knows labels alone, it shows the image and the image that is drawn from its label.

    The items are spread evenly over the validation data (the training data where there is none), since neighbours are
    often alike; of data that cannot be reached by number they are the first. They and their seeds are the same at every
    look, so that pictures compare.

    Args:
        n: number of items.
        seed: of all looks.
        kwargs: ``every_n_steps``, ``every_n_epochs``, ``at_fit_end``, ``filename`` of `SampleGrid`.

    Raises:
        ValueError: see `SampleGrid`; a module that is no `SymmFlow`, or items without images, masks or labels.
    """

    def __init__(self, *, n: int = 8, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(n=n, seed=seed, **kwargs)
        self._items: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Another fit may have other data."""
        if not hasattr(pl_module, "semantic") or not hasattr(pl_module, "read"):
            raise ValueError(f"SymmetryGrid: {type(pl_module).__name__} reads no masks or labels: use SampleGrid.")
        self._items = None
        self.nrow = 4 if "mask" in pl_module.semantic.keys else 2

    def _samples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        if self._items is None:
            self._items = _first(_spread(_loader(trainer), self.n), self.n)
        items = {name: value.to(pl_module.device) for name, value in self._items.items()}
        fields = pl_module.fields_of(items)
        image, seeds = pl_module.data_of(items), seeds_from(self.seed, len(items[next(iter(fields))]))
        drawn = pl_module.sample(pl_module.condition_of(items), seeds=seeds)
        columns = [image, drawn]
        if "mask" in fields:
            read = pl_module.read(image, seeds=seeds, scores=False).decoded["mask"].labels
            colours = pl_module.semantic.colours()
            columns[1:1] = [painted(fields["mask"], colours), painted(read, colours)]
        return _abreast(columns)


def _abreast(columns: list[Tensor]) -> Tensor:
    """Pictures (n, C, H, W) of several columns row by row, all in colour and of the size of the largest."""
    size = tuple(max(column.shape[axis] for column in columns) for axis in (2, 3))
    alike = [F.interpolate(column.float(), size, mode="nearest")[:, :3].expand(-1, 3, -1, -1) for column in columns]
    return torch.stack(alike, dim=1).flatten(0, 1)  # (n columns, 3, H, W)


def _loader(trainer: L.Trainer) -> Any:
    source = trainer.datamodule
    found = trainer.val_dataloaders if source is None else source.val_dataloader()
    if found is not None and found != []:  # a stream has no length, so that its truth cannot be asked for
        return found
    return trainer.train_dataloader if source is None else source.train_dataloader()


def _spread(loader: Any, n: int) -> Any:
    """One batch of n items at even distances; the loader itself where its items have no numbers or no common size."""
    data = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or loader.batch_size is None or isinstance(data, IterableDataset):
        return loader
    count = min(n, len(data))  # type: ignore[arg-type]
    if not count:
        return loader
    return [loader.collate_fn([data[i * len(data) // count] for i in range(count)])]  # type: ignore[index, arg-type]


def _first(loader: Any, n: int) -> dict[str, Tensor]:
    """Fields of the first n items, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for batch in loader:
        if not isinstance(batch, Mapping) or not {"image", "latent"} & batch.keys():
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"SymmetryGrid: the batch must hold 'image', got {got}.")
        for name in KEYS:
            if batch.get(name) is not None:
                found.setdefault(name, []).append(batch[name].cpu())
        if sum(map(len, next(iter(found.values())))) >= n:
            break
    return {name: torch.cat(values)[:n] for name, values in found.items()}
