"""Common ground of the distances between two sets: real items and samples, seen through one extractor.

Every such metric has ``update(x, real=bool)``, a ``name`` that carries its extractor, and ``caution``, which
says in words when the number of items is too small for the value to be trusted. The real items may come from a file
of statistics instead (``reference``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_flows.metrics.features import Extractor, Pixels
from lightning_flows.metrics.reference import Reference, load_reference


class FeatureMetric(Metric):
    """A metric over features of real items and samples.

    Args:
        features: the extractor; None means ``Pixels()``.
        reference: file of ``lightning-flows statistics``: the real items, which then need not be shown
            (``update(x, real=True)`` is ignored).

    Attributes:
        family: the name without its extractor, e.g. ``"frechet"``.
        standard_names: the names that the standard Inception extractors give, e.g. ``("fid", "sfid")``.
        stores_features: all features are needed at once, also those of a reference.

    Raises:
        ValueError: ``features`` is no extractor, ``reference`` is missing or belongs to another one.
    """

    family: str = "distance"
    standard_names: tuple[str, ...] = ()
    stores_features = False
    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = False

    def __init__(self, features: Extractor | None = None, reference: str | None = None) -> None:
        super().__init__()
        self.features = features if features is not None else Pixels()
        if not isinstance(self.features, Extractor):
            raise ValueError(
                "features must be an Extractor (Pixels(), Inception(), Features(module, name)), "
                f"got {type(self.features).__name__}"
            )
        self.reference: Reference | None = None
        if reference is not None:
            self.reference = load_reference(reference, self.features, features=self.stores_features)
        self.shape: tuple[int, ...] = ()  # of a real item

    @property
    def extractor(self) -> str:
        """Name of the extractor."""
        return self.features.name

    @property
    def name(self) -> str:
        """``fid`` and the like for the standard extractor, ``<family>[<extractor>]`` otherwise."""
        standard = [name for name in self.standard_names if name in self.features.standard_for]
        if standard:
            return standard[0]
        return f"{'spatial_' if self.features.spatial else ''}{self.family}[{self.extractor}]"

    @property
    def needs_real(self) -> bool:
        """Whether real items have to be shown."""
        return self.reference is None

    @property
    def needed(self) -> int:
        """Items of each set below which a value is no measurement (`Evaluation(minimum="needed")`)."""
        return 2

    def settings(self) -> dict[str, Any]:
        """What a value depends on besides the items, for the result: JSON values."""
        return {} if self.reference is None else {"reference": self.reference.description()}

    def prepare(self) -> None:
        """Load the extractor, so that what is missing is known before anything is sampled."""
        self.features.prepare()

    def caution(self, real: int, samples: int) -> str | None:
        """Why a value from so many items should not be trusted, in one sentence; None: nothing is wrong."""
        return None

    def rows(self, x: Tensor, real: bool) -> Tensor | None:
        """Features ``(B, D)`` of a batch, on the metric's device; None for real items that come from the reference.

        Raises:
            ValueError: samples of another shape than the items of the reference.
        """
        if real and self.reference is not None:
            return None
        if self.reference is not None:
            self.reference.admit(x.shape[1:])
        if real:
            self.shape = tuple(x.shape[1:])
        return self.features(x).to(self.device)


class StoredFeatures(FeatureMetric):
    """A metric that needs all features at once; they are kept in float64 and gathered over the processes.

    Raises:
        ValueError: see `FeatureMetric`; or the reference holds no features.
    """

    stores_features = True

    real_features: list[Tensor]
    sample_features: list[Tensor]

    def __init__(self, features: Extractor | None = None, reference: str | None = None) -> None:
        super().__init__(features, reference)
        if self.reference is not None and self.reference.features is None:
            raise ValueError(
                f"reference {reference} holds no features, which {self.family} needs: write it with --features"
            )
        self.add_state("real_features", default=[], dist_reduce_fx="cat")
        self.add_state("sample_features", default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor, real: bool) -> None:
        """Take in a batch ``x`` ``(B, C, H, W)`` or ``(B, D)`` of real items or of samples."""
        features = self.rows(x, real)  # (B, D)
        if features is not None:
            (self.real_features if real else self.sample_features).append(features)

    def sets(self, least: int = 1) -> tuple[Tensor, Tensor]:
        """Features ``(N, D)`` of the real items and ``(M, D)`` of the samples.

        Raises:
            ValueError: either set has fewer than ``least`` items.
        """
        real, samples = _cat(self.real_features), _cat(self.sample_features)
        if self.reference is not None and self.reference.features is not None:
            real = self.reference.features.to(samples)
        for which, rows in (("real", real), ("samples", samples)):
            if len(rows) < least:
                raise ValueError(f"{self.name}: {which} has {len(rows)} items, at least {least} are needed")
        return real, samples


def _cat(rows: list[Tensor] | Tensor) -> Tensor:
    """All rows as one tensor; none is an empty one (torchmetrics alone would raise without a name)."""
    return dim_zero_cat(rows) if len(rows) else torch.zeros(0, 0, dtype=torch.float64)


def in_order(rows: Tensor) -> Tensor:
    """Rows ``(N, D)`` sorted by their sum: what is then drawn from them does not depend on who saw which first."""
    return rows[rows.sum(1).argsort(stable=True)]
