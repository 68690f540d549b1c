"""Data modules: batches are dictionaries, randomness is keyed by (seed, epoch, index)."""

from lightning_flows.data.arrays import Arrays
from lightning_flows.data.base import Batch, FlowDataModule
from lightning_flows.data.digits import Digits
from lightning_flows.data.folders import CaptionFolder, ImageFolder
from lightning_flows.data.keyed import EvaluationSampler, KeyedItems, KeyedLoader, KeyedSampler
from lightning_flows.data.masks import MaskFolder
from lightning_flows.data.requests import Requests
from lightning_flows.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST
from lightning_flows.data.transforms import ImageTransform

__all__ = [
    "CIFAR10",
    "MNIST",
    "Arrays",
    "Batch",
    "CaptionFolder",
    "Digits",
    "EvaluationSampler",
    "FashionMNIST",
    "FlowDataModule",
    "ImageFolder",
    "ImageTransform",
    "KeyedItems",
    "KeyedLoader",
    "KeyedSampler",
    "MaskFolder",
    "Requests",
]
