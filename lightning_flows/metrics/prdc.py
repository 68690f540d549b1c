r"""Precision, recall, density and coverage: is each sample plausible, is each real item reachable?

With ``B(x_i)`` the closed ball around ``x_i`` that reaches its k-th nearest neighbour within its own set,

    precision = share of samples inside some B(real)
    recall    = share of real items inside some B(sample)
    density   = mean over samples of #{B(real) it lies in} / k
    coverage  = share of B(real) that hold a sample

"Improved Precision and Recall Metric for Assessing Generative Models" (Kynkaanniemi et al., 2019) and
"Reliable Fidelity and Diversity Metrics for Generative Models" (Naeem et al., 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.metrics.base import StoredFeatures
from lightning_flows.metrics.features import Extractor

_PER_NEIGHBOUR = 20  # items for each neighbour asked for: with fewer, a ball covers much of the set
_ROWS = 1024  # rows of a distance matrix held at once


class PRDC(StoredFeatures):
    """The four shares as ``{"precision", "recall", "density", "coverage"}``.

    Args:
        features: the extractor; None means ``Pixels()``.
        nearest: the k of the k-th nearest neighbour (3 in Kynkaanniemi et al. and in the evaluation suite of ADM,
            5 in Naeem et al.).
        reference: see `FeatureMetric`; it must hold the features.

    Raises:
        ValueError: ``nearest`` below 1.
    """

    family = "prdc"
    higher_is_better = True

    def __init__(self, features: Extractor | None = None, *, nearest: int = 5, reference: str | None = None) -> None:
        super().__init__(features, reference)
        if nearest < 1:
            raise ValueError(f"nearest must be at least 1, got {nearest}")
        self.nearest = nearest

    def compute(self) -> dict[str, Tensor]:
        """The four values, float64 scalars; density may exceed 1."""
        real, samples = self.sets(least=self.nearest + 1)
        return prdc_scores(real, samples, self.nearest)

    @property
    def needed(self) -> int:
        """Items of each set for balls that are small against it."""
        return _PER_NEIGHBOUR * self.nearest

    def settings(self) -> dict[str, Any]:
        """See `FeatureMetric.settings`."""
        return {"nearest": self.nearest, **super().settings()}

    def caution(self, real: int, samples: int) -> str | None:
        """Warn when a set is small or the two differ much in size: all four depend on both sizes."""
        if min(real, samples) < self.needed:
            return f"{self.name} from {real} real items and {samples} samples: {self.needed} of each are needed"
        if max(real, samples) <= 2 * min(real, samples):
            return None
        return f"{self.name} from {real} real items and {samples} samples: comparable only at equal sizes"


def prdc_scores(real: Tensor, samples: Tensor, nearest: int) -> dict[str, Tensor]:
    """Precision, recall, density and coverage of ``samples`` ``(M, D)`` against ``real`` ``(N, D)``."""
    real_radius, sample_radius = neighbour_radius(real, nearest), neighbour_radius(samples, nearest)
    inside, hit, recalled = samples.new_zeros(len(samples)), [], []
    for rows, radius in zip(real.split(_ROWS), real_radius.split(_ROWS), strict=True):
        distance = torch.cdist(rows, samples)  # (rows, M)
        in_ball = distance <= radius[:, None]
        inside += in_ball.sum(0)
        hit.append(in_ball.any(1))
        recalled.append((distance <= sample_radius).any(1))
    return {
        "precision": (inside > 0).double().mean(),
        "recall": torch.cat(recalled).double().mean(),
        "density": inside.mean() / nearest,
        "coverage": torch.cat(hit).double().mean(),
    }


def neighbour_radius(x: Tensor, nearest: int) -> Tensor:
    """Distance ``(N,)`` of each row of ``x`` ``(N, D)`` to its ``nearest``-th nearest other row."""
    radii = []
    for start in range(0, len(x), _ROWS):
        distance = torch.cdist(x[start : start + _ROWS], x)  # (rows, N)
        own = torch.arange(len(distance), device=x.device)
        distance[own, start + own] = torch.inf  # an item is not its own neighbour
        radii.append(distance.kthvalue(nearest, dim=1).values)
    return torch.cat(radii)
