"""Scores a SymmFlow in both directions, on the test items of a recipe's data.

    python -m benchmarks.zoo_symmflow symmflow-shapes --metrics FILE
    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_symmflow symmflow-fashion-mnist --metrics FILE

Blocks of figures, each where it applies:

- ``reading``: what is read from the test images in one step, and ``reading_25`` from the first 1,000 in 25: mIoU,
  pixel accuracy and boundary F of masks, accuracy and calibration of labels;
- ``drawing``, for `data.Shapes`: the IoU of the masks that were asked for with those that the exact rule reads from
  the images (25 steps), and how often their label is the one that was asked for; for Fashion-MNIST how often the judge
  `benchmarks.judges.fashion_cnn` reads the label;
- ``distance``, for masks of photos: Frechet distance of 5 images for each test mask to the training photos, by the
  means of 8 x 8 cells (``frechet[pixels-8]``: extractors of photos need a download), and that of the test photos;
- ``inversion``: 100 steps from images to noise and code and 100 back: PSNR, with the code as it was reached, and with
  that of the mask and label that are read.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from benchmarks import zoo_cnn, zoo_scores
from benchmarks.common import finish, parser, show, single_thread
from benchmarks.judges import fashion_cnn
from benchmarks.zoo_semantics import items_of
from lightning_flows import from_pretrained
from lightning_flows.data import Shapes, shape_label, shape_mask
from lightning_flows.flow import seeds_from
from lightning_flows.metrics import (
    BoundaryFScore,
    Calibration,
    LabelAccuracy,
    MeanIoU,
    PeakSignalToNoise,
    PixelAccuracy,
    Pixels,
)
from lightning_flows.modules import SymmFlow
from lightning_flows.store import resolve

SEED, MANY, INVERTED, BATCH = 0, 25, 100, 100
PER_MASK, CELLS, MANY_ITEMS = 5, 8, 1000
Values = dict[str, dict[str, Any]]


def chunks(items: dict[str, Tensor], size: int = BATCH) -> list[dict[str, Tensor]]:
    """The items in batches, in order."""
    count = len(items["image"])
    return [{name: v[i : i + size] for name, v in items.items()} for i in range(0, count, size)]


def how(count: int, steps: int, seconds: float) -> dict[str, Any]:
    """What stands beside a figure."""
    return {
        "items": count,
        "steps": steps,
        "seed": SEED,
        "solver": "Euler",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "seconds_per_item": seconds / count,
    }


def reading(model: SymmFlow, items: dict[str, Tensor], steps: int) -> Values:
    """Figures of what is read from images."""
    classes = model.semantic.num_classes
    masks, labels = [], []
    if "mask" in classes:
        masks = [kind(classes["mask"]) for kind in (MeanIoU, PixelAccuracy, BoundaryFScore)]
    if "label" in classes:
        labels = [LabelAccuracy(classes["label"]), Calibration()]
    start, seen = time.perf_counter(), 0
    for part in chunks(items):
        found = model.read(part["image"], steps=steps, seeds=seeds_from(SEED, len(part["image"]), seen)).decoded
        seen += len(part["image"])
        for metric in masks:
            metric.update(found["mask"].labels, part["mask"])
        for metric in labels:
            metric.update(found["label"].scores, part["label"])
    about = how(seen, steps, time.perf_counter() - start)
    return {metric.name: written(metric.compute()) | about for metric in [*masks, *labels]}


def written(value: Any) -> dict[str, Any]:
    """A metric's value, and what it says beside it."""
    if not isinstance(value, dict):
        return {"value": float(value)}
    first, *others = value
    told = {name: json.loads(json.dumps(value[name], default=lambda x: x.tolist())) for name in others}
    return {"value": float(value[first]), **{name: v for name, v in told.items() if name == "per_class"}}


def drawing(model: SymmFlow, items: dict[str, Tensor]) -> Values:
    """Shapes: how well images agree with what was asked, by the exact rule."""
    agreement, right, start, seen = MeanIoU(model.semantic.num_classes["mask"]), 0, time.perf_counter(), 0
    for part in chunks(items):
        drawn = model.sample(model.condition_of(part), seeds=seeds_from(SEED, len(part["image"]), seen), steps=MANY)
        masks = shape_mask(drawn)
        agreement.update(masks, part["mask"])
        right += int((shape_label(masks) == part["label"]).sum())
        seen += len(drawn)
    about = how(seen, MANY, time.perf_counter() - start) | {"rule": "lightning_flows.data.shape_mask"}
    return {"asked_miou": written(agreement.compute()) | about, "asked_label": {"value": right / seen} | about}


def distance(model: SymmFlow, data: LightningDataModule, items: dict[str, Tensor]) -> Values:
    """Photos: how far images drawn for the test masks are from training photos, beside how far test photos are."""
    train = data.dataset("train")
    photos = torch.stack([train[i]["image"] for i in range(len(train))])
    start, drawn, count = time.perf_counter(), [], len(items["image"])
    for i in range(PER_MASK):
        for first, part in zip(range(0, count, BATCH), chunks(items), strict=True):
            seeds = seeds_from(SEED, len(part["image"]), i * count + first)
            drawn.append(model.sample(model.condition_of(part), seeds=seeds, steps=MANY))
    about = how(PER_MASK * count, MANY, time.perf_counter() - start) | {
        "samples_per_item": PER_MASK,
        "real": len(photos),
    }
    features = Pixels(CELLS)
    values = {
        f"frechet[{features.name}]": zoo_scores.frechet(photos, torch.cat(drawn), features),
        f"frechet[{features.name}] of test photos": zoo_scores.frechet(photos, items["image"], features),
    }
    return {name: {"value": value} | about for name, value in values.items()}


def judged(model: SymmFlow, count: int = 1000) -> Values:
    """Fashion-MNIST: how often the judge reads the label that was asked for."""
    labels = torch.arange(10).repeat(count // 10)
    drawn = zoo_scores.draw(model, labels, SEED, {"steps": MANY})
    about = zoo_scores.setting(model, drawn, {"steps": MANY}, SEED)
    return {name: about | value for name, value in zoo_cnn.accuracy(fashion_cnn, drawn, count).items()}


def inversion(model: SymmFlow, items: dict[str, Tensor]) -> Values:
    """Images turned into noise and code, and back."""
    exact, decoded, start, seen = PeakSignalToNoise(), PeakSignalToNoise(), time.perf_counter(), 0
    for part in chunks(items):
        seeds = seeds_from(SEED, len(part["image"]), seen)
        found = model.read(part["image"], steps=INVERTED, seeds=seeds)
        fields = {name: value.labels for name, value in found.decoded.items()}
        code = model.semantic.encode(fields, model.shape[1:])
        for metric, given in ((exact, found.code), (decoded, code)):
            metric.update(part["image"], model.draw_from(found.noise, given, steps=INVERTED))
        seen += len(part["image"])
    about = how(seen, INVERTED, time.perf_counter() - start) | {"unit": "dB"}
    return {
        "inversion_psnr": {"value": float(exact.compute())} | about,
        "inversion_psnr_decoded": {"value": float(decoded.compute())} | about,
    }


def main() -> None:
    """Score a model and write its figures."""
    options = parser(__doc__)
    options.add_argument("model", help="a zoo id or a folder")
    options.add_argument("--metrics", type=Path, help="file of figures; blocks of other names are kept")
    options.add_argument("--items", type=int, help="most test items; all by default")
    options.add_argument("--inverted", type=int, default=200, help="test items that are inverted; 0: none")
    args = options.parse_args()
    model = from_pretrained(args.model)
    data, items = items_of(resolve(args.model) / "recipe.yaml", args.items)
    few = {name: value[:MANY_ITEMS] for name, value in items.items()}
    blocks: dict[str, Values] = {"reading": reading(model, items, 1), f"reading_{MANY}": reading(model, few, MANY)}
    if isinstance(data, Shapes):
        blocks["drawing"] = drawing(model, items)
    elif model.semantic.keys == ("label",) and model.semantic.num_classes["label"] == 10 and model.shape == (1, 28, 28):
        blocks["drawing"] = judged(model)
    elif "mask" in model.semantic.keys:
        blocks["distance"] = distance(model, data, items)
    if args.inverted:
        blocks["inversion"] = inversion(model, {name: value[: args.inverted] for name, value in items.items()})
    for name, values in blocks.items():
        show(f"{name}: " + ", ".join(f"{key} {value['value']:.4f}" for key, value in values.items()))
        if args.metrics:
            zoo_scores.write(args.metrics, name, values)
    finish({"model": args.model, "blocks": blocks}, [], args.json)


if __name__ == "__main__":
    single_thread()
    main()
