"""The judge of 8x8 digits: a support vector machine trained on real ones, its own score beside each verdict.

Seed, split and machine are fixed before any sample is scored: it is trained on the training split of
`lightning_flows.data.Digits` (1,437 images), tested on the 360 others, and refuses to judge below 0.98 there.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from lightning_flows.data import Digits

SEED = 0
REQUIRED = 0.98


class Verdict(NamedTuple):
    """Share of samples that the judge gives their own label, beside the judge's share on real test images."""

    accuracy: float
    judge: float
    count: int

    def __str__(self) -> str:
        own = f"the judge on held-out real images: {self.judge:.4f}"
        return f"SVM accuracy {self.accuracy:.4f} of {self.count} samples ({own})"


class Judge(NamedTuple):
    """The trained machine and its accuracy on held-out real images."""

    machine: SVC
    accuracy: float


class Real(NamedTuple):
    """Real digits: images (N, 1, 8, 8) float32 in [-1, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor


def digits(*splits: str) -> Real:
    """The real digits of some of the splits ``train``, ``val`` and ``test``; of all three by default."""
    data = Digits(batch_size=1)
    sets = [data.dataset(split) for split in splits or ("train", "val", "test")]
    items = [part[i] for part in sets for i in range(len(part))]  # a keyed set counts on into the next epoch
    labels = torch.tensor([int(item["label"]) for item in items])
    return Real(torch.stack([item["image"] for item in items]), labels)


@cache
def trained() -> Judge:
    """The judge.

    Raises:
        RuntimeError: less than 0.98 of the held-out real images are recognised.
    """
    train, held_out = digits("train"), digits("val", "test")
    machine = SVC(kernel="rbf", C=10.0, gamma="scale", random_state=SEED)
    machine.fit(_rows(train.images), train.labels.numpy())
    accuracy = float(machine.score(_rows(held_out.images), held_out.labels.numpy()))
    if accuracy < REQUIRED:
        raise RuntimeError(f"the judge recognises {accuracy:.4f} of real test images, {REQUIRED} are needed")
    return Judge(machine, accuracy)


def judge(images: Tensor, labels: Tensor) -> Verdict:
    """Share of ``images`` (N, 1, 8, 8) in [-1, 1] that the judge takes for their ``labels`` (N,).

    Raises:
        ValueError: shapes do not fit, no image, or values that are not finite.
    """
    if images.shape[1:] != (1, 8, 8) or labels.shape != images.shape[:1] or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels must be (N, 1, 8, 8) and (N,) with N >= 1, got {shapes}")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    machine, own = trained()
    found = torch.from_numpy(machine.predict(_rows(images)))
    return Verdict((found == labels.cpu()).double().mean().item(), own, len(images))


def _rows(images: Tensor) -> np.ndarray:
    """Pixels as rows (N, 64) in [-1, 1]; samples are clipped to where real pixels lie."""
    return images.detach().cpu().double().clamp(-1, 1).flatten(1).numpy()


if __name__ == "__main__":
    from benchmarks.common import show

    show(f"accuracy on held-out real digits: {trained().accuracy:.4f}")
