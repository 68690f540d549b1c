"""Scores a class-conditional model of the 8x8 digits: recognised? distributed like the data? copied?

    python -m benchmarks.zoo_digits lfm-digits --metrics zoo/lfm-digits/metrics.json

For each of five seeds, 1,000 samples with the label frequencies of the real digits, of at most 25 network
calls each:

- accuracy of the judge (`benchmarks.judges.digits_svm`), beside the judge's own on held-out real images;
- Frechet distance in raw pixels to all 1,797 real images, over that between random halves of the real images
  (1 is as near as real data come to themselves at half the size);
- distance to the nearest training image, beside that of held-out real images (a ratio far below 1: copies).
"""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.judges.digits_svm import Real, digits, judge, trained
from lightning_flows import Condition, from_pretrained
from lightning_flows.metrics import Frechet, NearestNeighbour

COUNT, SEEDS, MAX_CALLS = 1000, (0, 1, 2, 3, 4), 25


class Drawn(NamedTuple):
    """Samples (N, 1, 8, 8) with their labels (N,), network calls of a sample, and seconds of all."""

    images: Tensor
    labels: Tensor
    calls: int
    seconds: float


def frequencies(labels: Tensor, count: int) -> Tensor:
    """``count`` labels with the frequencies of ``labels``; the largest remainders are rounded up."""
    share = labels.bincount().double() * count / len(labels)
    whole = share.floor().long()
    largest = (share - whole).argsort(descending=True, stable=True)[: count - int(whole.sum())]
    whole[largest] += 1
    return torch.arange(len(whole)).repeat_interleave(whole)


def draw(model: Any, labels: Tensor, seed: int, options: dict[str, Any]) -> Drawn:
    """Samples of all labels in one batch; the calls of ``model.network`` are counted by a hook.

    Raises:
        RuntimeError: more than 25 network calls.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.network.register_forward_hook(count)
    start = time.perf_counter()
    try:
        images = model.sample(Condition(label=labels), seed=seed, **options)
    finally:
        hook.remove()
    if calls > MAX_CALLS:
        raise RuntimeError(f"{calls} network calls for a sample, at most {MAX_CALLS} are allowed: lower --steps")
    return Drawn(images.float().cpu(), labels, calls, time.perf_counter() - start)


def distance(real: Tensor, samples: Tensor) -> float:
    """Frechet distance in raw pixels."""
    metric = Frechet()
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return metric.compute().item()


def between_halves(images: Tensor, seed: int) -> float:
    """Frechet distance between two random halves of the real images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    first, second = images[order].tensor_split(2)
    return distance(first, second)


def nearest(samples: Tensor) -> dict[str, float]:
    """Distances to the nearest training image, of samples and of held-out real images."""
    metric = NearestNeighbour(digits("train").images)
    metric.update(digits("val", "test").images, real=True)
    metric.update(samples, real=False)
    return {name: value.item() for name, value in metric.compute().items()}


def scores(drawn: list[Drawn], real: Real) -> dict[str, dict[str, Any]]:
    """The values with what they were computed from."""
    accuracy = [judge(d.images, d.labels).accuracy for d in drawn]
    frechet = [distance(real.images, d.images) for d in drawn]
    halves = [between_halves(real.images, seed) for seed in SEEDS[: len(drawn)]]
    mean, floor = sum(frechet) / len(frechet), sum(halves) / len(halves)
    count = {"samples": COUNT, "seeds": list(SEEDS[: len(drawn)])}
    return {
        "svm_accuracy": {
            "value": sum(accuracy) / len(accuracy), "per_seed": accuracy,
            "judge_accuracy": trained().accuracy,
            "real": len(digits("train").images), "extractor": "svm-rbf", **count,
        },
        "frechet_ratio[pixels]": {
            "value": mean / floor, "samples_to_real": mean, "half_to_half": floor, "per_seed": frechet,
            "real": len(real.images), "extractor": "pixels", **count,
        },
        "nearest_training[pixels]": {
            "value": nearest(torch.cat([d.images for d in drawn])), "real": len(digits("val", "test").images),
            "extractor": "pixels", **count, "samples": COUNT * len(drawn),
        },
    }  # fmt: skip


def setting(model: Any, drawn: list[Drawn], options: dict[str, Any]) -> dict[str, Any]:
    """How the samples were drawn."""
    guidance = options.get("guidance", getattr(model, "guidance", None))
    return {
        "seed": f"{SEEDS[0]} to {SEEDS[-1]}",
        "guidance_scale": float(getattr(guidance, "scale", 1.0 if guidance is None else guidance)),
        "solver": repr(getattr(model, "solver", None)),
        "steps": options.get("steps", getattr(model, "steps", None)),
        "nfe": max(d.calls for d in drawn),
        "seconds_per_sample": sum(d.seconds for d in drawn) / (COUNT * len(drawn)),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def write(file: Path, values: dict[str, Any]) -> None:
    """Put the values as block ``digits`` into a metrics file; its other blocks stay."""
    content = json.loads(file.read_text()) if file.exists() else {}
    versions = {name: version(name) for name in ("lightning-flows", "torch", "scikit-learn")}
    content["digits"] = {"values": values, "versions": versions}
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


def report(values: dict[str, Any]) -> str:
    """The table."""
    svm, frechet, copies = values.values()
    near = copies["value"]
    rows = [
        ["SVM accuracy", f"{svm['value']:.4f}", f"judge on held-out real: {svm['judge_accuracy']:.4f}"],
        ["Frechet ratio, pixels", f"{frechet['value']:.3f}",
         f"{frechet['samples_to_real']:.4f} over {frechet['half_to_half']:.4f} between real halves"],
        ["nearest training image", f"{near['samples']:.3f}", f"held-out real: {near['held_out']:.3f}"],
        ["nearest, 1 % quantile", f"{near['samples_q01']:.3f}", f"held-out real: {near['held_out_q01']:.3f}"],
        ["calls", svm["nfe"], f"{svm['solver']}, {svm['steps']} steps, scale {svm['guidance_scale']}"],
    ]  # fmt: skip
    return common.table(["score", "value", "beside"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", help="zoo id, folder, or org/name@revision")
    parser.add_argument("--steps", type=int, help="intervals of the time grid; the model's by default")
    parser.add_argument("--guidance", type=float, help="scale, 1 is off; the model's by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--metrics", type=Path, help="metrics.json that receives the block 'digits'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, real = from_pretrained(args.model), digits()
    options = {name: value for name in ("steps", "guidance") if (value := getattr(args, name)) is not None}
    labels = frequencies(real.labels, COUNT)
    drawn = [draw(model, labels, seed, options) for seed in SEEDS]
    how = setting(model, drawn, options)
    values = {name: value | how for name, value in scores(drawn, real).items()}
    common.show(report(values))
    if args.metrics is not None:
        write(args.metrics, values)
    common.finish({"model": args.model, "values": values}, [], args.json)


if __name__ == "__main__":
    main()
