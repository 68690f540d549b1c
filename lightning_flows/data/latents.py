"""Latents that were encoded once, and are read many times in the place of images.

A folder of latents (``lightning-flows encode``, or `write_latents`) holds ``index.json`` and shards of the
posterior of every image: mean and deviation, of the mirrored image too where flips were asked for. Order and
flips are keyed as for images, so a run on a folder of float32 latents sees what a run on the images with the
same seeds sees, up to round-off, without an autoencoder in its training step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule
from lightning_flows.data.transforms import ImageTransform
from lightning_flows.flow.couplings import Coupling
from lightning_flows.store.resolve import sha256

INDEX = "index.json"
VERSION = 1
MIRRORED = "_mirrored"  # ends the names of what belongs to the mirrored image
LATENTS = ("latent", "latent_std")
TOKENS = ("tokens", "tokens_mask")


def read_index(folder: str | Path) -> dict[str, Any]:
    """What a folder of latents says of itself.

    Raises:
        FileNotFoundError: there is no ``index.json``.
        ValueError: it is not one of ours.
    """
    file = Path(folder) / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a folder of latents is made by lightning-flows encode")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise ValueError(f"{file} is no index of latents of version {VERSION}")
    return index


def damage(folder: Path, shard: Mapping[str, Any], checksums: bool) -> str | None:
    """What is wrong with the files of a shard; None where all is well.

    Args:
        folder: of the latents.
        shard: its entry in the index.
        checksums: read the files; else only their sizes are compared.
    """
    for name, expected in shard["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} does not exist"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{file} has {size} bytes instead of {expected['bytes']}"
        if checksums and (found := sha256(file)) != expected["sha256"]:
            return f"{file} has SHA-256 {found} instead of {expected['sha256']}"
    return None


class Shard:
    """The fields of some consecutive items, opened (memory-mapped) when the first of them is read.

    Args:
        folder: of the latents.
        entry: of the shard in the index.
        verify: compare the checksums at opening.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], verify: bool = False) -> None:
        self.folder, self.entry, self.verify = folder, entry, verify
        self._fields: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Name -> tensor (n, ...) or list of n texts.

        Raises:
            ValueError: a file is missing or not what was written; names it.
        """
        if self._fields is None:
            if reason := damage(self.folder, self.entry, self.verify):
                raise ValueError(f"a shard of latents is damaged: {reason}; run lightning-flows encode again")
            self._fields = {}
            for name in self.entry["files"]:
                self._fields |= _open(self.folder / name)
        return self._fields

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each data worker opens its own."""
        return {**self.__dict__, "_fields": None}


def _open(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    if file.suffix == ".npy":  # SPLIT-NUMBER.FIELD.npy
        return {file.stem.partition(".")[2]: torch.from_numpy(np.load(file, mmap_mode="c"))}
    with safetensors.safe_open(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)


class Row(NamedTuple):
    """The latents of one item, not read yet."""

    shard: Shard
    place: int

    def latents(self, mirror: bool) -> dict[str, Tensor]:
        """``latent`` and, where kept, ``latent_std``, float32, (c, h, w), of the image or the mirrored one."""
        end, fields = MIRRORED if mirror else "", self.shard.fields
        return {name: fields[name + end][self.place].float() for name in LATENTS if name + end in fields}


class LatentItems(Dataset):
    """The items of a split: ``row`` (see `Row`) and the fields that came with the image."""

    def __init__(self, folder: Path, entries: list[Mapping[str, Any]], verify: bool = False) -> None:
        self.shards = [Shard(folder, entry, verify) for entry in entries]
        self.ends = np.cumsum([entry["count"] for entry in entries])

    def __len__(self) -> int:
        """Number of items."""
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index``; nothing of its latents has been read."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        place = index - int(self.ends[number]) + shard.entry["count"]
        others = {name: _plain(values[place]) for name, values in shard.fields.items() if not name.startswith("latent")}
        return {"row": Row(shard, place), **others}


def _plain(value: Any) -> Any:
    """A number as the number that it was before it became a row of a tensor."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


@dataclass(frozen=True)
class LatentTransform(ImageTransform):
    """Reads the latents of an item, of its mirrored copy where `ImageTransform` would have mirrored the image."""

    def __call__(self, item: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The item with ``latent`` and, where kept, ``latent_std``, float32 (c, h, w); a mask is mirrored along.

        Tokens come as float32 (L, D), whatever they were kept in; captions are not mirrored.
        """
        _, _, mirror = self._draw(generator)
        row = item["row"]
        item = {name: value for name, value in item.items() if name != "row"} | row.latents(mirror)
        if "mask" in item:
            mask = item["mask"].long()
            item["mask"] = mask.flip(-1) if mirror else mask
        if "tokens" in item:
            item["tokens"] = item["tokens"].float()
        return item


class CachedLatents(FlowDataModule):
    """Latents of a folder that ``lightning-flows encode`` wrote, in the place of the images.

    Batches have the keys that those of the images had (label, caption, mask, index, epoch), with ``latent``
    (B, c, h, w), the mean of the posterior in the units of z, and ``latent_std`` in the place of ``image``. Where a
    frozen text encoder was at hand, ``tokens`` (B, L, D) and ``tokens_mask`` (B, L) stand beside each ``caption``.
    With float32 latents, the same ``seed`` and the same ``batch_size``, training sees the same items in the
    same order with the same flips as on the images.

    Args:
        folder: with ``index.json``.
        batch_size: items in a batch of one device.
        flip: mirror training items with probability 1/2; None does where the folder has mirrored copies.
        verify: compare the SHA-256 of a shard when it is first read (in each data worker); sizes always are.
        test_split: the split that ``test`` and ``predict`` read.
        coupling: pairs noise with the means in the data workers and adds it to training batches as ``source``.
        seed: of order, flips, noise and requests.
        drop_last: leave out training items that do not fill a global batch.
        num_workers: data workers of each loader.
        pin_memory: None pins where there is CUDA.
        persistent_workers: None keeps workers alive between epochs where there are any.

    Raises:
        FileNotFoundError: the folder holds no ``index.json``.
        ValueError: encoding was interrupted, a shard is damaged, or ``flip=True`` without mirrored copies.
    """

    def __init__(
        self,
        folder: str,
        *,
        batch_size: int = 64,
        flip: bool | None = None,
        verify: bool = False,
        test_split: Literal["train", "val", "test"] = "test",
        coupling: Coupling | None = None,
        seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            test_split=test_split,
            coupling=coupling,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
        )
        self.folder, self.flip, self.verify = Path(folder), flip, verify

    @cached_property
    def index(self) -> dict[str, Any]:
        """Content of ``index.json``."""
        return read_index(self.folder)

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        found = self.index["splits"].get(split)
        if found is None:
            return None
        if (done := sum(shard["count"] for shard in found["shards"])) != found["count"]:
            raise ValueError(
                f"{self.folder} holds {done} of the {found['count']} {split} items: encoding was interrupted, "
                "run the same lightning-flows encode again"
            )
        if self.flip and not self.index["flip"]:
            raise ValueError(f"flip=True, but {self.folder} has no mirrored copies: encode with --flip, or flip=False")
        mirror = self.index["flip"] if self.flip is None else self.flip
        self.transforms[split] = LatentTransform(flip=mirror and split == "train")
        return LatentItems(self.folder, found["shards"], self.verify)

    @property
    def codec(self) -> dict[str, Any]:
        """Config of the codec that encoded the images; a model with another one refuses to train on them."""
        return self.index["codec"]

    @property
    def text(self) -> dict[str, Any] | None:
        """Config of the text encoder of the tokens; a model with another one refuses them. None without tokens."""
        return self.index.get("text")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of a latent."""
        return tuple(self.index["latent_shape"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.index["image_shape"]
        return channels, height, width

    @property
    def levels(self) -> int | None:  # type: ignore[override]
        """Number of grey levels of the images' pixels; None where they are continuous."""
        return self.index["levels"]

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None where there are none."""
        return self.index["classes"]
