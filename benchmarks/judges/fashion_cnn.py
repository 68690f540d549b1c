"""The judge of Fashion-MNIST: a small convolutional network, its own test score beside each verdict.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.judges.fashion_cnn

trains it once, from a fixed seed, on the 60,000 real training images and nothing else (ten minutes of one CPU
core), tests it on the 10,000 test images, and keeps it under ``runs/judges``. It is fixed before any sample is
scored, and refuses to judge below 0.92. Its penultimate features are an extractor for distances between sets.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.judges import cnn
from benchmarks.judges.cnn import CLASSES, DATA, FOLDER, Judge, Network, Real, Recipe, Verdict, as_stored
from lightning_flows.metrics import Features

__all__ = [
    "CLASSES", "DATA", "FOLDER", "NAME", "RECIPE", "REQUIRED", "Judge", "Network", "Real", "Recipe", "Verdict",
    "as_stored", "extractor", "features", "garments", "judge", "place", "train", "trained",
]  # fmt: skip

NAME = "fashion-cnn"
REQUIRED = 0.92
RECIPE = Recipe()


# ------------------------------------------------------------------ real data


def garments(split: str) -> Real:
    """The real garments of ``train`` (60,000) or ``test`` (10,000).

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    pixels, labels = _stored(split)
    return Real(cnn.scaled(pixels), labels)


def _stored(split: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 28, 28) uint8 and labels (N,) int64."""
    return cnn.stored("fashion_mnist", split)


# ------------------------------------------------------------------ the judge


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE) -> Network:
    """A judge trained on ``images`` (N, 1, 28, 28) uint8 and ``labels`` (N,); the same numbers at every call."""
    return cnn.train(images, labels, recipe, mirrored)


def mirrored(x: Tensor) -> Tensor:
    """Every image of ``x`` (B, 1, H, W), or its mirror image: a garment has no handedness."""
    flipped = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(flipped, x.flip(-1), x)


def place(folder: Path = FOLDER, recipe: Recipe = RECIPE) -> Path:
    """File of the judge: its name holds a hash of the recipe and the network."""
    return cnn.place(NAME, folder, recipe)


@cache
def trained(folder: Path = FOLDER) -> Judge:
    """The judge: read from ``folder``, or trained on the real data and kept there.

    Raises:
        RuntimeError: less than 0.92 of the real test images are recognised.
        ValueError: it has to be trained, and ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    file = place(folder, RECIPE)
    return cnn.kept(file, RECIPE, REQUIRED, lambda: train(*_stored("train"), RECIPE), lambda: garments("test"))


def judge(images: Tensor, labels: Tensor) -> Verdict:
    """Share of ``images`` (N, 1, 28, 28) in [-1, 1] that the judge takes for their ``labels`` (N,).

    Raises:
        ValueError: shapes do not fit, no image, or values that are not finite.
    """
    return cnn.verdict(trained(), images, labels)


def features(images: Tensor) -> Tensor:
    """Penultimate features (N, 128) of ``images`` (N, 1, 28, 28) in [-1, 1].

    Raises:
        ValueError: ``images`` of another shape.
    """
    return cnn.features(trained(), images)


def extractor() -> Features:
    """The judge's features as an extractor of `lightning_flows.metrics`, called ``fashion-cnn``."""
    return Features(features, NAME)


if __name__ == "__main__":
    cnn.main(__doc__, trained, place, "real test images")
