"""The judge of Fashion-MNIST: a small convolutional network, its own test score beside each verdict.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.judges.fashion_cnn

trains it once, from a fixed seed, on the 60,000 real training images and nothing else (ten minutes of one CPU
core), tests it on the 10,000 test images, and keeps it under ``runs/judges``. It is fixed before any sample is
scored, and refuses to judge below 0.92. Its penultimate features are an extractor for distances between sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_flows.metrics import Features
from lightning_flows.store import load_tensors, save_tensors

NAME = "fashion-cnn"
DATA = "LIGHTNING_FLOWS_DATA"
FOLDER = Path("runs") / "judges"
REQUIRED = 0.92
CLASSES, SIZE, WIDTH = 10, 28, 128
_ROWS = 1000  # images that the network sees at once


class Recipe(NamedTuple):
    """How the judge is trained: SGD with Nesterov momentum, one cycle of the learning rate, horizontal flips."""

    seed: int = 0
    epochs: int = 9
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.25  # share of the steps in which the rate rises
    dropout: float = 0.3


RECIPE = Recipe()


class Real(NamedTuple):
    """Real garments: images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Verdict(NamedTuple):
    """Share of samples that the judge gives their own label, beside the judge's share on real test images."""

    accuracy: float
    judge: float
    count: int

    def __str__(self) -> str:
        own = f"the judge on real test images: {self.judge:.4f}"
        return f"CNN accuracy {self.accuracy:.4f} of {self.count} samples ({own})"


class Judge(NamedTuple):
    """The trained network, its accuracy on the real test images, and the start of its weights' SHA-256."""

    network: Network
    accuracy: float
    digest: str


class Network(nn.Module):
    """Three convolutions, each halved by max-pooling, and one hidden layer: (N, 1, 28, 28) to (N, 10)."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 32), *_block(32, 64), *_block(64, 128),
            nn.Flatten(),  # (N, 128 * 3 * 3)
            nn.Linear(128 * 9, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _block(channels: int, out: int) -> list[nn.Module]:
    # pooled before the normalisation: a quarter of the work, and the maximum commutes with what follows
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    return [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(out), nn.ReLU()]


# ------------------------------------------------------------------ real data


def garments(split: str) -> Real:
    """The real garments of ``train`` (60,000) or ``test`` (10,000).

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    pixels, labels = _stored(split)
    return Real(_scaled(pixels), labels)


def _stored(split: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 28, 28) uint8 and labels (N,) int64."""
    root = os.environ.get(DATA)
    if not root:
        raise ValueError(f"{DATA} is not set: it must name the folder that holds fashion_mnist/train-00.npz, ...")
    files = sorted((Path(root) / "fashion_mnist").glob(f"{split}*.npz"))
    if not files:
        raise ValueError(f"{DATA}={root} holds no fashion_mnist/{split}*.npz")
    parts = [np.load(file) for file in files]
    images = np.concatenate([part["images"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def as_stored(images: Tensor) -> Tensor:
    """Images as they would be in a file: clipped to [-1, 1], rounded to 8 bits. Real images stay as they are."""
    return _scaled(((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round())


# ------------------------------------------------------------------ training


def train(images: Tensor, labels: Tensor, recipe: Recipe = RECIPE) -> Network:
    """A judge trained on ``images`` (N, 1, 28, 28) uint8 and ``labels`` (N,); the same numbers at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Network(recipe.dropout).to(memory_format=torch.channels_last)
        optimizer = _optimizer(network, recipe)
        steps = recipe.epochs * (len(images) // recipe.batch_size)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, pct_start=recipe.warmup)
        for _ in range(recipe.epochs):
            _epoch(network, optimizer, rate, images, labels, recipe.batch_size)
    return network.eval().requires_grad_(False)


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )


def _epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
    images: Tensor,
    labels: Tensor,
    size: int,
) -> None:
    order = torch.randperm(len(images))
    for rows in order[: len(order) // size * size].split(size):  # the rest of an epoch is left out
        x = _scaled(images[rows])
        flipped = torch.rand(len(x), 1, 1, 1) < 0.5
        x = torch.where(flipped, x.flip(-1), x).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels[rows]).backward()
        optimizer.step()
        rate.step()


def place(folder: Path = FOLDER, recipe: Recipe = RECIPE) -> Path:
    """File of the judge: its name holds a hash of the recipe and the network."""
    text = json.dumps([recipe._asdict(), repr(Network(recipe.dropout))])
    return folder / f"{NAME}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


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
        accuracy = _share(network, *garments("test"))
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"accuracy": repr(accuracy), "recipe": json.dumps(RECIPE._asdict()), "torch": torch.__version__}
        save_tensors(file, network.state_dict(), metadata)
    return read(file)


def read(file: Path) -> Judge:
    """A judge from its file.

    Raises:
        RuntimeError: less than 0.92 of the real test images are recognised.
    """
    with safe_open(file, framework="pt") as stored:
        accuracy = float(stored.metadata()["accuracy"])
    if accuracy < REQUIRED:
        raise RuntimeError(f"the judge recognises {accuracy:.4f} of real test images, {REQUIRED} are needed ({file})")
    network = Network()
    network.load_state_dict(load_tensors(file))
    network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Judge(network, accuracy, hashlib.sha256(file.read_bytes()).hexdigest()[:12])


# ------------------------------------------------------------------ judging


def judge(images: Tensor, labels: Tensor) -> Verdict:
    """Share of ``images`` (N, 1, 28, 28) in [-1, 1] that the judge takes for their ``labels`` (N,).

    Raises:
        ValueError: shapes do not fit, no image, or values that are not finite.
    """
    if images.shape[1:] != (1, SIZE, SIZE) or labels.shape != images.shape[:1] or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels must be (N, 1, 28, 28) and (N,) with N >= 1, got {shapes}")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    network, own, _ = trained()
    return Verdict(_share(network, images, labels), own, len(images))


def features(images: Tensor) -> Tensor:
    """Penultimate features (N, 128) of ``images`` (N, 1, 28, 28) in [-1, 1].

    Raises:
        ValueError: ``images`` of another shape.
    """
    if images.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(f"images must be (N, 1, 28, 28), got {tuple(images.shape)}")
    return _batched(trained().network.features, images)


def extractor() -> Features:
    """The judge's features as an extractor of `lightning_flows.metrics`, called ``fashion-cnn``."""
    return Features(features, NAME)


@torch.no_grad()
def _batched(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(as_stored(rows)) for rows in images.split(_ROWS)])


def _share(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (_batched(network, images).argmax(1) == labels.cpu()).double().mean().item()


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
