r"""Frechet distance between the Gaussians fitted to real and generated features.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^{1/2} S2 S1^{1/2})^{1/2}

"GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (Heusel et al., 2017); the
closed form is Dowson and Landau (1982). The matrix in the last term is symmetric and positive semi-definite,
so its root's trace is a sum of roots of eigenvalues from a symmetric solver: it exists for rank-deficient
covariances and cannot be NaN or complex, which matrix square roots and non-symmetric eigenvalues can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_flows.metrics.base import FeatureMetric
from lightning_flows.metrics.features import Extractor
from lightning_flows.metrics.reference import Gaussian, Reference, save_references

_MAX_DIM = 16384  # a covariance of this size takes 2 GiB


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Squared Frechet distance between two Gaussians (the quantity that FID reports), never negative or NaN.

    Args:
        mean1: ``(D,)``.
        covariance1: ``(D, D)``, symmetric and positive semi-definite up to round-off.
        mean2: ``(D,)``.
        covariance2: ``(D, D)``.

    Returns:
        A float64 scalar.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (D, D), S1^{1/2}
    inner = root @ covariance2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return distance.clamp(min=0)  # round-off of equal Gaussians


class Frechet(FeatureMetric):
    """Frechet distance from running sums: no feature is stored, the state is a ``(D, D)`` matrix per set.

    Why not ``torchmetrics.image.FrechetInceptionDistance``: it takes the eigenvalues of the non-symmetric
    product ``S1 S2``, returns float32 for float32 features, needs the feature dimension beforehand and has no
    stored reference statistics. It is the oracle of our tests.

    Args:
        features: the extractor; None means ``Pixels()``. ``Inception()`` makes this ``fid``,
            ``Inception("spatial")`` the ``sfid`` of Nash et al. (2021).
        reference: see `FeatureMetric`.

    Raises:
        ValueError: ``reference`` is missing or belongs to another extractor.
    """

    family = "frechet"
    standard_names = ("fid", "sfid")

    real_sum: Tensor
    real_product: Tensor
    real_count: Tensor
    sample_sum: Tensor
    sample_product: Tensor
    sample_count: Tensor

    def __init__(self, features: Extractor | None = None, reference: str | None = None) -> None:
        super().__init__(features, reference)
        for which in ("real", "sample"):
            # The dimension is known at the first update: a scalar zero broadcasts to it.
            self.add_state(f"{which}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{which}_product", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{which}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, real: bool) -> None:
        """Take in a batch ``x`` ``(B, C, H, W)`` or ``(B, D)`` of real items or of samples.

        Raises:
            ValueError: more feature dimensions than a covariance matrix can be held for.
        """
        features = self.rows(x, real)  # (B, D)
        if features is None:
            return
        if features.shape[1] > _MAX_DIM:
            raise ValueError(
                f"x has {features.shape[1]} features, at most {_MAX_DIM} are allowed: use another extractor"
            )
        which = "real" if real else "sample"
        sums = (features.sum(0), features.T @ features, len(features))
        for state, value in zip(("sum", "product", "count"), sums, strict=True):
            setattr(self, f"{which}_{state}", getattr(self, f"{which}_{state}") + value)

    def statistics(self, *, real: bool) -> Gaussian:
        """The fitted Gaussian of one set.

        Raises:
            ValueError: fewer than two items.
        """
        if real and self.reference is not None:
            return self.reference.gaussian
        which = "real" if real else "sample"
        count = int(getattr(self, f"{which}_count"))
        if count < 2:
            raise ValueError(f"{self.name}: {which} has {count} items, at least 2 are needed")
        mean = getattr(self, f"{which}_sum") / count
        product = getattr(self, f"{which}_product")
        return Gaussian(mean, (product - count * torch.outer(mean, mean)) / (count - 1), count)

    def compute(self) -> Tensor:
        """Squared Frechet distance, a float64 scalar."""
        real, sample = self.statistics(real=True), self.statistics(real=False)
        if real.mean.shape != sample.mean.shape:
            raise ValueError(f"{self.name}: real items have {len(real.mean)} features, samples have {len(sample.mean)}")
        mean, covariance = (x.to(sample.mean.device) for x in (real.mean, real.covariance))
        return frechet_distance(mean, covariance, sample.mean, sample.covariance)

    def caution(self, real: int, samples: int) -> str | None:
        """Warn below ten items per feature; with no more items than features the covariance is singular."""
        real = real if self.reference is None else self.reference.count
        least, dim = min(real, samples), self.sample_sum.numel()
        if least >= 10 * dim:
            return None
        state = "rank deficient" if least <= dim else "estimated from fewer than 10 items per dimension"
        return f"{self.name} from {least} items with {dim} features: the covariance is {state}"

    @property
    def needed(self) -> int:
        """One item more than features: below, the covariance cannot have full rank."""
        return self.sample_sum.numel() + 1

    def settings(self) -> dict[str, Any]:
        """See `FeatureMetric.settings`."""
        return {"dims": self.sample_sum.numel(), **super().settings()}

    def known(self) -> Reference:
        """What the real items seen give as a reference."""
        return Reference(self.statistics(real=True), shape=self.shape)

    def save_reference(self, file: str | Path, **about: str) -> None:
        """Write the real items' statistics as safetensors, whole or not at all."""
        save_references(file, [(self.features, self.known())], **about)
