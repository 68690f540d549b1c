"""Statistics of a stream of real items, to be saved and compared with later."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_flows.metrics.features import Extractor
from lightning_flows.metrics.frechet import Frechet
from lightning_flows.metrics.kernel import KernelDistance
from lightning_flows.metrics.reference import Reference


def collect(
    batches: Iterable[Tensor],
    extractor: Extractor,
    *,
    features: bool = False,
    device: torch.device | str = "cpu",
) -> list[tuple[Extractor, Reference]]:
    """Means and covariances of the items' features, for `save_references`.

    Args:
        batches: of real items, each (B, C, H, W) in [-1, 1] or (B, D).
        extractor: its spatial companion, where it has one, is collected beside it.
        features: keep all rows too, for the kernel distance and precision, recall, density and coverage.
        device: where the extractor runs.

    Returns:
        Each extractor with what is known of the items in its features.

    Raises:
        ValueError: fewer than two items.
    """
    spatial = extractor.companion("spatial")
    distances = [Frechet(each).to(device) for each in (extractor, spatial) if each is not None]
    rows = KernelDistance(extractor).to(device) if features else None  # for its store of features
    metrics = [*distances, *([] if rows is None else [rows])]
    for metric in metrics:
        metric.prepare()
    for x in batches:
        x = x.to(device)
        for metric in metrics:
            metric.update(x, real=True)
    known = [distance.known() for distance in distances]
    if rows is not None:
        known[0] = Reference(known[0].gaussian, torch.cat(rows.real_features), known[0].shape)
    return [(distance.features, each) for distance, each in zip(distances, known, strict=True)]
