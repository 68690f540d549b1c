"""Data modules: batches are dictionaries, randomness is keyed by (seed, epoch, index)."""

from lightning_flows.data.arrays import Arrays
from lightning_flows.data.base import Batch, FlowDataModule
from lightning_flows.data.bucketed import BucketEvaluationSampler, BucketSampler
from lightning_flows.data.buckets import AspectBuckets
from lightning_flows.data.digits import Digits
from lightning_flows.data.folders import CaptionFolder, ImageFolder
from lightning_flows.data.keyed import EvaluationSampler, KeyedItems, KeyedLoader, KeyedSampler
from lightning_flows.data.latent_writer import LatentFormat, LatentWriter
from lightning_flows.data.latents import CachedLatents
from lightning_flows.data.lmdb import ImageLMDB
from lightning_flows.data.mask_layouts import ADE20K, CelebAMaskHQ, Cityscapes, COCOStuff
from lightning_flows.data.masks import MaskFolder
from lightning_flows.data.requests import Requests
from lightning_flows.data.shape_rule import shape_label, shape_mask
from lightning_flows.data.shapes import Shapes
from lightning_flows.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST
from lightning_flows.data.transforms import ImageTransform
from lightning_flows.data.webdataset import WebDataset

__all__ = [
    "ADE20K",
    "CIFAR10",
    "MNIST",
    "Arrays",
    "AspectBuckets",
    "Batch",
    "BucketEvaluationSampler",
    "BucketSampler",
    "COCOStuff",
    "CachedLatents",
    "CaptionFolder",
    "CelebAMaskHQ",
    "Cityscapes",
    "Digits",
    "EvaluationSampler",
    "FashionMNIST",
    "FlowDataModule",
    "ImageFolder",
    "ImageLMDB",
    "ImageTransform",
    "KeyedItems",
    "KeyedLoader",
    "KeyedSampler",
    "LatentFormat",
    "LatentWriter",
    "MaskFolder",
    "Requests",
    "Shapes",
    "WebDataset",
    "shape_label",
    "shape_mask",
]
