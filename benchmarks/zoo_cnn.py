"""What the scores of class-conditional models of 28x28 images share: a judge, distances in its features, copies.

The judge is a module of `benchmarks.judges`, such as `fashion_cnn`: what it is called, its verdicts, its features.
Samples are drawn from one seed:

- accuracy of the judge on the first of each class, beside the judge's own on the real test images;
- Frechet distance in the judge's features to all test images, over that of as many real training images to them (1 is
  as near as real data of this number come);
- precision, recall, density and coverage (k = 5) in the judge's features against as many test images, beside those of
  the training images;
- distance to the nearest of all training images in pixels, beside that of test images (a ratio far below 1: copies).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common, zoo_flows
from benchmarks.judges.cnn import CLASSES
from benchmarks.zoo_scores import Drawn, draw, frechet, nearest_pixels, prdc, scale_of, setting, write

PER_CLASS, JUDGED, SEED = 500, 200, 0
INVERTED = 1000  # real images that a normalizing flow turns into noise and back
NEAREST = 5

Values = dict[str, dict[str, Any]]


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


def reference(judge: ModuleType, train: Tensor, test: Tensor, count: int) -> Reference:
    """The real side of all scores, for ``count`` samples; subsets are drawn from a fixed seed."""
    some_train, some_test, features = subset(train, count), subset(test, count), judge.extractor()
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
    return torch.arange(CLASSES).repeat(per_class)


def scores(judge: ModuleType, drawn: Drawn, real: Reference, judged: int) -> Values:
    """The values with what they were computed from; the first ``judged`` samples are shown to the judge."""
    images = judge.as_stored(drawn.images)
    distance = frechet(real.test, images, judge.extractor())
    shares = prdc(real.some_test, images, judge.extractor(), NEAREST)
    seen = identity(judge)
    return {
        **accuracy(judge, drawn, judged),
        f"frechet_ratio[{judge.NAME}]": {
            "value": distance / real.distance, "samples_to_test": distance, "train_to_test": real.distance,
            "train": len(real.some_train), "real": len(real.test), **seen,
        },
        f"prdc[{judge.NAME}]": {
            "value": shares, "train": real.shares, "nearest": NEAREST, "real": len(real.some_test), **seen,
        },
        "nearest_training[pixels]": {
            "value": copies(nearest_pixels(images, real.train), real.nearest), "train": len(real.train),
            "real": len(real.some_test), "extractor": "pixels",
        },
    }  # fmt: skip


def accuracy(judge: ModuleType, drawn: Drawn, judged: int) -> Values:
    """Share of the first ``judged`` samples that the judge gives their own label."""
    verdict = judge.judge(judge.as_stored(drawn.images[:judged]), drawn.labels[:judged])
    value = {"value": verdict.accuracy, "judge_accuracy": verdict.judge, "samples": judged}
    return {"cnn_accuracy": value | identity(judge)}


def identity(judge: ModuleType) -> dict[str, str]:
    """Which judge it was."""
    return {"extractor": judge.NAME, "judge": judge.trained().digest}


def copies(samples: Tensor, held_out: Tensor) -> dict[str, float]:
    """Median and 1 % quantile of both distances, and the ratio of the medians."""
    values = {"samples": samples, "held_out": held_out}
    found = {name: rows.median().item() for name, rows in values.items()}
    found |= {f"{name}_q01": rows.quantile(0.01).item() for name, rows in values.items()}
    return found | {"ratio": found["samples"] / found["held_out"]}


def score(
    judge: ModuleType, model: Any, real: Reference, options: Mapping[str, Any], per_class: int, judged: int, data: str
) -> Values:
    """Draw and score ``per_class`` samples of each class, ``judged`` of each by the judge."""
    drawn = draw(model, labels_of(per_class), SEED, options)
    how = setting(model, drawn, options, SEED) | {"data": data}
    return {name: how | value for name, value in scores(judge, drawn, real, judged * CLASSES).items()}


def score_twice(
    judge: ModuleType, name: str, model: Any, real: Reference, options: dict[str, Any], per_class: int, data: str
) -> dict[str, Values]:
    """Block ``name``, and at guidance scale 1 block ``name_unguided``, where the model's scale is another one."""
    judged = min(JUDGED, per_class)
    blocks = {name: score(judge, model, real, options, per_class, judged, data)}
    if scale_of(model, options) != 1:
        alone = options | {"guidance": 1.0}
        blocks[f"{name}_unguided"] = score(judge, model, real, alone, per_class, judged, data)
    return blocks


def inverted(model: Any, images: Tensor, labels: Tensor, data: str) -> dict[str, Values]:
    """Block ``invertibility`` of a normalizing flow, on the first real images; none of another model."""
    if not zoo_flows.is_flow(model):
        return {}
    found = zoo_flows.invertibility(model, images[:INVERTED], labels[:INVERTED])
    return {"invertibility": {name: value | {"data": data} for name, value in found.items()}}


# ------------------------------------------------------------------ the command


def report(values: Values) -> str:
    """The table of a block."""
    kinds = [name.partition("[")[0] for name in values]
    if kinds != ["cnn_accuracy", "frechet_ratio", "prdc", "nearest_training"]:
        return zoo_flows.report(values)
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
        ["calls", accuracy["nfe"], f"{_how(accuracy)}, scale {accuracy['guidance_scale']}"],
        ["seconds per sample", f"{accuracy['seconds_per_sample']:.4f}", accuracy["device"]],
    ]  # fmt: skip
    return common.table(["score", "value", "beside"], rows)


def _how(entry: Mapping[str, Any]) -> str:
    if "solver" in entry:
        return f"{entry['solver']}, {entry['steps']} steps"
    return f"{entry['method']}, {entry['passes']} passes, denoise {entry['denoise']:g}"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all scores of this kind."""
    found = common.parser(doc)
    found.add_argument("model", help="zoo id, folder, or org/name@revision")
    found.add_argument("--steps", type=int, help="intervals of the time grid; the model's by default")
    found.add_argument("--guidance", type=float, help="scale, 1 is off; the model's by default")
    found.add_argument("--denoise", type=float, help="of a normalizing flow, 0 is off; the model's by default")
    found.add_argument("--per-class", type=int, default=PER_CLASS, help="samples of each class")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", default="cpu")
    found.add_argument("--metrics", type=Path, help="metrics.json that receives the blocks")
    return found


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of `sample`; what it leaves out is the model's."""
    asked = {name: getattr(args, name) for name in ("steps", "guidance", "denoise")}
    return {name: value for name, value in asked.items() if value is not None}


def publish(blocks: Mapping[str, Values], args: argparse.Namespace) -> None:
    """Show all blocks, write them where asked, and end with status 1 where a bar was missed."""
    for block, values in blocks.items():
        common.show(f"{block}\n{report(values)}")
        if args.metrics is not None:
            write(args.metrics, block, values)
    failed = [reason for values in blocks.values() for reason in zoo_flows.missed(values)]
    common.finish({"model": args.model, "blocks": blocks}, failed, args.json)
