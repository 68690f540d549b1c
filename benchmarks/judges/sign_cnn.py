"""The judge of hand signs: a small convolutional network, its own score on held-out photos beside each verdict.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.judges.sign_cnn

trains it once, from a fixed seed, on the 1,862 real training images (`benchmarks.small_sets`) and nothing else (a
minute and a half of one CPU core), tests it on the 200 others, and keeps it under ``runs/judges``. It is fixed before
any sample is scored, and refuses to judge below 0.95. Its penultimate features are an extractor for distances.

Hands are turned, scaled and moved in training, never mirrored: 6 (the little finger meets the thumb) and 9 (the
forefinger does), 7 and 8 are told apart by the side on which a finger is bent. The same student can be among the
training and the test images.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import small_sets
from benchmarks.judges import cnn
from benchmarks.judges.cnn import CLASSES, FOLDER, Judge, Network, Real, Recipe, Verdict, as_stored
from lightning_flows.metrics import Features

__all__ = [
    "CLASSES", "NAME", "RECIPE", "REQUIRED", "as_stored", "extractor", "features", "judge", "moved", "place", "signs",
    "train", "trained",
]  # fmt: skip

NAME = "sign-cnn"
REQUIRED = 0.95
RECIPE = Recipe(epochs=60, batch_size=64, lr=0.05)
TURN, SCALE, SHIFT = 0.3, 0.15, 0.1  # most radians, share of the size, share of the side


def signs(split: str) -> Real:
    """The real signs of ``train`` (1,862) or ``val`` (200).

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    pixels, labels = small_sets.signs(split)
    return Real(cnn.scaled(pixels), labels)


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE) -> Network:
    """A judge trained on ``images`` (N, 1, 28, 28) uint8 and ``labels`` (N,); the same numbers at every call."""
    return cnn.train(images, labels, recipe, moved)


def moved(x: Tensor) -> Tensor:
    """Every image of ``x`` (B, 1, H, W) in [-1, 1], turned, scaled and moved at random; black where it ends."""
    turn, scale, right, down = ((2 * torch.rand(4, len(x)) - 1).T * torch.tensor([TURN, SCALE, 2 * SHIFT, 2 * SHIFT])).T
    cosine, sine = (1 + scale) * turn.cos(), (1 + scale) * turn.sin()
    rows = torch.stack([cosine, -sine, right, sine, cosine, down], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1


def place(folder: Path = FOLDER, recipe: Recipe = RECIPE) -> Path:
    """File of the judge: its name holds a hash of the recipe and the network."""
    return cnn.place(NAME, folder, recipe)


@cache
def trained(folder: Path = FOLDER) -> Judge:
    """The judge: read from ``folder``, or trained on the real data and kept there.

    Raises:
        RuntimeError: less than 0.95 of the real test images are recognised.
        ValueError: it has to be trained, and ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    file = place(folder, RECIPE)
    return cnn.kept(file, RECIPE, REQUIRED, lambda: train(*small_sets.signs("train"), RECIPE), lambda: signs("val"))


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
    """The judge's features as an extractor of `lightning_flows.metrics`, called ``sign-cnn``."""
    return Features(features, NAME)


if __name__ == "__main__":
    cnn.main(__doc__, trained, place, "held-out real images")
