"""Encodes a data set once, into a folder that `CachedLatents` reads.

A folder holds ``index.json`` and shards of a fixed number of items. After each shard the index is replaced, so an
interrupted encoding goes on where it stopped: shards whose checksums are right are kept, others written anew. What is
kept of an image is the posterior of its latent in the units of z (after shift and scale), so that the draw of the
posterior, the flips and the order stay those of a run on the images. With a frozen text encoder the tokens of the
captions are kept beside them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_flows.codecs import Codec, TextEncoder
from lightning_flows.data.base import SPLITS, FlowDataModule
from lightning_flows.data.keyed import Collate, KeyedItems
from lightning_flows.data.latents import INDEX, LATENTS, MIRRORED, TOKENS, VERSION, damage, read_index
from lightning_flows.store import config_of, save_tensors, write_text
from lightning_flows.store.resolve import sha256
from lightning_flows.store.weights import whole_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Format = Literal["safetensors", "npy"]
Progress = Callable[[int, int], None]

# Arguments of a data module that say how it is loaded, not what its items are.
_LOADING = (
    "batch_size", "flip", "test_split", "coupling", "cache", "seed", "drop_last", "num_workers", "pin_memory",
    "persistent_workers", "index",
)  # fmt: skip


@dataclass(frozen=True)
class LatentFormat:
    """How latents are kept.

    Args:
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``, of latents and tokens; they are computed in float32
            whatever is kept.
        flip: also keep the latents of the mirrored images.
        mean_only: leave the deviations of the posterior out; training then always takes the means.
        shard_size: items in a shard.
        format: ``"safetensors"``, or ``"npy"``: one numpy file for each field of a shard (not for bfloat16).

    Raises:
        ValueError: an unknown dtype or format, or a shard without items.
    """

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    flip: bool = False
    mean_only: bool = False
    shard_size: int = 4096
    format: Format = "safetensors"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.format not in ("safetensors", "npy"):
            raise ValueError(f"format must be 'safetensors' or 'npy', got {self.format!r}")
        if self.format == "npy" and self.dtype == "bfloat16":
            raise ValueError("dtype='bfloat16' is unknown to numpy: take format='safetensors' or another dtype")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")


class LatentWriter:
    """Writes the latents of a data module's splits into one folder.

    Args:
        codec: encodes images on the device of its input.
        data: images with the transforms of evaluation: no random crop, no flip.
        folder: made if needed; one that holds latents is completed if they are of the same kind.
        kept: how the latents are kept.
        text: encodes the captions of the items; None keeps the captions alone.
        batch_size: images encoded at a time; that of the data module by default.
        device: where to encode.

    Raises:
        ValueError: the folder holds latents of another codec, text encoder, data or format (names what differs), a
            text encoder that is still trained, or data in aspect-ratio buckets.
    """

    def __init__(
        self,
        codec: Codec,
        data: FlowDataModule,
        folder: str | Path,
        kept: LatentFormat | None = None,
        *,
        text: TextEncoder | None = None,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if text is not None and not text.frozen:
            raise ValueError(f"text must be a frozen encoder: the tokens of a {type(text).__name__} change in training")
        self.text = text
        self.codec, self.data, self.folder, self.kept = codec, data, Path(folder), kept or LatentFormat()
        self.batch_size, self.device = batch_size or data.batch_size, torch.device(device)
        if data.buckets is not None:
            raise ValueError(f"buckets={data.buckets} cannot be encoded: latents of one folder have one shape")
        if data.transforms["train"].crop == "random":
            rank_zero_warn("crop='random' cannot be kept: the images are cropped in the centre before they are encoded")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = self._index()

    def write(self, split: str, progress: Progress | None = None) -> int:
        """Encode what the folder lacks of a split.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            progress: called with (items done, items of the split).

        Returns:
            The number of shards that were written; those that were there and are whole stay.

        Raises:
            ValueError: no such split, other items than those of an earlier call, or latents beyond the dtype.
        """
        items = KeyedItems(self.data.dataset(split).items, self.data.transforms["val"])
        record = self.index["splits"].setdefault(split, {"count": len(items), "shards": []})
        if record["count"] != len(items):
            raise ValueError(f"{self.folder} was made for {record['count']} {split} items, the data has {len(items)}")
        size, shards, written = self.kept.shard_size, record["shards"], 0
        for number, start in enumerate(range(0, len(items), size)):
            stop = min(start + size, len(items))
            if number >= len(shards) or damage(self.folder, shards[number], checksums=True):
                shards[number : number + 1] = [self._shard(items, split, number, range(start, stop), progress)]
                self._save()
                written += 1
            if progress is not None:
                progress(stop, len(items))
        return written

    # ---- the index

    def _index(self) -> dict[str, Any]:
        """That of the folder, or a new one."""
        head = self._head()
        if not (self.folder / INDEX).exists():
            return {**head, "statistics": None, "splits": {}}
        index = read_index(self.folder)
        for name, value in head.items():
            if index.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds latents with another {name}: {json.dumps(index.get(name))} "
                    f"instead of {json.dumps(value)}; name another folder"
                )
        return index

    def _head(self) -> dict[str, Any]:
        shape = tuple(self.data.shape)
        return {
            "version": VERSION,
            "codec": config_of(self.codec),
            "text": None if self.text is None else config_of(self.text),
            "data": _description(self.data),
            "image_shape": list(shape),
            "latent_shape": list(self.codec.latent_shape(shape)),
            "dtype": self.kept.dtype,
            "flip": self.kept.flip,
            "mean_only": self.kept.mean_only,
            "shard_size": self.kept.shard_size,
            "format": self.kept.format,
            "classes": None if self.data.classes is None else list(self.data.classes),
            "levels": self.data.levels,
        }

    def _save(self) -> None:
        splits = self.index["splits"]
        shards = next((splits[name]["shards"] for name in SPLITS if name in splits), [])
        self.index["statistics"] = statistics_of(shards)
        write_text(self.folder / INDEX, json.dumps(self.index, indent=1) + "\n")

    # ---- one shard

    @torch.no_grad()
    def _shard(
        self, items: Dataset, split: str, number: int, places: range, progress: Progress | None
    ) -> dict[str, Any]:
        """Encode and write some items; their entry in the index."""
        fields: dict[str, list[Any]] = {}
        moments, done = Moments(self.index["latent_shape"][0]), places.start
        for batch in self._batches(items, places):
            for name, values in {**self._encoded(batch, moments), **self._texts(batch), **_others(batch)}.items():
                fields.setdefault(name, []).extend(values)
            done += len(batch["index"])
            if progress is not None:
                progress(done, len(items))  # type: ignore[arg-type]
        stem = f"{split}-{number:05d}"
        for partial in self.folder.glob(f".{stem}.*.tmp"):  # of a process that was killed while it wrote
            partial.unlink()
        files = self._write(stem, {name: _joined(name, values) for name, values in fields.items()})
        checks = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
        return {"count": len(places), "files": checks, "moments": moments.as_lists()}

    def _batches(self, items: Dataset, places: range) -> Iterator[dict[str, Any]]:
        workers = self.data.num_workers
        loader = DataLoader(
            Subset(items, places),
            self.batch_size,
            num_workers=workers,
            collate_fn=Collate(),
            generator=torch.Generator(),  # else each iteration draws from the global stream
        )
        yield from loader

    def _encoded(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        """Latents of a batch as they are kept, and those of the mirrored images."""
        if "image" not in batch:
            raise ValueError(f"{type(self.data).__name__} gives no 'image' to encode, only {sorted(batch)}")
        image, encoded = batch["image"].to(self.device), {}
        for end, x in [("", image), (MIRRORED, image.flip(-1))][: 1 + self.kept.flip]:
            mean, std = self.codec.posterior(x)
            moments.add(mean, None if self.kept.mean_only else std)
            for name, values in zip(LATENTS, (mean, None if self.kept.mean_only else std), strict=True):
                if values is not None:
                    encoded[name + end] = self._cast(values, batch)
        return encoded

    def _texts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tokens of the captions of a batch as they are kept, and their mask."""
        if self.text is None:
            return {}
        if "caption" not in batch:
            raise ValueError(f"{type(self.data).__name__} gives no 'caption' to encode, only {sorted(batch)}")
        values, mask = self.text.encode(batch["caption"], device=self.device, **self.text.facts_of(batch))
        return dict(zip(TOKENS, (self._cast(values, batch, "text embedding"), mask.cpu()), strict=True))

    def _cast(self, values: Tensor, batch: Mapping[str, Any], what: str = "latent") -> Tensor:
        cast = values.to("cpu", DTYPES[self.kept.dtype])
        finite = cast.flatten(1).isfinite().all(1)
        if not finite.all():
            item = int(batch["index"][~finite][0])
            raise ValueError(f"the {what} of item {item} is not finite in dtype={self.kept.dtype!r}")
        return cast

    def _write(self, stem: str, fields: Mapping[str, Any]) -> list[Path]:
        tensors = {name: values for name, values in fields.items() if isinstance(values, Tensor)}
        texts = {name: values for name, values in fields.items() if name not in tensors}
        files = []
        if self.kept.format == "npy":
            files = [_save_array(self.folder / f"{stem}.{name}.npy", values) for name, values in tensors.items()]
        else:
            files = [self.folder / f"{stem}.safetensors"]
            save_tensors(files[0], tensors)
        if texts:
            files.append(self.folder / f"{stem}.json")
            write_text(files[-1], json.dumps(texts))
        return files


def _description(data: FlowDataModule) -> dict[str, Any]:
    """Config of a data module: the arguments that change its items, where they are not the defaults of the base."""
    config, base = config_of(data), inspect.signature(FlowDataModule.__init__).parameters
    usual = {name: parameter.default for name, parameter in base.items()}
    chosen = {
        name: value
        for name, value in config["init_args"].items()
        if name not in _LOADING and not (name in usual and value == usual[name])
    }
    return {**config, "init_args": chosen}


class Moments:
    """Sums over latents z ~ N(mean, std^2), by channel, in float64.

    Args:
        channels: C of the latents.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.sums = 0, torch.zeros(2, channels, dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor | None) -> None:
        """Take in a batch, each (B, C, h, w): E z = mean, E z^2 = mean^2 + std^2."""
        first = mean.double()
        second = first.square() if std is None else first.square() + std.double().square()
        self.count += mean[:, 0].numel()
        self.sums += torch.stack([first.sum((0, 2, 3)), second.sum((0, 2, 3))]).cpu()

    def as_lists(self) -> dict[str, Any]:
        """JSON values."""
        return {"count": self.count, "sum": self.sums[0].tolist(), "square": self.sums[1].tolist()}


def statistics_of(shards: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | None:
    """Mean and deviation of each channel of z over shards, mirrored copies included; None without a shard."""
    if not shards:
        return None
    count = sum(shard["moments"]["count"] for shard in shards)
    first, second = (np.sum([shard["moments"][name] for shard in shards], axis=0) / count for name in ("sum", "square"))
    return {"mean": first.tolist(), "std": np.sqrt(np.maximum(second - first**2, 0)).tolist()}


def _others(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What comes with the images and is the same in every epoch."""
    return {name: values for name, values in batch.items() if name not in ("image", "index", "epoch")}


def _joined(name: str, values: Sequence[Any]) -> Any:
    """One tensor (n, ...) of the rows; masks, whose ids are small, in as few bytes as hold them."""
    if not isinstance(values[0], Tensor):
        return list(values)
    joined = torch.stack(list(values))
    return joined.to(torch.uint8) if name == "mask" and joined.max() < 256 else joined


def _save_array(file: Path, values: Tensor) -> Path:
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, values.numpy())
    return file
