"""Common ground of the distances between two sets: real items and samples, seen through one extractor.

Every such metric has ``update(x, real=bool)``, a ``name`` that carries its extractor, and ``caution``, which
says in words when the number of items is too small for the value to be trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_flows.metrics.features import Extractor, Pixels


class FeatureMetric(Metric):
    """A metric over features of real items and samples.

    Args:
        features: the extractor; None means ``Pixels()``.

    Attributes:
        family: the name without its extractor, e.g. ``"frechet"``.
        standard_name: the name with the standard Inception extractor, e.g. ``"fid"``; None: there is none.
    """

    family: str = "distance"
    standard_name: str | None = None
    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = False

    def __init__(self, features: Extractor | None = None) -> None:
        super().__init__()
        self.features = features if features is not None else Pixels()
        if not isinstance(self.features, Extractor):
            raise ValueError(
                "features must be an Extractor (Pixels(), Inception(), Features(module, name)), "
                f"got {type(self.features).__name__}"
            )

    @property
    def extractor(self) -> str:
        """Name of the extractor."""
        return self.features.name

    @property
    def name(self) -> str:
        """``fid`` and the like for the standard extractor, ``<family>[<extractor>]`` otherwise."""
        if self.standard_name in self.features.standard_for:
            return str(self.standard_name)
        return f"{self.family}[{self.extractor}]"

    def caution(self, real: int, samples: int) -> str | None:
        """Why a value from so many items should not be trusted, in one sentence; None: nothing is wrong."""
        return None


class StoredFeatures(FeatureMetric):
    """A metric that needs all features at once; they are kept in float64 and gathered over the processes."""

    real_features: list[Tensor]
    sample_features: list[Tensor]

    def __init__(self, features: Extractor | None = None) -> None:
        super().__init__(features)
        self.add_state("real_features", default=[], dist_reduce_fx="cat")
        self.add_state("sample_features", default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor, real: bool) -> None:
        """Take in a batch ``x`` ``(B, C, H, W)`` or ``(B, D)`` of real items or of samples."""
        features = self.features(x).to(self.device)  # (B, D)
        (self.real_features if real else self.sample_features).append(features)

    def sets(self, least: int = 1) -> tuple[Tensor, Tensor]:
        """Features ``(N, D)`` of the real items and ``(M, D)`` of the samples.

        Raises:
            ValueError: either set has fewer than ``least`` items.
        """
        real, samples = _cat(self.real_features), _cat(self.sample_features)
        for which, rows in (("real", real), ("samples", samples)):
            if len(rows) < least:
                raise ValueError(f"{self.name}: {which} has {len(rows)} items, at least {least} are needed")
        return real, samples


def _cat(rows: list[Tensor] | Tensor) -> Tensor:
    """All rows as one tensor; none is an empty one (torchmetrics alone would raise without a name)."""
    return dim_zero_cat(rows) if len(rows) else torch.zeros(0, 0, dtype=torch.float64)
