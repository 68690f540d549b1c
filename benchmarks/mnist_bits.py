"""Test bits per dimension on MNIST: zuko's MAF and NSF beside a zoo entry, each trained on one budget of CPU time.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.mnist_bits maf --cpu-seconds 1200 --threads 2 --out maf.json
    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.mnist_bits nsf --cpu-seconds 1200 --threads 2 --out nsf.json
    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.mnist_bits tarflow --weights tarflow-mnist-bpd --out tarflow.json

The same for all three: 59,000 training images, 1,000 others to choose by (the division of `lightning_flows.data.Arrays`
with seed 0), the 10,000 test images for the figure, pixels with uniform noise over their 256 grey levels in [-1, 1]
(`lightning_flows.flow.dequantize`), no logit, no augmentation. The figure is one draw of that noise, keyed by the place
of an image as in `lightning_flows.callbacks.Evaluation`.

The budget is CPU time of the process, all threads together, so that a busy machine takes little away: 1,200 s are ten
minutes of two threads. Threads that wait must sleep (``OMP_WAIT_POLICY=PASSIVE``, set here; give it to the training of
ours too): they spin by default, and on two busy cores a step of MAF then took 5 to 8 times its CPU time. Only training
counts: reading the data and looking at the held-out images do not.

The baselines get AdamW, a cosine to the end of the budget, clipping, averaged weights, and the best of those averages
by the held-out images. What was compared to choose their sizes and rates stands in `benchmarks.baseline_flows`;
``--lr`` and ``--transforms`` try others.
"""

from __future__ import annotations

import argparse
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.baseline_flows import LEVELS, SETTINGS, LogProb, Settings, build, fit
from benchmarks.judges.cnn import folder_of
from lightning_flows import from_pretrained
from lightning_flows.data import Arrays
from lightning_flows.flow import SampleNoise, bits_per_dim, dequantize, key
from lightning_flows.metrics import BitsPerDim

HELD_OUT, SEED = 1000, 0
_ROWS = 500  # images scored at once


# ------------------------------------------------------------------ data


class Images(NamedTuple):
    """Images (N, 1, 28, 28) in [-1, 1] that take 256 values."""

    train: Tensor
    held_out: Tensor
    test: Tensor


def mnist() -> Images:
    """59,000, 1,000 and 10,000 digits: the division of a recipe with ``val_fraction`` 1/60.

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    root = str(folder_of("mnist", "train-00.npz"))
    data = Arrays(root, layout="NHW", channels=1, val_fraction=HELD_OUT / 60_000)
    return Images(*(torch.stack([x["image"] for x in data.dataset(split)]) for split in ("train", "val", "test")))


# ------------------------------------------------------------------ the figure


class Score(NamedTuple):
    """Mean bits per dimension of images, and its standard error over them."""

    bits_per_dim: float
    standard_error: float


@torch.no_grad()
def score(log_prob: LogProb, images: Tensor) -> Score:
    """Bits per dimension of ``images`` (N, C, H, W) in [-1, 1] under a density of dequantised pixels.

    Args:
        log_prob: dequantised images (B, C, H, W) to nats (B,).
        images: of 256 grey levels.
    """
    metric, each = BitsPerDim(LEVELS), []
    for rows in torch.arange(len(images)).split(_ROWS):
        noise = SampleNoise([key("evaluation", int(i)) for i in rows])
        x = dequantize(images[rows], LEVELS, noise)
        nats, dims = log_prob(x).double(), x[0].numel()
        metric.update(nats, dims)
        each.append(bits_per_dim(nats, dims, LEVELS))
    return Score(metric.compute().item(), (torch.cat(each).std() / len(images) ** 0.5).item())


# ------------------------------------------------------------------ the command


def baseline(images: Images, settings: Settings, seconds: float, seed: int) -> dict[str, Any]:
    """Figures of a baseline: trained on the budget, then scored on the test images."""
    model = build(settings, images.train, seed)
    training = fit(model, images.train, lambda p: score(p, images.held_out).bits_per_dim, settings, seconds, seed)
    packages = ("lightning-flows", "torch", "zuko")
    return figures(model, images.test, packages) | {"seed": seed, "settings": settings._asdict(), "training": training}


def entry(weights: str, test: Tensor) -> dict[str, Any]:
    """Figures of a trained model of ours: a zoo id, a folder, or ``org/name@revision``."""
    model = from_pretrained(weights).eval()
    name = Path(weights).resolve().name if Path(weights).is_dir() else weights
    return figures(model, test, ("lightning-flows", "torch")) | {"weights": name}


def figures(model: Any, test: Tensor, packages: tuple[str, ...]) -> dict[str, Any]:
    """What stands beside each test figure.

    Raises:
        RuntimeError: the density of some test image is not finite.
    """
    found = score(model.log_prob, test)
    if not math.isfinite(found.bits_per_dim):
        raise RuntimeError(f"bits/dim of the {len(test)} test images is {found.bits_per_dim}")
    return {
        "test": {**found._asdict(), "images": len(test), "levels": LEVELS, "draws": 1},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(), "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*SETTINGS, "tarflow"])
    parser.add_argument("--weights", help="of tarflow: a zoo id, a folder, or org/name@revision")
    parser.add_argument("--cpu-seconds", type=float, default=1200.0, help="of training, all threads together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, help="highest learning rate of a baseline")
    parser.add_argument("--transforms", type=int, help="number of transforms of a baseline")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if (args.model == "tarflow") != (args.weights is not None):
        parser.error("--weights goes with tarflow, and only with it")
    torch.set_num_threads(args.threads)
    images = mnist()
    if args.model == "tarflow":
        found = entry(args.weights, images.test)
    else:
        changed = {name: getattr(args, name) for name in ("lr", "transforms") if getattr(args, name) is not None}
        found = baseline(images, SETTINGS[args.model]._replace(**changed), args.cpu_seconds, args.seed)
    test = found["test"]
    common.show(f"{args.model}: {test['bits_per_dim']:.4f} bits/dim of {test['images']} test images")
    common.finish({"model": args.model, **found}, [], args.out)


if __name__ == "__main__":
    main()
