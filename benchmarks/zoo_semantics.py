"""What zoo entries of SymmFlow store, and what their pictures show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf
from torch import Tensor

from lightning_flows import Condition
from lightning_flows.codecs import painted
from lightning_flows.flow import seeds_from
from lightning_flows.modules import SymmFlow
from lightning_flows.store import build

STEPS, SEED = 4, 7
LARGE = 50_000  # numbers of a state


def is_semantic(model: Any) -> bool:
    """Whether a model joins images and their semantics."""
    return isinstance(model, SymmFlow)


def blocks(count: int, classes: int, size: tuple[int, int]) -> Tensor:
    """Masks (count, H, W) of 4 x 4 blocks of all classes in turn, each mask beginning with another one."""
    rows, columns = (torch.arange(side) * 4 // side for side in size)
    return (torch.arange(count)[:, None, None] + 4 * rows[:, None] + columns) % classes


def fields_of(model: SymmFlow, count: int) -> dict[str, Tensor]:
    """``label`` (count,) and ``mask`` (count, H, W), those that a model reads; masks have the size of its planes."""
    classes, made = model.semantic.num_classes, {}
    if "label" in classes:
        made["label"] = torch.arange(count) % classes["label"]
    if "mask" in classes:
        made["mask"] = blocks(count, classes["mask"], tuple(model.shape[1:]))
    return made


def inputs_of(model: SymmFlow) -> dict[str, Tensor]:
    """Fixed inputs of `outputs_of`: joint states (four, or one that is large), times, and what is asked for."""
    count = 4 if math.prod(model.network.shape) < LARGE else 1
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(count, *model.network.shape, generator=generator)
    return {"x": x, "t": torch.rand(count, generator=generator), **fields_of(model, count)}


@torch.no_grad()
def outputs_of(model: SymmFlow, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both velocities, images of few steps, and the code that is read from these images, undecoded."""
    condition = model.condition_of({name: inputs[name] for name in model.semantic.keys})
    velocity = model.eval().network(inputs["x"], inputs["t"])
    sample = model.sample(condition, seed=SEED, steps=STEPS, guidance=1.0)
    reading = model.read(sample, seed=SEED, steps=2)
    return {"velocity": velocity, "sample": sample, "code": reading.code}


def items_of(recipe: Path, most: int | None = None) -> tuple[LightningDataModule, dict[str, Tensor]]:
    """The data of a recipe, and its first test items (validation, without a test split), stacked."""
    data = build(OmegaConf.to_container(OmegaConf.load(recipe), resolve=True)["data"], LightningDataModule)
    items = data.dataset("test" if data.has("test") else "val")
    rows = [items[i] for i in range(len(items) if most is None else min(most, len(items)))]
    names = [name for name in ("image", "mask", "label") if name in rows[0]]
    return data, {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}


def picture(model: SymmFlow, items: Mapping[str, Tensor] | None, columns: int = 10, rows: int = 8) -> list[Tensor]:
    """Images of a contact sheet of ``columns``.

    Of a model of masks pairs of rows, or of four: the image and the mask that is read from it in one step where items
    may be shown (``image`` among them), the mask that is asked for, and the image that is drawn. Of labels alone
    ``rows`` rows of samples, a class in each column.
    """
    if "mask" not in model.semantic.keys:
        labels = torch.arange(model.semantic.num_classes["label"]).repeat(rows)
        return list(model.sample(Condition(label=labels), seed=0, batch_size=columns))
    assert items is not None, "masks are asked for"
    made = []
    for start in range(0, len(items["mask"]), columns):
        part = {name: value[start : start + columns] for name, value in items.items()}
        if "image" in part:
            read = model.segment(part["image"], seed=0).labels
            made += [part["image"], painted(read, model.semantic.colours())]
        seeds = seeds_from(0, len(part["mask"]), start)
        made += [painted(part["mask"], model.semantic.colours()), model.sample(model.condition_of(part), seeds=seeds)]
    return [image for row in made for image in row]
