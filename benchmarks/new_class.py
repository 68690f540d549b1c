"""An eleventh class for a model of ten: hats, from 100 images, without forgetting the garments.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.new_class runs/new_class [--methods replay] [--json FILE]

`lfm-fashion-mnist` gets a row for hats (`from_pretrained(..., num_classes=11, resize=True)`: the others stay bit for
bit, the new one starts at their mean) and 300 steps of 64. Methods:

- ``replay``: all weights are trained; a quarter of each batch are hats, mirrored or not, the rest garments;
- ``alone``: the same on hats alone;
- ``lora``: adapters of rank 8 and the new row; batches as in ``replay``. The base stays as it is;
- ``row``: the new row alone is trained, on hats: 128 numbers. Garments stay bit for bit what they were.

Scored: 50 samples of each garment by the judge of Fashion-MNIST, before and after; 200 hats by a judge of eleven
classes. That one is a linear layer on the frozen features of the first (logistic regression, fixed before any sample
is drawn), fitted on 6,000 garments and the 100 hats with their mirror images, tested on 37 other hats and the 10,000
test garments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from benchmarks import common, small_sets
from benchmarks.finetuning import BASE, SEED, fit, latents
from benchmarks.judges import cnn, fashion_cnn
from benchmarks.zoo_scores import draw, nearest_pixels, setting
from lightning_flows import from_pretrained
from lightning_flows.callbacks.pictures import contact_sheet, to_image, write_png
from lightning_flows.networks import add_lora

HAT, STEPS, BATCH, HATS_IN_BATCH, RANK = 10, 300, 64, 16, 8
RATES = {"replay": 3e-4, "alone": 3e-4, "lora": 2e-3, "row": 3e-2}
OLD_PER_CLASS, NEW = 50, 200
GARMENTS, FITTED = 600, 6000  # garments of each class that are seen again; garments that the linear judge sees
ROW = "network.y_embedder.embedding_table.weight"


# ------------------------------------------------------------------ the judge of eleven classes


class Head(NamedTuple):
    """A linear judge on the features of the judge of garments, and what it recognises of other real images."""

    layer: nn.Linear
    hats: float
    garments: float


@cache
def judge() -> Head:
    """The judge of eleven classes; the same numbers at every call."""
    train, test = fashion_cnn.garments("train"), fashion_cnn.garments("test")
    hats = both_ways(cnn.scaled(small_sets.hats("train")))
    x = fashion_cnn.features(torch.cat([train.images[:FITTED], hats]))
    y = torch.cat([train.labels[:FITTED], torch.full((len(hats),), HAT)])
    layer = fitted(x, y, HAT + 1)
    found = [layer(fashion_cnn.features(images)).argmax(1) for images in (other_hats(), test.images)]
    return Head(layer, share(found[0] == HAT), share(found[1] == test.labels))


def fitted(x: Tensor, y: Tensor, classes: int, steps: int = 100, decay: float = 1e-3) -> nn.Linear:
    """Logistic regression of labels ``y`` (N,) on features ``x`` (N, D), every class weighing the same."""
    layer = nn.Linear(x.shape[1], classes)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    weight = len(y) / (classes * y.bincount(minlength=classes).clamp(min=1).float())
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(x), y, weight) + decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return layer.requires_grad_(False)


def other_hats() -> Tensor:
    """The 37 hats that nothing was trained on, (N, 1, 28, 28) in [-1, 1]."""
    return cnn.scaled(small_sets.hats("test"))


def both_ways(images: Tensor) -> Tensor:
    """Images (N, ...) and their mirror images."""
    return torch.cat([images, images.flip(-1)])


def share(right: Tensor) -> float:
    return right.double().mean().item()


# ------------------------------------------------------------------ training


class Mixed(Sampler[list[int]]):
    """Places for a batch: some of the first ``new`` items, the rest of the ``old`` ones after them.

    Args:
        new: number of items of the new class.
        old: number of items after those; 0: the new ones alone.
        batches: number of batches.
    """

    def __init__(self, new: int, old: int, batches: int) -> None:
        self.new, self.old, self.batches = new, old, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(SEED)
        count = HATS_IN_BATCH if self.old else BATCH
        for _ in range(self.batches):
            new = torch.randint(self.new, (count,), generator=generator)
            old = self.new + torch.randint(max(self.old, 1), (BATCH - count,), generator=generator)
            yield [*new.tolist(), *old.tolist()]


def items_of(codec: Any) -> tuple[list[dict[str, Tensor]], int]:
    """Latents of hats, both ways, then of 600 garments of each class; and the number of hats."""
    hats = both_ways(cnn.scaled(small_sets.hats("train")))
    train = fashion_cnn.garments("train")
    first = torch.cat([(train.labels == label).nonzero()[:GARMENTS, 0] for label in range(HAT)])
    images = torch.cat([hats, train.images[first]])
    labels = torch.cat([torch.full((len(hats),), HAT), train.labels[first]])
    return latents(codec, images, labels), len(hats)


def model_of(name: str, steps: int) -> Any:
    """The base model with a row for hats, ready for a method."""
    options = {
        "optimizer": {  # decay would move rows that have no gradient
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": RATES[name], "betas": [0.9, 0.99], "weight_decay": 0.0},
        },
        "lr_scheduler.total_steps": steps,
        "lr_scheduler.warmup_steps": steps // 10,
    }
    model = from_pretrained(BASE, num_classes=HAT + 1, resize=True, **options)
    if name == "lora":
        add_lora(model, RANK, train=[ROW], seed=SEED)
        only_row(model)
    if name == "row":
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key == ROW)
        only_row(model)
    return model


def only_row(model: Any) -> None:
    """From now on the row of hats alone has a gradient in the table of classes."""
    table = dict(model.named_parameters())[ROW]
    mask = torch.zeros_like(table)
    mask[HAT] = 1
    table.register_hook(lambda gradient: gradient * mask)


# ------------------------------------------------------------------ scores


def run(name: str, folder: Path, items: tuple[Sequence[Mapping[str, Tensor]], int], steps: int) -> dict[str, Any]:
    """Train, sample, score and draw one method; read from its folder where it is there already."""
    file = folder / "figures.json"
    if file.is_file():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if name == "before":
        model, cost = from_pretrained(BASE), {}
    else:
        model, (latent, new) = model_of(name, steps), items
        old = len(latent) - new if name in ("replay", "lora") else 0
        loader = DataLoader(latent, batch_sampler=Mixed(new, old, steps))  # type: ignore[arg-type]
        cost = fit(model, loader, steps)._asdict()
        cost["trained_parameters"] = trained(model, name)
    figures = {"method": name, **cost, **scores(model.eval(), folder, new=name != "before")}
    common.finish(figures, [], file)
    return figures


def trained(model: Any, name: str) -> int:
    """Number of entries that a training can change."""
    table = dict(model.named_parameters())[ROW]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return count - (table.numel() - table.shape[1] if name in ("row", "lora") else 0)


def scores(model: Any, folder: Path, *, new: bool) -> dict[str, Any]:
    """Accuracies on old and new classes, copies among the hats, and pictures in a folder."""
    drawn = draw(model, torch.arange(HAT).repeat(OLD_PER_CLASS), SEED, {})
    garments = fashion_cnn.as_stored(drawn.images)
    found = {
        "garments_accuracy": fashion_cnn.judge(garments, drawn.labels).accuracy,
        "garments_accuracy[11 classes]": share(
            judge().layer(fashion_cnn.features(garments)).argmax(1) == drawn.labels
        ),
        "sampling": setting(model, drawn, {}, SEED),
    }  # fmt: skip
    if not new:
        return found
    hats = fashion_cnn.as_stored(draw(model, torch.full((NEW,), HAT), SEED + 1, {}).images)
    train, others = cnn.scaled(small_sets.hats("train")), other_hats()
    near = [nearest_pixels(x, both_ways(train)).median().item() for x in (hats, others)]
    write_png(contact_sheet([to_image(x) for x in [*garments[:40], *hats[:60]]], 10), folder / "samples.png")
    return found | {
        "hats_accuracy": share(judge().layer(fashion_cnn.features(hats)).argmax(1) == HAT),
        "hats": NEW,
        "nearest_training_hat": {"samples": near[0], "other_hats": near[1], "ratio": near[0] / near[1]},
    }


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each method."""
    rows = []
    for name, row in figures.items():
        near = row.get("nearest_training_hat", {}).get("ratio")
        rows.append([
            name, f"{row['hats_accuracy']:.3f}" if "hats_accuracy" in row else "", f"{row['garments_accuracy']:.3f}",
            "" if near is None else f"{near:.3f}", f"{row['trained_parameters']:,}" if near else "",
        ])  # fmt: skip
    return common.table(["method", "hats", "garments", "nearest ratio of hats", "trained parameters"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, help="folder that keeps each method's pictures and figures")
    parser.add_argument("--methods", default=",".join(RATES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = judge()  # before any sample is drawn
    items = items_of(from_pretrained(BASE).codec)
    names = ["before", *args.methods.split(",")]
    figures = {name: run(name, args.out / name, items, args.steps) for name in names}
    own = f"{head.hats:.3f} of 37 other hats, {head.garments:.4f} of 10,000 test garments"
    common.show(f"{table(figures)}\n\nThe judge of eleven classes recognises {own}.")
    values = {"judge": {"hats": head.hats, "garments": head.garments}, "methods": figures}
    common.finish({"base": BASE, **values}, [], args.json)


if __name__ == "__main__":
    main()
