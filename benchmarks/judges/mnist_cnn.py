"""The judge of MNIST: a small convolutional network, its own test score beside each verdict.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.judges.mnist_cnn

trains it once, from a fixed seed, on the 60,000 real training digits and nothing else (two minutes of one CPU core),
tests it on the 10,000 test images, and keeps it under ``runs/judges``. It is fixed before any sample is scored, and
refuses to judge below 0.98. Its penultimate features are an extractor for distances between sets.

Digits are moved by up to two pixels in training, never mirrored: a mirrored 2 is no 2.
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
    "as_stored", "digits", "extractor", "features", "judge", "place", "shifted", "train", "trained",
]  # fmt: skip

NAME = "mnist-cnn"
REQUIRED = 0.98
RECIPE = Recipe(epochs=6)
SHIFT = 2  # most pixels


# ------------------------------------------------------------------ real data


def digits(split: str) -> Real:
    """The real digits of ``train`` (60,000) or ``test`` (10,000).

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    pixels, labels = _stored(split)
    return Real(cnn.scaled(pixels), labels)


def _stored(split: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 28, 28) uint8 and labels (N,) int64."""
    return cnn.stored("mnist", split)


# ------------------------------------------------------------------ the judge


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE) -> Network:
    """A judge trained on ``images`` (N, 1, 28, 28) uint8 and ``labels`` (N,); the same numbers at every call."""
    return cnn.train(images, labels, recipe, shifted)


def shifted(x: Tensor) -> Tensor:
    """Every image of ``x`` (B, 1, H, W) in [-1, 1], moved at random by up to two pixels; black where it ends."""
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, [SHIFT] * 4, value=-1.0)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 1, 5, 5, H, W)
    down, right = torch.randint(2 * SHIFT + 1, (2, len(x)))
    return windows[torch.arange(len(x)), :, down, right]  # (B, 1, H, W)


def place(folder: Path = FOLDER, recipe: Recipe = RECIPE) -> Path:
    """File of the judge: its name holds a hash of the recipe and the network."""
    return cnn.place(NAME, folder, recipe)


@cache
def trained(folder: Path = FOLDER) -> Judge:
    """The judge: read from ``folder``, or trained on the real data and kept there.

    Raises:
        RuntimeError: less than 0.98 of the real test images are recognised.
        ValueError: it has to be trained, and ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    file = place(folder, RECIPE)
    return cnn.kept(file, RECIPE, REQUIRED, lambda: train(*_stored("train"), RECIPE), lambda: digits("test"))


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
    """The judge's features as an extractor of `lightning_flows.metrics`, called ``mnist-cnn``."""
    return Features(features, NAME)


if __name__ == "__main__":
    cnn.main(__doc__, trained, place, "real test images")
