"""The whole set of distances that papers report, in the features of one extractor."""

from __future__ import annotations

from lightning_flows.metrics.base import FeatureMetric
from lightning_flows.metrics.features import Extractor, Pixels
from lightning_flows.metrics.frechet import Frechet
from lightning_flows.metrics.inception_score import InceptionScore
from lightning_flows.metrics.kernel import KernelDistance
from lightning_flows.metrics.prdc import PRDC
from lightning_flows.metrics.reference import load_reference
from lightning_flows.metrics.sliced_wasserstein import SlicedWasserstein


def standard(
    extractor: Extractor | None = None, *, reference: str | None = None, nearest: int = 5
) -> list[FeatureMetric]:
    """Frechet and kernel distance, precision, recall, density, coverage, and what else the extractor allows.

    A network with feature maps adds the spatial Frechet distance (with ``Inception()``: ``fid``, ``sfid``, ``kid``,
    ``is``), a classifier the Inception score; in pixels the sliced Wasserstein distance stands beside them. The
    network runs once for all of them.

    Args:
        extractor: None means ``Pixels()``.
        reference: file of ``lightning-flows statistics`` instead of real items. What the file lacks is left out: the
            features that all but the Frechet distances need, or the spatial statistics.
        nearest: of precision, recall, density and coverage.

    Raises:
        ValueError: ``reference`` is missing or belongs to another extractor.
    """
    extractor = extractor if extractor is not None else Pixels()
    metrics: list[FeatureMetric] = [Frechet(extractor, reference)]
    spatial, logits = extractor.companion("spatial"), extractor.companion("logits")
    if spatial is not None and (reference is None or _holds(reference, spatial)):
        metrics.append(Frechet(spatial, reference))
    if reference is None or load_reference(reference, extractor).features is not None:
        metrics.append(KernelDistance(extractor, reference=reference))
        metrics.append(PRDC(extractor, nearest=nearest, reference=reference))
        if isinstance(extractor, Pixels):
            metrics.append(SlicedWasserstein(extractor, reference=reference))
    return [*metrics, InceptionScore(logits)] if logits is not None else metrics


def _holds(reference: str, extractor: Extractor) -> bool:
    try:
        return load_reference(reference, extractor, features=False).count > 0
    except ValueError:
        return False
