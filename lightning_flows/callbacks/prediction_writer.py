"""Predictions to files: one per request, named by the request's id, plus a contact sheet or a table of all."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from lightning_flows.callbacks.pictures import contact_sheet, to_image, write_png
from lightning_flows.codecs import LabelMap
from lightning_flows.store.weights import whole_file

TABLE = "predictions"  # name of the file of all dictionaries


@singledispatch
def write_sample(sample: Any, stem: Path) -> Path:
    """Write one sample to `stem` plus the suffix of its kind and return the file.

    Other kinds of samples (meshes, clips) register their own function: `write_sample.register(Kind)`.

    Args:
        sample: what `predict_step` returned for one request.
        stem: path without suffix.

    Raises:
        ValueError: nothing is registered for this kind, or the sample is no picture of finite numbers.
    """
    known = sorted(kind.__name__ for kind in write_sample.registry if kind is not object)
    raise ValueError(f"sample must be one of {known}, got {type(sample).__name__} for {stem.name!r}.")


@write_sample.register
def _(sample: Tensor, stem: Path) -> Path:
    if not torch.isfinite(sample).all():
        raise ValueError(f"sample {stem.name!r} must be finite, got NaN or infinity in {tuple(sample.shape)}.")
    return write_png(to_image(sample), stem.parent / f"{stem.name}.png")


@write_sample.register
def _(sample: dict, stem: Path) -> Path:
    try:
        text = json.dumps(sample, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample {stem.name!r} must be of JSON values and finite numbers: {error}.") from None
    return _write_text(text, stem.parent / f"{stem.name}.json")


@write_sample.register
def _(sample: LabelMap, stem: Path) -> Path:
    ids = sample.labels
    if ids.ndim != 2 or ids.is_floating_point() or not bool(((ids >= 0) & (ids < 256)).all()):
        raise ValueError(f"mask {stem.name!r} must hold ids (H, W) of 0..255, got {ids.dtype} of {tuple(ids.shape)}.")
    image = Image.fromarray(ids.to(torch.uint8).cpu().numpy(), mode="P")
    image.putpalette(sample.palette())
    return write_png(image, stem.parent / f"{stem.name}.png")


class PredictionWriter(BasePredictionWriter):
    """Writes each sample as soon as its batch is done, and `grid.png` or `predictions.json` when all ranks are.

    Expects of `predict_step` a mapping with `id` (list of str) and `sample` (tensor (B, C, H, W) in [-1,
    1], or a sequence of anything that `write_sample` knows; dictionaries become JSON, and a `codecs.LabelMap`
    a PNG with a palette, whose pixels are class ids). Names come from the ids alone, so one process and many
    write the same files. Files of an earlier run in the same folder are overwritten where the id is the same
    and otherwise left; the contact sheet shows this run only, in the order of ids (numbers inside ids count as
    numbers), and so does the table `predictions.json`, which holds every dictionary by its id.

    Args:
        folder: where to write; a relative path lies under `trainer.default_root_dir`.
        grid: also write `grid.png`.

    Raises:
        ValueError: an id that is no plain file name, an id that occurs twice (on any rank), or a prediction
        without
            ids or of the wrong length.
    """

    def __init__(self, folder: str = "predictions", *, grid: bool = True) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.grid = grid
        self._written: dict[str, str] = {}  # id -> file name

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the ids of an earlier run."""
        self._written = {}

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        for name, sample in _requests(prediction):
            self._check_id(name)
            self._written[name] = write_sample(sample, self._root(trainer) / name).name

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the ids of all ranks; compose the sheet on rank zero."""
        written = self._gather(trainer)
        if trainer.is_global_zero:
            names = sorted(written, key=_natural)
            self._write_table(self._root(trainer), {name: written[name] for name in names})
            if self.grid:
                self._write_grid(self._root(trainer), [written[name] for name in names])
        trainer.strategy.barrier("PredictionWriter")

    def _root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder

    def _check_id(self, name: str) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00.][^/\\\x00]*", name):
            raise ValueError(f"id must be a file name without slashes that does not start with a dot, got {name!r}.")
        if self.grid and name == "grid":
            raise ValueError("id must not be 'grid': grid.png is the contact sheet. Rename it or set grid=False.")
        if name == TABLE:
            raise ValueError(f"id must not be {TABLE!r}: {TABLE}.json is the table.")
        if name in self._written:
            raise ValueError(f"id must be unique within a run, got {name!r} twice.")

    def _gather(self, trainer: L.Trainer) -> dict[str, str]:
        if trainer.world_size == 1:
            return self._written
        parts: list[dict[str, str]] = [{} for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(parts, self._written)
        count = Counter(name for part in parts for name in part)
        if twice := sorted(name for name, times in count.items() if times > 1):
            raise ValueError(f"id must be unique within a run, got {twice} on several ranks.")
        return {name: file for part in parts for name, file in part.items()}

    def _write_table(self, root: Path, written: dict[str, str]) -> None:
        files = {name: root / file for name, file in written.items() if file.endswith(".json")}
        if files:
            records = {name: json.loads(file.read_text()) for name, file in files.items()}
            _write_text(json.dumps(records, indent=2), root / f"{TABLE}.json")

    def _write_grid(self, root: Path, written: list[str]) -> None:
        images = [_read(root / file) for file in written if file.endswith(".png")]
        if images:
            write_png(contact_sheet(images, math.ceil(math.sqrt(len(images)))), root / "grid.png")


def _write_text(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _requests(prediction: Any) -> list[tuple[str, Any]]:
    """Pairs of id and sample of one batch."""
    if not isinstance(prediction, dict) or not {"id", "sample"} <= prediction.keys():
        got = sorted(prediction) if isinstance(prediction, dict) else type(prediction).__name__
        raise ValueError(f"predict_step must return a dict with 'id' and 'sample', got {got}.")
    names, samples = prediction["id"], prediction["sample"]
    if len(names) != len(samples):
        raise ValueError(f"predict_step must return as many samples as ids, got {len(samples)} and {len(names)}.")
    return list(zip(names, samples, strict=True))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key in which the digits of a name count as a number: '2' before '10'."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB") if image.mode == "P" else image.copy()
