"""What ``test`` measures where the recipe does not say it: distances in one extractor, likelihood and speed."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torchmetrics import Metric

from lightning_flows.callbacks import Evaluation, SamplingSpeed
from lightning_flows.codecs import Identity, SemanticCodec
from lightning_flows.metrics import (
    BitsPerDim,
    Calibration,
    Extractor,
    LabelAccuracy,
    MeanIoU,
    NatsPerDim,
    PixelAccuracy,
    Pixels,
    standard,
)
from lightning_flows.metrics.reconstruction import LatentMoments, PeakSignalToNoise, StructuralSimilarity

MOST_PIXELS = 4096  # values of an image that are compared as they are; larger images are averaged down
SMALL = 32
OPTIONS = ("extractor", "reference", "samples", "per_item")


def add_options(parser: LightningArgumentParser) -> None:
    """The options of ``test`` beside those of the run."""
    add = parser.add_argument
    add(
        "--extractor",
        type=Extractor | None,
        default=None,
        help="test: features in which distances are measured: Inception, Timm (--extractor.model NAME), Pixels, ...",
    )
    add(
        "--reference",
        type=str | None,
        default=None,
        help="test: file of `lightning-flows statistics` that stands for the real images.",
    )
    add(
        "--samples",
        type=int | None,
        default=None,
        help="test: number of samples; one for each item of the split by default.",
    )
    add(
        "--per_item",
        type=int | None,
        default=None,
        help="test: number of samples for each item, in place of --samples: distances from the first and from all.",
    )


def usual_callbacks(options: Namespace, model: Any, data: Any, given: list[L.Callback]) -> list[L.Callback]:
    """Callbacks of a test.

    Args:
        options: of the command line, the extractor as an object.
        model: that is tested.
        data: the data module, or None.
        given: callbacks of the recipe; where an `Evaluation` of the test is among them it says what is measured.

    Raises:
        ValueError: an option beside such an `Evaluation`.
    """
    speed = [SamplingSpeed()] if hasattr(model, "generate") else []
    if any(isinstance(each, Evaluation) and each.on == "test" for each in given):
        said = [f"--{name}" for name in OPTIONS if options.get(name) is not None]
        if said:
            raise ValueError(f"{', '.join(said)}: the recipe has an Evaluation of the test that says what is measured")
        return list(speed)
    metrics = usual_metrics(model, data, options.get("extractor"), options.get("reference"))
    counts = {"samples": options.get("samples"), "per_item": options.get("per_item")}
    return [Evaluation(metrics=metrics, **counts), *speed]


def usual_metrics(
    model: Any, data: Any, extractor: Extractor | None = None, reference: str | None = None
) -> list[Metric]:
    """The standard distances, and the likelihood in the unit that the model's space allows, or scores of what it reads.

    What reads masks and labels from images (`SymmFlow`) has no likelihood of an image.
    """
    metrics: list[Metric] = [*standard(extractor or usual_extractor(data), reference=reference)]
    if not hasattr(model, "log_prob"):  # an autoencoder: its samples are reconstructions
        return [PeakSignalToNoise(), StructuralSimilarity(), LatentMoments(), *metrics]
    if isinstance(semantic := getattr(model, "semantic", None), SemanticCodec):
        return [*metrics, *semantic_metrics(semantic)]
    if not isinstance(getattr(model, "codec", None), Identity):
        return [*metrics, NatsPerDim()]
    levels = getattr(data, "levels", None)
    return [*metrics, BitsPerDim(levels)] if levels else metrics


def semantic_metrics(semantic: SemanticCodec) -> list[Metric]:
    """Scores of the masks and labels that a model reads, those that its semantic codec has.

    The calibration is that of labels: of masks it would need the scores of every class at every pixel twice.
    """
    metrics: list[Metric] = []
    if count := semantic.num_classes.get("mask"):
        metrics += [MeanIoU(count), PixelAccuracy(count)]
    if count := semantic.num_classes.get("label"):
        metrics += [LabelAccuracy(count), Calibration()]
    return metrics


def usual_extractor(data: Any) -> Extractor:
    """Pixels as they are where images are small, else averaged down to 32 x 32: nothing has to be downloaded."""
    try:
        shape = getattr(data, "shape", None)
    except (ValueError, OSError):  # it may have to read a first image; the test itself says better what is missing
        shape = None
    return Pixels() if shape is not None and math.prod(shape) <= MOST_PIXELS else Pixels(size=SMALL)
