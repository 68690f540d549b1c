"""``lightning-flows encode``: codec, text encoder and data of a recipe make a folder of latents, no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

import lightning_flows.codecs
import lightning_flows.data  # noqa: F401  (imported classes have short names)
from lightning_flows.callbacks.progress import sampling_progress
from lightning_flows.cli import runs
from lightning_flows.codecs import Codec, TextEncoder
from lightning_flows.data import FlowDataModule, LatentFormat, LatentWriter
from lightning_flows.data.base import SPLITS


def encode(args: Sequence[str]) -> str:
    """The verb.

    Args:
        args: those after the verb.

    Returns:
        What was written, in one line.

    Raises:
        ValueError: a recipe without codec or data, no such split, or a folder with other latents.
    """
    options = _parse(args)
    data: FlowDataModule = options.data
    data.prepare_data()
    splits = _splits(options.splits, data)
    kept = LatentFormat(options.dtype, options.flip, options.mean_only, options.shard_size, options.format)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    codec = options.model.init_args.codec
    text = _kept_text(options)
    writer = LatentWriter(codec, data, options.out, kept, text=text, batch_size=options.batch_size, device=device)
    done = [_encode_split(writer, split) for split in splits]
    text = f"{options.out}: {', '.join(done)}"
    sys.stdout.write(f"{text}\n")
    return text


def _kept_text(options: Namespace) -> TextEncoder | None:
    """The text encoder whose tokens are kept: a frozen one; those of another would be old after a step."""
    text = options.model.init_args.get("text")
    return text if text is not None and text.frozen else None


def _encode_split(writer: LatentWriter, split: str) -> str:
    with sampling_progress(1, f"encoding {split}") as report:
        written = writer.write(split, report)
    record = writer.index["splits"][split]
    return f"{record['count']} {split} items in {len(record['shards'])} shards ({written} written now)"


def _splits(given: str | None, data: FlowDataModule) -> list[str]:
    if given is None:
        return [split for split in SPLITS if data.has(split)]
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in SPLITS]:
        raise ValueError(f"--splits must be some of {','.join(SPLITS)}, got {','.join(unknown)}")
    return names


# ---- the command line


def _parse(args: Sequence[str]) -> Namespace:
    """The options, with codec, text encoder and data of the recipe as objects."""
    args, parser = runs.spelled_out(args), _parser()
    for place in runs.recipes_of(args):
        args[place] = _encoders_and_data(runs.find_recipe(args[place]))
    return parser.instantiate(parser.parse_args(args))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lightning-flows encode", description=__doc__)
    add = parser.add_argument
    add("-c", "--config", action="config", help="Recipe; its model's codec and text encoder and its data are read.")
    add("--out", type=str, required=True, help="Folder of the latents; an interrupted encoding in it is completed.")
    add("--splits", type=str | None, default=None, help="Some of train,val,test; all that the data has by default.")
    add("--dtype", type=Literal["float16", "bfloat16", "float32"], default="float16", help="Of what is kept.")
    add("--flip", action="store_true", help="Keep the latents of the mirrored images too.")
    add("--mean_only", action="store_true", help="Leave out the deviations of the posterior.")
    add("--batch_size", type=int | None, default=None, help="Images encoded at a time; that of the data by default.")
    add("--shard_size", type=int, default=4096, help="Items in a shard.")
    add("--format", type=Literal["safetensors", "npy"], default="safetensors", help="Of the shards.")
    add("--device", type=str | None, default=None, help="Where to encode: cuda where there is one, else cpu.")
    parser.add_subclass_arguments(Codec, "model.init_args.codec", required=True)
    parser.add_subclass_arguments(TextEncoder, "model.init_args.text", required=False)
    parser.add_subclass_arguments(FlowDataModule, "data", required=True)
    return parser


def _encoders_and_data(recipe: Path) -> str:
    """Text of a recipe with everything else left out.

    Raises:
        ValueError: it is not YAML, or there is no codec.
    """
    places = ("model", "model.init_args.codec", "model.init_args.text", "data")
    model, codec, text, data = runs.blocks_of(recipe, places).values()
    if model is not None and codec is None:
        raise ValueError(f"{recipe}: the model has no codec, it works on the data itself: there is nothing to encode")
    encoders = {name: block for name, block in (("codec", codec), ("text", text)) if block}
    blocks = {"model": {"init_args": encoders} if encoders else None, "data": data}
    return yaml.safe_dump({name: block for name, block in blocks.items() if block}, sort_keys=False)
