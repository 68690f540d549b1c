"""Scores a class-conditional model of Fashion-MNIST: recognised? distributed like the data? copied?

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_fashion lfm-fashion-mnist --metrics FILE

5,000 samples, 500 of each class, of at most 25 network calls each, from one seed:

- accuracy of the judge (`benchmarks.judges.fashion_cnn`) on the first 200 of each class, beside the judge's own
  on the real test images;
- Frechet distance in the judge's features to the 10,000 test images, over that of 5,000 real training images
  to them (1 is as near as real data of this number come);
- precision, recall, density and coverage (k = 5) in the judge's features against 5,000 test images, beside those
  of the 5,000 training images;
- distance to the nearest of the 60,000 training images in pixels, beside that of 5,000 test images (a ratio far
  below 1: copies).

All of it again at guidance scale 1, where the model's own scale is another one (block ``fashion_unguided``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.judges import fashion_cnn
from benchmarks.zoo_scores import Drawn, draw, frechet, nearest_pixels, prdc, scale_of, setting, write
from lightning_flows import from_pretrained

PER_CLASS, JUDGED, SEED = 500, 200, 0
NEAREST = 5
DATA = "Fashion-MNIST"


class Reference(NamedTuple):
    """Real images that samples are compared with, and what real images score in their place.

    Attributes:
        train: all training images (M, 1, 28, 28).
        test: all test images (N, 1, 28, 28).
        some_train: as many training images as there are samples.
        some_test: as many test images as there are samples.
        distance: Frechet distance of ``some_train`` to ``test``.
        shares: precision, recall, density and coverage of ``some_train`` against ``some_test``.
        nearest: distance of each of ``some_test`` to its nearest training image.
    """

    train: Tensor
    test: Tensor
    some_train: Tensor
    some_test: Tensor
    distance: float
    shares: dict[str, float]
    nearest: Tensor


def reference(train: Tensor, test: Tensor, count: int) -> Reference:
    """The real side of all scores, for ``count`` samples; subsets are drawn from a fixed seed."""
    some_train, some_test, features = subset(train, count), subset(test, count), fashion_cnn.extractor()
    return Reference(
        train, test, some_train, some_test,
        distance=frechet(test, some_train, features),
        shares=prdc(some_test, some_train, features, NEAREST),
        nearest=nearest_pixels(some_test, train),
    )  # fmt: skip


def subset(images: Tensor, count: int) -> Tensor:
    """``count`` of the images, from a fixed seed; all of them where there are no more."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:count]]


def labels_of(per_class: int) -> Tensor:
    """Labels 0 to 9 in turn, so that the first samples are balanced as well."""
    return torch.arange(fashion_cnn.CLASSES).repeat(per_class)


def scores(drawn: Drawn, real: Reference, judged: int) -> dict[str, dict[str, Any]]:
    """The values with what they were computed from; the first ``judged`` samples are shown to the judge."""
    images = fashion_cnn.as_stored(drawn.images)
    verdict = fashion_cnn.judge(images[:judged], drawn.labels[:judged])
    distance = frechet(real.test, images, fashion_cnn.extractor())
    shares = prdc(real.some_test, images, fashion_cnn.extractor(), NEAREST)
    seen = {"extractor": fashion_cnn.NAME, "judge": fashion_cnn.trained().digest}
    return {
        "cnn_accuracy": {"value": verdict.accuracy, "judge_accuracy": verdict.judge, "samples": judged, **seen},
        "frechet_ratio[fashion-cnn]": {
            "value": distance / real.distance, "samples_to_test": distance, "train_to_test": real.distance,
            "train": len(real.some_train), "real": len(real.test), **seen,
        },
        "prdc[fashion-cnn]": {
            "value": shares, "train": real.shares, "nearest": NEAREST, "real": len(real.some_test), **seen,
        },
        "nearest_training[pixels]": {
            "value": copies(nearest_pixels(images, real.train), real.nearest), "train": len(real.train),
            "real": len(real.some_test), "extractor": "pixels",
        },
    }  # fmt: skip


def copies(samples: Tensor, held_out: Tensor) -> dict[str, float]:
    """Median and 1 % quantile of both distances, and the ratio of the medians."""
    values = {"samples": samples, "held_out": held_out}
    found = {name: rows.median().item() for name, rows in values.items()}
    found |= {f"{name}_q01": rows.quantile(0.01).item() for name, rows in values.items()}
    return found | {"ratio": found["samples"] / found["held_out"]}


def score(model: Any, real: Reference, options: dict[str, Any], per_class: int, judged: int) -> dict[str, Any]:
    """Draw and score ``per_class`` samples of each class, ``judged`` of each by the judge."""
    drawn = draw(model, labels_of(per_class), SEED, options)
    how = setting(model, drawn, options, SEED) | {"data": DATA}
    found = scores(drawn, real, judged * fashion_cnn.CLASSES)
    return {name: how | value for name, value in found.items()}


def report(values: dict[str, Any]) -> str:
    """The table of one guidance scale."""
    accuracy, frechet, shares, near = values.values()
    copy = near["value"]
    rows = [
        ["CNN accuracy", f"{accuracy['value']:.4f}", f"judge on real test images: {accuracy['judge_accuracy']:.4f}"],
        ["Frechet ratio, judge's features", f"{frechet['value']:.3f}",
         f"{frechet['samples_to_test']:.4f} over {frechet['train_to_test']:.4f} of training images"],
        *([name, f"{value:.4f}", f"training images: {shares['train'][name]:.4f}"]
          for name, value in shares["value"].items()),
        ["nearest training image, median", f"{copy['samples']:.3f}", f"test images: {copy['held_out']:.3f}"],
        ["nearest, 1 % quantile", f"{copy['samples_q01']:.3f}", f"test images: {copy['held_out_q01']:.3f}"],
        ["calls", accuracy["nfe"],
         f"{accuracy['solver']}, {accuracy['steps']} steps, scale {accuracy['guidance_scale']}"],
        ["seconds per sample", f"{accuracy['seconds_per_sample']:.4f}", accuracy["device"]],
    ]  # fmt: skip
    return common.table(["score", "value", "beside"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", help="zoo id, folder, or org/name@revision")
    parser.add_argument("--steps", type=int, help="intervals of the time grid; the model's by default")
    parser.add_argument("--guidance", type=float, help="scale, 1 is off; the model's by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--metrics", type=Path, help="metrics.json that receives the blocks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = from_pretrained(args.model, device=args.device)
    fashion_cnn.trained()  # before any sample is drawn
    options = {name: value for name in ("steps", "guidance") if (value := getattr(args, name)) is not None}
    real = reference(*(fashion_cnn.garments(split).images for split in ("train", "test")), PER_CLASS * 10)
    blocks = {"fashion": score(model, real, options, PER_CLASS, JUDGED)}
    if scale_of(model, options) != 1:
        blocks["fashion_unguided"] = score(model, real, options | {"guidance": 1.0}, PER_CLASS, JUDGED)
    for block, values in blocks.items():
        common.show(f"{block}\n{report(values)}")
        if args.metrics is not None:
            write(args.metrics, block, values)
    common.finish({"model": args.model, "blocks": blocks}, [], args.json)


if __name__ == "__main__":
    main()
