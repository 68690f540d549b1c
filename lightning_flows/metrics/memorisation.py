"""Nearest neighbours in the training set: does the model copy?

The distance of a sample to its nearest training item says nothing alone. Beside it stands the same distance
of held-out real items: samples that lie much nearer to the training set than fresh real items do are copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flows.metrics.base import StoredFeatures
from lightning_flows.metrics.features import Extractor

_ROWS = 1024


class NearestNeighbour(StoredFeatures):
    """Distances to the nearest training item: of samples, and of held-out real items.

    ``update(x, real=True)`` takes held-out items, ``update(x, real=False)`` samples; the training items are
    given once, by ``train`` or ``remember``, and survive ``reset``.

    Args:
        train: training items ``(N, C, H, W)`` or ``(N, D)``; more may follow with ``remember``.
        features: the extractor; None means ``Pixels()``.
    """

    family = "nearest_training"
    higher_is_better = None

    def __init__(self, train: Tensor | None = None, *, features: Extractor | None = None) -> None:
        super().__init__(features)
        self.register_buffer("known", torch.zeros(0, 0, dtype=torch.float64), persistent=False)
        if train is not None:
            self.remember(train)

    def remember(self, x: Tensor) -> None:
        """Add training items ``(B, C, H, W)`` or ``(B, D)``."""
        rows = self.features(x).to(self.device)
        self.known = torch.cat([self.known, rows]) if len(self.known) else rows

    def update(self, x: Tensor, real: bool) -> None:
        """Take in held-out real items or samples; only their distances ``(B, 1)`` are kept.

        Raises:
            ValueError: no training items are known.
        """
        if not len(self.known):
            raise ValueError(f"{self.name}: train is empty, give training items with remember(x) first")
        distance = nearest_distance(self.features(x).to(self.device), self.known)[:, None]
        (self.real_features if real else self.sample_features).append(distance)

    def compute(self) -> dict[str, Tensor]:
        """Mean and 1 % quantile of both distances, and the ratio of means (about 1: nothing is copied)."""
        held_out, samples = self.sets()
        return {
            "samples": samples.mean(),
            "samples_q01": samples.quantile(0.01),
            "held_out": held_out.mean(),
            "held_out_q01": held_out.quantile(0.01),
            "ratio": samples.mean() / held_out.mean(),
        }


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Distance ``(B,)`` of each row of ``x`` ``(B, D)`` to the nearest row of ``reference`` ``(N, D)``."""
    return torch.cat([torch.cdist(rows, reference).min(1).values for rows in x.split(_ROWS)])
