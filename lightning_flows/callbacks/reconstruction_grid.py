"""A picture of what an autoencoder keeps: images above what comes back of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_flows.callbacks.sample_grid import SampleGrid


class ReconstructionGrid(SampleGrid):
    """Writes pairs of rows, images above their reconstructions, when and where `SampleGrid` writes samples.

    The images are the first of the validation data (of the training data where there is none), so that pictures
    compare. The module has ``reconstruct(x) -> (B, C, H, W)``.

    Args:
        n: number of images.
        nrow: images in a row.
        kwargs: ``every_n_steps``, ``every_n_epochs``, ``at_fit_end``, ``filename`` of `SampleGrid`.

    Raises:
        ValueError: see `SampleGrid`, or a batch without images.
    """

    def __init__(self, *, n: int = 24, nrow: int = 12, **kwargs: Any) -> None:
        super().__init__(n=n, nrow=nrow, **kwargs)
        self._images: Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Another fit may have other data."""
        self._images = None

    def _samples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        images = self._first(trainer).to(pl_module.device)
        pairs = zip(images.split(self.nrow), pl_module.reconstruct(images).split(self.nrow), strict=True)
        return torch.cat([row for pair in pairs for row in _filled(pair, self.nrow)])

    def _first(self, trainer: L.Trainer) -> Tensor:
        if self._images is None:
            self._images = _images(_loader(trainer), self.n)
        return self._images


def _loader(trainer: L.Trainer) -> Any:
    source = trainer.datamodule
    if source is None:
        return trainer.val_dataloaders or trainer.train_dataloader
    return source.val_dataloader() or source.train_dataloader()


def _images(loader: Any, n: int) -> Tensor:
    found: list[Tensor] = []
    for batch in loader:
        if "image" not in batch:
            raise ValueError(f"ReconstructionGrid: the batch has no 'image', only {sorted(batch)}.")
        found.append(batch["image"])
        if sum(map(len, found)) >= n:
            break
    return torch.cat(found)[:n].float().cpu()


def _filled(rows: tuple[Tensor, Tensor], nrow: int) -> tuple[Tensor, ...]:
    """Both rows with black images at the end, so that a short last row stays a row."""
    missing = nrow - len(rows[0])
    return tuple(torch.cat([row, row.new_full((missing, *row.shape[1:]), -1.0)]) for row in rows)
