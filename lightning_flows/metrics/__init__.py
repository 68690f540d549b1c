"""Metrics: distances between real and generated sets, memorisation, likelihoods (``torchmetrics.Metric``)."""

from lightning_flows.metrics.asked_mask import AskedMask
from lightning_flows.metrics.base import FeatureMetric, StoredFeatures
from lightning_flows.metrics.boundary import BoundaryFScore, boundary_scores
from lightning_flows.metrics.classification import Calibration, LabelAccuracy
from lightning_flows.metrics.collect import collect
from lightning_flows.metrics.features import Extractor, Features, Pixels
from lightning_flows.metrics.frechet import Frechet, frechet_distance
from lightning_flows.metrics.inception import Inception
from lightning_flows.metrics.inception_score import InceptionScore
from lightning_flows.metrics.kernel import KernelDistance
from lightning_flows.metrics.likelihood import BitsPerDim, NatsPerDim, nats_per_dim
from lightning_flows.metrics.lpips import LPIPS
from lightning_flows.metrics.memorisation import NearestNeighbour, nearest_distance
from lightning_flows.metrics.prdc import PRDC, neighbour_radius, prdc_scores
from lightning_flows.metrics.reconstruction import LatentMoments, PeakSignalToNoise, StructuralSimilarity
from lightning_flows.metrics.reference import Gaussian, Reference, load_reference, save_references
from lightning_flows.metrics.segmentation import Confusion, MeanIoU, PixelAccuracy, class_iou
from lightning_flows.metrics.sliced_wasserstein import (
    SlicedWasserstein,
    sliced_wasserstein_squared,
    wasserstein_1d,
)
from lightning_flows.metrics.standard import standard
from lightning_flows.metrics.time_bins import LossPerTimeBin
from lightning_flows.metrics.timm_features import Timm

__all__ = [
    "AskedMask",
    "BitsPerDim",
    "BoundaryFScore",
    "Calibration",
    "Confusion",
    "Extractor",
    "FeatureMetric",
    "Features",
    "Frechet",
    "Gaussian",
    "Inception",
    "InceptionScore",
    "KernelDistance",
    "LPIPS",
    "LabelAccuracy",
    "LatentMoments",
    "LossPerTimeBin",
    "MeanIoU",
    "NatsPerDim",
    "NearestNeighbour",
    "PRDC",
    "PeakSignalToNoise",
    "PixelAccuracy",
    "Pixels",
    "Reference",
    "SlicedWasserstein",
    "StoredFeatures",
    "StructuralSimilarity",
    "Timm",
    "boundary_scores",
    "class_iou",
    "collect",
    "frechet_distance",
    "load_reference",
    "nats_per_dim",
    "nearest_distance",
    "neighbour_radius",
    "prdc_scores",
    "save_references",
    "sliced_wasserstein_squared",
    "standard",
    "wasserstein_1d",
]
