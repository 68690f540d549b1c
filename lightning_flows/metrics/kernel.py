r"""Kernel distance: squared maximum mean discrepancy under a polynomial kernel, unbiased.

    k(a, b) = (a.b / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

"Demystifying MMD GANs" (Binkowski et al., 2018). Unlike the Frechet distance it has no bias at small sample
counts, and its spread over random subsets is an error bar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from lightning_flows.metrics.base import StoredFeatures, in_order
from lightning_flows.metrics.features import Extractor


class KernelDistance(StoredFeatures):
    """Mean and standard deviation of the kernel distance over random subsets.

    The estimator itself is torchmetrics' ``poly_mmd``. ``torchmetrics.image.KernelInceptionDistance`` as a
    whole is not used: it draws its subsets from the global random state, so a value could not be repeated.

    Args:
        features: the extractor; None means ``Pixels()``. ``Inception()`` makes this ``kid``.
        subsets: how many subsets.
        subset_size: items of each set in a subset; reduced to the smaller set where that has fewer.
        degree: degree of the polynomial.
        seed: seed of the subsets.
        reference: see `FeatureMetric`; it must hold the features.

    Raises:
        ValueError: ``subsets``, ``subset_size`` or ``degree`` is too small.
    """

    family = "kernel"
    standard_names = ("kid",)

    def __init__(
        self,
        features: Extractor | None = None,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        seed: int = 0,
        reference: str | None = None,
    ) -> None:
        super().__init__(features, reference)
        given = (("subsets", subsets, 1), ("subset_size", subset_size, 2), ("degree", degree, 1))
        for name, value, least in given:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.subsets, self.subset_size, self.degree, self.seed = subsets, subset_size, degree, seed

    def compute(self) -> dict[str, Tensor]:
        """``{"mean", "std"}`` of the squared discrepancy over subsets; unbiased, so it can be negative."""
        real, samples = (in_order(rows) for rows in self.sets(least=2))
        size = min(self.subset_size, len(real), len(samples))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(rows: Tensor) -> Tensor:
            return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]

        values = torch.stack([poly_mmd(draw(real), draw(samples), self.degree) for _ in range(self.subsets)])
        return {"mean": values.mean(), "std": values.std(unbiased=False)}

    def caution(self, real: int, samples: int) -> str | None:
        """Warn when a set is smaller than a subset: the subsets are then no independent draws."""
        least = min(real, samples)
        if least >= self.subset_size:
            return None
        return f"{self.name} from {least} items: subsets of {self.subset_size} are reduced to {least}"

    @property
    def needed(self) -> int:
        """A whole subset."""
        return self.subset_size

    def settings(self) -> dict[str, Any]:
        """See `FeatureMetric.settings`."""
        return {"subsets": self.subsets, "subset_size": self.subset_size, **super().settings()}
