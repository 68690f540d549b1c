"""Makes a zoo entry of a finished run: weights, config, recipe, card, pictures, and outputs for the reload test.

python -m benchmarks.zoo_entry runs/lfm-digits zoo/lfm-digits --licence cc-by-4.0 --data NAME --summary "..."
python -m benchmarks.zoo_digits lfm-digits --metrics zoo/lfm-digits/metrics.json      # the figures
python -m benchmarks.zoo_entry runs/lfm-digits zoo/lfm-digits ...                     # the card, with them

A flow-matching model stores a velocity and samples. A normalizing flow stores the noise and the density of latents, how
the noise is turned back, and samples; one without Gaussian noise on its data (which is made for likelihoods: some of
its samples run away) stores real images in their place. The pictures show samples. An autoencoder (no ``sample``)
stores how ten real images are encoded and decoded, and its picture shows real images above their reconstructions. Make
the entry of an autoencoder before that of a latent model whose codec it is: the config names it by its id.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks import zoo_semantics
from benchmarks.zoo_flows import is_flow, noisy
from benchmarks.zoo_semantics import is_semantic
from lightning_flows import Condition, from_pretrained
from lightning_flows.callbacks.pictures import contact_sheet, to_image, write_png
from lightning_flows.cli.runs import newest_last
from lightning_flows.flow import SampleNoise, seeds_from
from lightning_flows.hub import check_folder, write_card
from lightning_flows.hub.export import RUN_CONFIG, export_run
from lightning_flows.modules.base import evaluation
from lightning_flows.networks import Sequential
from lightning_flows.store import build, read_config, save_tensors

OUTPUTS = "outputs.safetensors"
INPUTS = ("x", "t", "label", "mask")
STEPS, SEED = 4, 7
GUIDED = 2.0  # scale of the guided samples of a normalizing flow without a guidance of its own
ROWS = 8  # of the picture


def draws(model: Any) -> bool:
    """Whether a model draws samples; an autoencoder does not."""
    return hasattr(model, "sample")


def sees_images(model: Any) -> bool:
    """Whether the stored inputs are made of real images."""
    return not draws(model) or (is_flow(model) and not model.objective.data_noise.std)


# ------------------------------------------------------------------ outputs


@torch.no_grad()
def inputs_of(model: Any, classes: int | None, images: Tensor | None) -> dict[str, Tensor]:
    """Fixed inputs of `outputs_of`, of one row for each class (or of ten rows), or for each of ``images`` (N, C, H, W).

    The images for an autoencoder; latents and labels for a normalizing flow; else noise, times and labels.
    """
    if not draws(model):
        assert images is not None
        return {"x": images}
    if is_semantic(model):
        return zoo_semantics.inputs_of(model)
    count = classes or 10
    labels = {"label": torch.arange(count)} if classes else {}
    if is_flow(model):
        return {"x": _latents(model, _condition(labels), count, images)} | labels
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(count, *model.shape, generator=generator)
    return {"x": x, "t": torch.rand(count, generator=generator)} | labels


@torch.no_grad()
def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a reloaded entry must repeat."""
    if not draws(model):
        return _coded(model, inputs)
    if is_semantic(model):
        return zoo_semantics.outputs_of(model, inputs)
    return _flowed(model, inputs) if is_flow(model) else _moved(model, inputs)


def _coded(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an autoencoder: the posterior's means of its inputs, and what they decode to."""
    latent = model.encode(inputs["x"])
    return {"latent": latent, "reconstruction": model.decode(latent)}


def _moved(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of flow matching: a velocity, and samples of few midpoint steps without guidance."""
    condition = _condition(inputs)
    velocity = model.field(condition)(inputs["x"], inputs["t"])
    sample = model.sample(condition, n=len(inputs["x"]), seed=SEED, steps=STEPS, guidance=1.0)
    return {"velocity": velocity, "sample": sample}


def _flowed(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a normalizing flow: noise and density of latents, the way back, and samples where they do not run away."""
    x, condition = inputs["x"], _condition(inputs)
    with evaluation(model):
        z, log_det = model.network(x, condition)
        log_prob = model.latent_log_prob(x, condition) + model.latent_volume(x)
        inverse = model.draw(z, condition, guidance=1.0, method=Sequential()).x
    found = {"z": z, "log_det": log_det, "log_prob": log_prob, "inverse": inverse}
    return found if sees_images(model) else found | _samples(model, condition, len(x))


def _samples(model: Any, condition: Condition | None, count: int) -> dict[str, Tensor]:
    how: dict[str, Any] = {"n": count, "seed": SEED, "method": Sequential()}
    found = {"sample": model.sample(condition, guidance=1.0, **how)}
    if condition is not None:
        found["guided_sample"] = model.sample(condition, guidance=model.guidance or GUIDED, **how)
    return found


def _latents(model: Any, condition: Condition | None, count: int, images: Tensor | None) -> Tensor:
    """Latents for which the density is high: those of real images, or drawn ones, shape (count, C, H, W)."""
    if sees_images(model):
        assert images is not None
        return noisy(model, images[:count], "entry")
    with evaluation(model):
        z = model.prior(SampleNoise(seeds_from(SEED, count)), torch.empty(count, *model.shape))
        return model.draw(z, condition, guidance=1.0, method=Sequential()).x


def _condition(inputs: Mapping[str, Tensor]) -> Condition | None:
    return Condition(label=inputs["label"]) if "label" in inputs else None


# ------------------------------------------------------------------ pictures and figures


def picture(model: Any, classes: int | None, images: Tensor | None, columns: int = 10) -> list[Tensor]:
    """Images of the contact sheet, in rows of ``classes`` (or ``columns``): samples, or real over reconstructed."""
    if draws(model):
        count = classes or columns
        condition = Condition(label=torch.arange(count).repeat(ROWS)) if classes else None
        return list(model.sample(condition, n=count * ROWS, seed=0, batch_size=count))
    assert images is not None
    with torch.no_grad():
        found = model.decode(model.encode(images))
    rows = [part for pair in zip(images.split(columns), found.split(columns), strict=True) for part in pair]
    return list(torch.cat(rows))


def real_images(recipe: Path, count: int) -> Tensor:
    """The first images of the test split (or val, or train) of the data of a recipe, (count, C, H, W)."""
    entry = OmegaConf.to_container(OmegaConf.load(recipe), resolve=True)["data"]
    data = build(entry, LightningDataModule)
    split = next(name for name in ("test", "val", "train") if data.has(name))
    items = data.dataset(split)
    return torch.stack([items[i]["image"] for i in range(min(count, len(items)))])


def semantic_picture(recipe: Path, model: Any, photos: bool, count: int = 20) -> list[Tensor]:
    """See `zoo_semantics.picture`; of the first test items."""
    if "mask" not in model.semantic.keys:
        return zoo_semantics.picture(model, None)
    _, items = zoo_semantics.items_of(recipe, count)
    return zoo_semantics.picture(model, items if photos else {k: v for k, v in items.items() if k != "image"})


def merged(run: Path, out: Path) -> dict[str, Any]:
    """The judged figures of the entry, then those of the run's test: the first one stands in the table of the zoo."""
    files = (out / "metrics.json", run / "metrics.json")
    kept, tested = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    test = tested.get("test", kept.pop("test", None))
    return kept | ({"test": test} if test is not None else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--licence", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--summary", required=True)
    parser.add_argument("--command", help="shell command that gives the figures again")
    parser.add_argument("--classes", type=int, default=10, help="of a conditional model; 0: it takes no label")
    parser.add_argument("--photos", action="store_true", help="images of the data may stand in the picture")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics = merged(args.run, args.out)
    export_run(args.run, args.out, licence=args.licence, ckpt=newest_last(args.run), dtype=args.dtype)
    check_folder(args.out)  # a codec that names a folder of this machine is refused
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    model, classes = from_pretrained(args.out), args.classes or None
    images = real_images(args.run / RUN_CONFIG, 10 * ROWS // 2) if sees_images(model) else None
    inputs = inputs_of(model, classes, None if images is None else images[:10])
    save_tensors(args.out / OUTPUTS, {**inputs, **outputs_of(model, inputs)})
    columns = classes or 10 if draws(model) else 10
    made = (
        semantic_picture(args.run / RUN_CONFIG, model, args.photos)
        if is_semantic(model)
        else picture(model, classes, images)
    )
    pictures = [to_image(x) for x in made]
    write_png(contact_sheet(pictures, columns), args.out / "samples.png")
    write_card(
        args.out,
        read_config(args.out),
        metrics,
        licence=args.licence,
        summary=args.summary + "\n\n![samples](samples.png)",
        data=args.data,
        split=args.split,
        command=args.command,
        dtype=args.dtype,
    )


if __name__ == "__main__":
    main()
