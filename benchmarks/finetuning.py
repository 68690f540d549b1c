"""LoRA against full finetuning, and both against training from nothing: garments to hand signs.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.finetuning runs/finetuning [--methods full,lora-8] [--json FILE]

`lfm-fashion-mnist` learns 1,862 hand signs (`benchmarks.small_sets`) in 500 steps of 64, whatever the method:
AdamW, 50 steps of warm-up, then a cosine, EMA, clipping at 1, the same order of images and the same noise. Its table
of ten classes starts afresh. Images are encoded once, so a step costs the network alone. Each method is kept in a
folder (its weights, its samples, `figures.json`); a folder that is complete is not made again.

Scored: 1,000 samples, 100 of each digit, one seed, the model's own guidance and solver.

- accuracy of the judge (`benchmarks.judges.sign_cnn`), beside its own on 200 held-out photos;
- Frechet ratio in the judge's features. There are 2,062 photos in all, so they are halved at random five times: the
  distance of the samples to one half (1,031), over that of 1,000 photos of the other half to it. 1 is as near as
  real photos come. The row "autoencoder" has reconstructions of those 1,000 photos in the place of samples: the codec
  is frozen, so no method can be expected to come nearer;
- distance to the nearest training image in pixels over that of the held-out photos (far below 1: copies).

``--probe`` prints the training loss after 100 steps for several learning rates instead; the rates of `METHODS` were
chosen so, before any sample was drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import common
from benchmarks.judges import sign_cnn
from benchmarks.zoo_fashion import copies
from benchmarks.zoo_scores import draw, frechet, nearest_pixels, setting
from lightning_flows import from_pretrained
from lightning_flows.callbacks import EMA
from lightning_flows.codecs import Codec
from lightning_flows.networks import add_lora, save_adapter
from lightning_flows.store import save_tensors

BASE, TABLE = "lfm-fashion-mnist", "network.y_embedder.*"
STEPS, WARMUP, BATCH, SEED = 500, 50, 64, 0
PER_CLASS, SPLITS = 100, 5
PROBED, RATES = 100, (3e-4, 1e-3, 3e-3, 1e-2)


class Method(NamedTuple):
    """A way to train: the learning rate, the rank of adapters (None: all weights), and whether nothing is kept."""

    lr: float
    rank: int | None = None
    fresh: bool = False


METHODS = {
    "full": Method(1e-3),
    "lora-2": Method(1e-2, rank=2),
    "lora-8": Method(1e-2, rank=8),
    "lora-32": Method(1e-2, rank=32),
    "scratch": Method(1e-3, fresh=True),
}


class Cost(NamedTuple):
    """What a training cost, and where its loss ended (mean of the last 100 steps)."""

    steps: int
    seconds_per_step: float
    cpu_seconds_per_step: float
    loss: float


# ------------------------------------------------------------------ training


def model_of(method: Method, steps: int) -> Any:
    """The base model, ready for a method; what starts afresh is drawn from a fixed seed."""
    options = {"optimizer.lr": method.lr, "lr_scheduler.total_steps": steps, "lr_scheduler.warmup_steps": WARMUP}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = from_pretrained(BASE, reinit=["*"] if method.fresh else [TABLE], **options)
    if method.rank is not None:
        add_lora(model, method.rank, train=[TABLE], seed=SEED)
    return model


@torch.no_grad()
def latents(codec: Codec, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """An item for each of ``images`` (N, 1, 28, 28): the posterior of its latent, and its label."""
    parts = [codec.posterior(rows) for rows in images.split(256)]
    mean, std = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return [{"latent": m, "latent_std": s, "label": y} for m, s, y in zip(mean, std, labels, strict=True)]


def loader_of(items: Sequence[Mapping[str, Tensor]], batch_size: int) -> DataLoader:
    """Shuffled batches, in the same order at every call."""
    shuffled = torch.Generator().manual_seed(SEED)
    return DataLoader(items, batch_size, shuffle=True, drop_last=True, generator=shuffled)  # type: ignore[arg-type]


class Losses(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(model: Any, loader: DataLoader, steps: int, last: int = 100) -> Cost:
    """Train a model for some steps; it then holds the averaged weights."""
    losses = Losses()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EMA(0.999), losses],
    )  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(model, loader)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(steps, wall / steps, cpu / steps, sum(losses.values[-last:]) / len(losses.values[-last:]))


def keep(model: Any, method: Method, folder: Path) -> dict[str, int]:
    """Save what a method has made; bytes of what a user would pass on, and the number of trained parameters."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if method.rank is None:
        file = model.save_pretrained(folder / "model") / "model.safetensors"
    else:
        file = save_adapter(model, folder / "adapter", base=BASE) / "adapter_model.safetensors"
    return {"trained_parameters": trained, "file_bytes": file.stat().st_size}


# ------------------------------------------------------------------ scores


class Reference(NamedTuple):
    """Real photos: those trained on, those held out, and pairs of halves of all of them."""

    train: Tensor
    held_out: Tensor
    halves: list[tuple[Tensor, Tensor]]
    floor: list[float]


def reference(train: Tensor, held_out: Tensor, count: int) -> Reference:
    """Real photos (N, 1, 28, 28) halved at random; the second of each pair has ``count`` of its half."""
    every, halves = torch.cat([train, held_out]), []
    for seed in range(SPLITS):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        middle = len(every) // 2
        halves.append((every[order[:middle]], every[order[middle:]][:count]))
    floor = [frechet(first, second, sign_cnn.extractor()) for first, second in halves]
    return Reference(train, held_out, halves, floor)


def ratio(samples: Sequence[Tensor], real: Reference) -> dict[str, float]:
    """Frechet ratio of one set of images for each pair of halves; the mean distance over the mean floor."""
    pairs = zip(samples, real.halves, strict=True)
    distances = [frechet(first, images, sign_cnn.extractor()) for images, (first, _) in pairs]
    distance, floor = sum(distances) / len(distances), sum(real.floor) / len(real.floor)
    return {"value": distance / floor, "distance": distance, "real_to_real": floor}


def scores(images: Tensor, labels: Tensor, real: Reference) -> dict[str, Any]:
    """Judge's accuracy, Frechet ratio and nearest training image of samples (N, 1, 28, 28)."""
    images = sign_cnn.as_stored(images)
    verdict = sign_cnn.judge(images, labels)
    near = copies(nearest_pixels(images, real.train), nearest_pixels(real.held_out, real.train))
    return {
        "judge_accuracy": verdict.accuracy,
        "judge_on_real": verdict.judge,
        "frechet_ratio": ratio([images] * len(real.halves), real),
        "nearest_training": near,
        "samples": len(images),
    }


@torch.no_grad()
def bound(codec: Codec, real: Reference, labels: Tensor) -> dict[str, Any]:
    """What the frozen autoencoder makes of real photos: reconstructions scored like samples; ``labels`` (held out)."""

    def again(images: Tensor) -> Tensor:
        return torch.cat([codec.decode(codec.encode(rows)) for rows in images.split(256)]).clamp(-1, 1)

    error = (again(real.train) - real.train).div(2).square().mean((1, 2, 3))
    verdict = sign_cnn.judge(again(real.held_out), labels)
    return {
        "psnr": (-10 * error.log10()).mean().item(),
        "judge_accuracy": verdict.accuracy,
        "judge_on_real": verdict.judge,
        "frechet_ratio": ratio([again(second) for _, second in real.halves], real),
    }


# ------------------------------------------------------------------ the table


def run(name: str, folder: Path, items: Sequence[Mapping[str, Tensor]], real: Reference, steps: int) -> dict[str, Any]:
    """Train, save, sample and score one method; its figures, read from the folder where they are there already."""
    file = folder / "figures.json"
    if file.is_file():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    method = METHODS[name]
    model = model_of(method, steps)
    cost = fit(model, loader_of(items, BATCH), steps)
    kept = keep(model, method, folder)
    drawn = draw(model.eval(), torch.arange(10).repeat(PER_CLASS), SEED, {})
    save_tensors(folder / "samples.safetensors", {"images": drawn.images, "labels": drawn.labels})
    figures = {
        **method._asdict(), **cost._asdict(), **kept, **scores(drawn.images, drawn.labels, real),
        "batch_size": BATCH, "training_images": len(items), "sampling": setting(model, drawn, {}, SEED),
    }  # fmt: skip
    common.finish(figures, [], file)
    return figures


def table(figures: Mapping[str, Mapping[str, Any]], limit: Mapping[str, Any]) -> str:
    """One line for each method, after those of real photos and of the autoencoder."""
    real, line = limit["judge_on_real"], limit["frechet_ratio"]
    rows = [
        ["real photos, held out", f"{real:.3f}", "1", "1", "", "", "", "", ""],
        ["autoencoder", f"{limit['judge_accuracy']:.3f}", f"{line['value']:.2f}", "", "", "", "", "", ""],
    ]
    for name, row in figures.items():
        rows.append([
            name, f"{row['judge_accuracy']:.3f}", f"{row['frechet_ratio']['value']:.2f}",
            f"{row['nearest_training']['ratio']:.3f}", f"{row['trained_parameters']:,}",
            f"{row['file_bytes'] / 1e6:.2f} MB", f"{row['lr']:g}", f"{row['cpu_seconds_per_step']:.3f}",
            f"{row['loss']:.4f}",
        ])  # fmt: skip
    head = ["method", "judge accuracy", "Frechet ratio", "nearest ratio", "trained parameters", "file", "lr",
            "CPU s/step", "loss"]  # fmt: skip
    return common.table(head, rows)


def probe(names: Sequence[str], items: Sequence[Mapping[str, Tensor]]) -> str:
    """Training loss of steps 51 to 100 by method and learning rate, on the schedule of the whole run."""
    rows = []
    for name in names:
        for lr in RATES:
            model = model_of(METHODS[name]._replace(lr=lr), STEPS)
            cost = fit(model, loader_of(items, BATCH), PROBED, last=PROBED // 2)
            rows.append([name, f"{lr:g}", f"{cost.loss:.4f}", f"{cost.seconds_per_step:.3f}"])
    return common.table(["method", "lr", "loss", "s/step"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, help="folder that keeps each method's weights, samples and figures")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", action="store_true", help="losses by learning rate instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sign_cnn.trained()  # before any sample is drawn
    train, held_out = sign_cnn.signs("train"), sign_cnn.signs("val")
    codec, names = from_pretrained(BASE).codec, args.methods.split(",")
    items = latents(codec, *train)
    if args.probe:
        common.show(probe(names, items))
        return
    real = reference(train.images, held_out.images, 10 * PER_CLASS)
    limit = bound(codec, real, held_out.labels)
    figures = {name: run(name, args.out / name, items, real, args.steps) for name in names}
    common.show(table(figures, limit))
    common.finish({"base": BASE, "autoencoder": limit, "methods": figures}, [], args.json)


if __name__ == "__main__":
    main()
