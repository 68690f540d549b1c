"""``lightning-flows statistics``: what a test needs to know of the real images, in one file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_flows.data
import lightning_flows.metrics  # noqa: F401  (imported classes have short names)
from lightning_flows.callbacks.progress import sampling_progress
from lightning_flows.cli import runs
from lightning_flows.cli.evaluation import usual_extractor
from lightning_flows.data import FlowDataModule, KeyedItems
from lightning_flows.data.keyed import Collate
from lightning_flows.flow.noise import generator_of
from lightning_flows.metrics import Extractor
from lightning_flows.metrics.collect import collect
from lightning_flows.metrics.reference import save_references
from lightning_flows.store import config_of

READ = ("data", "extractor")  # blocks of a recipe


def statistics(args: Sequence[str]) -> str:
    """The verb.

    Args:
        args: those after the verb.

    Returns:
        What was written, in one line.

    Raises:
        ValueError: a recipe without data, no such split, or data without images.
    """
    options = _parse(args)
    data: FlowDataModule = options.data
    data.prepare_data()
    items = chosen(data, options.split, options.n)
    extractor: Extractor = options.extractor or usual_extractor(data)
    seen = hashlib.sha256()
    with sampling_progress(len(items), f"{options.split} images") as report:
        batches = _images(items, options.batch_size or data.batch_size, data.num_workers, seen, report)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        parts = collect(batches, extractor, features=options.features, device=device)
    about = {"data": describe(data), "split": options.split, "sha256": seen.hexdigest()}
    versions = {name: version(name) for name in ("lightning-flows", "torch")}
    save_references(options.out, parts, **about, **versions)
    names = " and ".join(each.name for each, _ in parts)
    text = f"{options.out}: {len(items)} {options.split} images in {names}"
    sys.stdout.write(f"{text}\n")
    return text


def chosen(data: FlowDataModule, split: str, n: int | None = None) -> Dataset:
    """The items of a split with the transforms of evaluation: no flip, no random crop.

    Args:
        data: the data module.
        split: ``"train"``, ``"val"`` or ``"test"``.
        n: so many of them, chosen at random (folders lie in the order of their classes) but always the same.

    Raises:
        ValueError: no such split, or it has fewer than ``n`` items.
    """
    items = KeyedItems(data.dataset(split).items, data.transforms["val"])
    if n is None:
        return items
    if not 2 <= n <= len(items):
        raise ValueError(f"--n must lie in 2..{len(items)}, the items of the {split!r} split, got {n}")
    order = torch.randperm(len(items), generator=generator_of("statistics"))
    return Subset(items, order[:n].sort().values.tolist())


def _images(items: Any, batch_size: int, num_workers: int, seen: Any, report: Any) -> Iterator[Tensor]:
    """Batches (B, C, H, W) in order; their bytes go into a hash."""
    done = 0
    options = {"num_workers": num_workers, "collate_fn": Collate(), "generator": generator_of(0)}
    for batch in DataLoader(items, batch_size, **options):
        if "image" not in batch:
            raise ValueError(f"the data give {sorted(batch)} and no 'image': name the recipe of the images themselves")
        seen.update(batch["image"].contiguous().numpy().tobytes())
        yield batch["image"]
        done += len(batch["image"])
        report(done, len(items))


def describe(data: FlowDataModule) -> str:
    """The data module's config as JSON; of absolute paths the last name alone, since files travel."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, list):
            return [short(item) for item in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return json.dumps(short(config_of(data)), sort_keys=True)


# ---- the command line


def _parse(args: Sequence[str]) -> Namespace:
    args, parser = runs.spelled_out(args), _parser()
    for place in runs.recipes_of(args):
        args[place] = _blocks(runs.find_recipe(args[place]))
    return parser.instantiate(parser.parse_args(args))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lightning-flows statistics", description=__doc__)
    add = parser.add_argument
    add("-c", "--config", action="config", help="Recipe; its data is read.")
    add("--out", type=str, required=True, help="File to write, .safetensors; test reads it as --reference.")
    add("--split", type=Literal["train", "val", "test"], default="train", help="Which images.")
    add("--n", type=int | None, default=None, help="So many of them, chosen at random but always the same.")
    add("--extractor", type=Extractor | None, default=None, help="Pixels, Inception, Timm, ... as for test.")
    add("--features", action="store_true", help="Keep every image's features too: for kid, precision, recall, ...")
    add("--batch_size", type=int | None, default=None, help="Images at a time; that of the data by default.")
    add("--device", type=str | None, default=None, help="Where the extractor runs: cuda where there is one, else cpu.")
    parser.add_subclass_arguments(FlowDataModule, "data", required=True)
    return parser


def _blocks(recipe: Path) -> str:
    """Text of a recipe with everything else left out."""
    blocks = runs.blocks_of(recipe, READ)
    return yaml.safe_dump({name: block for name, block in blocks.items() if block is not None}, sort_keys=False)
