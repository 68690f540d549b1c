"""Plain classifiers and segmenters: the network of a SymmFlow recipe, taught one thing alone, for the same time.

The same U-Net reads the image (its other input channels are zero, its time stands at 1) and is trained by cross entropy
on what comes out at the places of the code: of a mask at every pixel, of a label averaged over the pixels. Data,
batches, precision, optimizer, warm-up and averaging are those of the recipe, and so is the form of its schedule, over
as many steps as the time allows.

    python -m benchmarks.plain_readers configs/symmflow/fashion_mnist.yaml --field label --seconds 600
    python -m benchmarks.plain_readers configs/symmflow/people.yaml --field mask --seconds 600
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.common import finish, parser, show, single_thread, table
from lightning_flows.callbacks import EMA
from lightning_flows.codecs import IGNORE
from lightning_flows.data import FlowDataModule
from lightning_flows.metrics import Calibration, LabelAccuracy, MeanIoU, PixelAccuracy
from lightning_flows.modules import SymmFlow, WarmupCosine
from lightning_flows.store import build


class Reader(nn.Module):
    """A SymmFlow's network as a reader of one field.

    Args:
        model: whose network is taken, freshly drawn.
        field: ``mask`` or ``label``.
    """

    def __init__(self, model: SymmFlow, field: str) -> None:
        super().__init__()
        self.network, self.field, self.channels = model.network, field, model.shape[0]
        span, count = model.semantic.layout[field], model.semantic.num_classes[field]
        if span.stop - span.start < count:
            raise ValueError(f"the code of {field!r} has {span.stop - span.start} planes, a reader needs {count}")
        self.planes = slice(self.channels + span.start, self.channels + span.start + count)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of images (B, C, H, W): (B, K, H, W) of masks, (B, K) of labels."""
        x = image.new_zeros(len(image), *self.network.shape)
        x[:, : self.channels] = image
        out = self.network(x, image.new_ones(len(image)))[:, self.planes].float()
        return out if self.field == "mask" else out.mean((2, 3))


def built(recipe: Path) -> tuple[SymmFlow, FlowDataModule, Any]:
    """Model, data and configuration of a recipe."""
    plain = OmegaConf.to_container(OmegaConf.load(recipe), resolve=True)
    return build(plain["model"], SymmFlow), build(plain["data"], FlowDataModule), plain


def train(reader: Reader, data: FlowDataModule, config: Any, seconds: float) -> tuple[nn.Module, int, float]:
    """The averaged reader after ``seconds`` of CPU time, its steps and the time that they took.

    The schedule needs the number of steps: it is foreseen from the pace of a copy.
    """
    total = max(40, int(seconds / pace(reader, data, config)))
    optimizer, settings = optimizer_of(reader, config), config["model"]["init_args"]["lr_scheduler"]["init_args"]
    schedule = WarmupCosine(optimizer, **{**settings, "total_steps": total})
    averaged, decay = copy.deepcopy(reader).requires_grad_(False), average_of(config)
    start = time.process_time()
    for done, batch in enumerate(islice(batches(data), total)):
        step(reader, optimizer, batch, config)
        schedule.step()
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), reader.parameters(), strict=True):
                mean.lerp_(now, 1 - decay(done))
    return averaged.eval(), total, time.process_time() - start


def step(reader: Reader, optimizer: torch.optim.Optimizer, batch: Any, config: Any) -> None:
    """One step by cross entropy, at the recipe's precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config["trainer"].get("precision") == "bf16-mixed"):
        logits = reader(batch["image"])
    optimizer.zero_grad()
    F.cross_entropy(logits, batch[reader.field], ignore_index=IGNORE).backward()
    nn.utils.clip_grad_norm_(reader.parameters(), config["trainer"].get("gradient_clip_val") or float("inf"))
    optimizer.step()


def pace(reader: Reader, data: FlowDataModule, config: Any) -> float:
    """CPU seconds of a step: the mean of 20 steps of a copy, after 5 to warm up."""
    trial = copy.deepcopy(reader)
    optimizer, start = optimizer_of(trial, config), time.process_time()
    for done, batch in enumerate(islice(batches(data), 25)):
        if done == 5:
            start = time.process_time()
        step(trial, optimizer, batch, config)
    return (time.process_time() - start) / 20


def batches(data: FlowDataModule) -> Iterator[Any]:
    """Training batches, epoch after epoch."""
    for epoch in count():
        loader = data.train_dataloader()
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader


def optimizer_of(reader: Reader, config: Any) -> torch.optim.Optimizer:
    """AdamW as in the recipe."""
    return torch.optim.AdamW(reader.parameters(), **config["model"]["init_args"]["optimizer"]["init_args"])


def average_of(config: Any) -> Callable[[int], float]:
    """Weight of the past at update n, as the recipe's `EMA` has it."""
    callbacks = config["trainer"]["callbacks"]
    found = next(entry for entry in callbacks if entry["class_path"].endswith(".EMA"))
    return EMA(**found.get("init_args", {})).decay_at


@torch.no_grad()
def test(reader: nn.Module, data: FlowDataModule, field: str, classes: int) -> dict[str, float]:
    """Scores on the test items."""
    metrics: dict[str, Any]
    if field == "mask":
        metrics = {"miou": MeanIoU(classes), "pixel_accuracy": PixelAccuracy(classes)}
    else:
        metrics = {"accuracy": LabelAccuracy(classes), "calibration": Calibration()}
    items = 0
    for batch in data.test_dataloader():
        scores = reader(batch["image"]).softmax(1)
        read = scores.argmax(1) if field == "mask" else scores
        for metric in metrics.values():
            metric.update(read, batch[field])
        items += len(read)
    values = {name: metric.compute() for name, metric in metrics.items()}
    found = {name: float(next(iter(v.values())) if isinstance(v, dict) else v) for name, v in values.items()}
    return {**found, "items": items}


def main() -> None:
    """Train a reader and print its scores."""
    options = parser(__doc__)
    options.add_argument("recipe", type=Path)
    options.add_argument("--field", choices=["mask", "label"], required=True)
    options.add_argument("--seconds", type=float, default=600.0, help="of CPU time, on one thread")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    model, data, config = built(args.recipe)
    data.prepare_data()
    data.setup("fit")
    reader, steps, seconds = train(Reader(model, args.field), data, config, args.seconds)
    data.setup("test")
    scores = test(reader, data, args.field, model.semantic.num_classes[args.field])
    figures = {
        "recipe": args.recipe.name,
        "field": args.field,
        "steps": steps,
        "cpu_seconds": round(seconds, 1),
        **scores,
    }
    show(table(list(figures), [[f"{v:.4f}" if isinstance(v, float) else v for v in figures.values()]]))
    finish(figures, [], args.json)


if __name__ == "__main__":
    single_thread()
    main()
