"""What the convolutional judges of 28x28 images share: the network, its training, its file, and how it judges.

A judge is trained once, from a fixed seed, on real training images and nothing else, before any sample is scored; it
is kept with its accuracy on held-out real images, and refuses to judge below its bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_flows.store import load_tensors, save_tensors

FOLDER = Path("runs") / "judges"
DATA = "LIGHTNING_FLOWS_DATA"
CLASSES, SIZE, WIDTH = 10, 28, 128
_ROWS = 1000  # images that the network sees at once

Augment = Callable[[Tensor], Tensor]


class Recipe(NamedTuple):
    """How a judge is trained: SGD with Nesterov momentum, one cycle of the learning rate."""

    seed: int = 0
    epochs: int = 9
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.25  # share of the steps in which the rate rises
    dropout: float = 0.3


class Real(NamedTuple):
    """Real data: images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) int64."""

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


# ------------------------------------------------------------------ images


def folder_of(name: str, file: str) -> Path:
    """Folder of a data set below ``LIGHTNING_FLOWS_DATA``; ``file`` says in the error what it holds.

    Raises:
        ValueError: the environment variable does not name the folder of the data sets.
    """
    root = os.environ.get(DATA)
    if not root:
        raise ValueError(f"{DATA} is not set: it must name the folder that holds {name}/{file}, ...")
    return Path(root) / name


def stored(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 28, 28) uint8 and labels (N,) int64 of a split that is kept as arrays (N, 28, 28).

    Raises:
        ValueError: the environment variable does not name the folder of the data sets, or the split is not there.
    """
    folder = folder_of(name, "train-00.npz")
    files = sorted(folder.glob(f"{split}*.npz"))
    if not files:
        raise ValueError(f"{DATA}={folder.parent} holds no {name}/{split}*.npz")
    parts = [np.load(file) for file in files]
    images = np.concatenate([part["images"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


def scaled(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def as_stored(images: Tensor) -> Tensor:
    """Images as they would be in a file: clipped to [-1, 1], rounded to 8 bits. Real images stay as they are."""
    return scaled(((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round())


# ------------------------------------------------------------------ training


def train(images: Tensor, labels: Tensor, recipe: Recipe, augment: Augment) -> Network:
    """A judge trained on ``images`` (N, 1, 28, 28) uint8 and ``labels`` (N,); the same numbers at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Network(recipe.dropout).to(memory_format=torch.channels_last)
        optimizer = _optimizer(network, recipe)
        steps = recipe.epochs * (len(images) // recipe.batch_size)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, pct_start=recipe.warmup)
        for _ in range(recipe.epochs):
            order = torch.randperm(len(images))
            # the rest of an epoch is left out
            for rows in order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
                _step(network, optimizer, augment(scaled(images[rows])), labels[rows])
                rate.step()
    return network.eval().requires_grad_(False)


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), labels).backward()
    optimizer.step()


# ------------------------------------------------------------------ the file


def place(name: str, folder: Path, recipe: Recipe) -> Path:
    """File of a judge: its name holds a hash of the recipe and the network."""
    text = json.dumps([recipe._asdict(), repr(Network(recipe.dropout))])
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def keep(file: Path, network: Network, accuracy: float, recipe: Recipe) -> None:
    """Write a judge with its accuracy on the real test images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"accuracy": repr(accuracy), "recipe": json.dumps(recipe._asdict()), "torch": torch.__version__}
    save_tensors(file, network.state_dict(), metadata)


def read(file: Path, required: float) -> Judge:
    """A judge from its file.

    Raises:
        RuntimeError: less than ``required`` of the real test images are recognised.
    """
    with safe_open(file, framework="pt") as stored:
        accuracy = float(stored.metadata()["accuracy"])
    if accuracy < required:
        raise RuntimeError(f"the judge recognises {accuracy:.4f} of real test images, {required} are needed ({file})")
    network = Network()
    network.load_state_dict(load_tensors(file))
    network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Judge(network, accuracy, hashlib.sha256(file.read_bytes()).hexdigest()[:12])


def kept(file: Path, recipe: Recipe, required: float, make: Callable[[], Network], test: Callable[[], Real]) -> Judge:
    """The judge of ``file``; where there is none, it is made, tested on real images, and kept there.

    Raises:
        RuntimeError: less than ``required`` of the real test images are recognised.
    """
    if not file.is_file():
        network = make()
        keep(file, network, share(network, *test()), recipe)
    return read(file, required)


def main(doc: str | None, trained: Callable[[Path], Judge], place: Callable[[Path], Path], images: str) -> None:
    """The command line of a judge: its accuracy on ``images``, after it was read, or trained and kept."""
    from benchmarks.common import show

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the judge is kept")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = trained(args.folder)
    show(f"accuracy on the {images}: {found.accuracy:.4f} ({place(args.folder)}, {found.digest})")


# ------------------------------------------------------------------ judging


def verdict(judge: Judge, images: Tensor, labels: Tensor) -> Verdict:
    """Share of ``images`` (N, 1, 28, 28) in [-1, 1] that a judge takes for their ``labels`` (N,).

    Raises:
        ValueError: shapes do not fit, no image, or values that are not finite.
    """
    if images.shape[1:] != (1, SIZE, SIZE) or labels.shape != images.shape[:1] or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels must be (N, 1, 28, 28) and (N,) with N >= 1, got {shapes}")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    return Verdict(share(judge.network, images, labels), judge.accuracy, len(images))


def features(judge: Judge, images: Tensor) -> Tensor:
    """Penultimate features (N, 128) of ``images`` (N, 1, 28, 28) in [-1, 1].

    Raises:
        ValueError: ``images`` of another shape.
    """
    if images.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(f"images must be (N, 1, 28, 28), got {tuple(images.shape)}")
    return _batched(judge.network.features, images)


@torch.no_grad()
def _batched(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(as_stored(rows)) for rows in images.split(_ROWS)])


def share(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` that a network takes for their ``labels``."""
    return (_batched(network, images).argmax(1) == labels.cpu()).double().mean().item()
