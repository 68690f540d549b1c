"""The judge of Fashion-MNIST: a small convolutional network, its own test score beside each verdict.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.judges.fashion_cnn

trains it once, from a fixed seed, on the 60,000 real training images and nothing else (ten minutes of one CPU
core), tests it on the 10,000 test images, and keeps it under ``runs/judges``. It is fixed before any sample is
scored, and refuses to judge below 0.92. Its penultimate features are an extractor for distances between sets.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
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
    folder = cnn.folder_of("fashion_mnist", "train-00.npz")
    files = sorted(folder.glob(f"{split}*.npz"))
    if not files:
        raise ValueError(f"{DATA}={folder.parent} holds no fashion_mnist/{split}*.npz")
    parts = [np.load(file) for file in files]
    images = np.concatenate([part["images"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


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
    if not file.is_file():
        network = train(*_stored("train"), RECIPE)
        cnn.keep(file, network, cnn.share(network, *garments("test")), RECIPE)
    return cnn.read(file, REQUIRED)


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


def main() -> None:
    from benchmarks.common import show

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the judge is kept")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = trained(args.folder)
    show(f"accuracy on the real test images: {found.accuracy:.4f} ({place(args.folder)}, {found.digest})")


if __name__ == "__main__":
    main()
