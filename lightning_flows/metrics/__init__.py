"""Metrics: distances between real and generated sets, memorisation, likelihoods (``torchmetrics.Metric``)."""

from lightning_flows.metrics.base import FeatureMetric, StoredFeatures
from lightning_flows.metrics.features import Extractor, Features, Inception, Pixels
from lightning_flows.metrics.frechet import Frechet, Gaussian, frechet_distance, load_reference
from lightning_flows.metrics.inception_score import InceptionScore
from lightning_flows.metrics.kernel import KernelDistance
from lightning_flows.metrics.likelihood import BitsPerDim, NatsPerDim, nats_per_dim
from lightning_flows.metrics.memorisation import NearestNeighbour, nearest_distance
from lightning_flows.metrics.prdc import PRDC, neighbour_radius, prdc_scores
from lightning_flows.metrics.sliced_wasserstein import (
    SlicedWasserstein,
    sliced_wasserstein_squared,
    wasserstein_1d,
)
from lightning_flows.metrics.time_bins import LossPerTimeBin

__all__ = [
    "BitsPerDim",
    "Extractor",
    "FeatureMetric",
    "Features",
    "Frechet",
    "Gaussian",
    "Inception",
    "InceptionScore",
    "KernelDistance",
    "LossPerTimeBin",
    "NatsPerDim",
    "NearestNeighbour",
    "PRDC",
    "Pixels",
    "SlicedWasserstein",
    "StoredFeatures",
    "frechet_distance",
    "load_reference",
    "nats_per_dim",
    "nearest_distance",
    "neighbour_radius",
    "prdc_scores",
    "sliced_wasserstein_squared",
    "wasserstein_1d",
]
