"""What the scores of zoo entries share: samples with counted network calls, distances, and where figures are kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import zoo_flows
from lightning_flows import Condition
from lightning_flows.flow import seeds_from
from lightning_flows.metrics import PRDC, Extractor, Frechet

MAX_CALLS = 25
_ROWS = 1000  # items handled at once


class Drawn(NamedTuple):
    """Samples (N, C, H, W) with their labels (N,), and what they cost.

    Attributes:
        images: the samples, on the CPU.
        labels: of the samples.
        calls: network calls of a sample.
        rows: items that the network was given for a sample: twice the calls where guidance adds the null condition. (A
            normalizing flow adds it inside a call.)
        seconds: of all samples.
        passes: calls of a block's layers for a batch of a normalizing flow; 0 for other models.
    """

    images: Tensor
    labels: Tensor
    calls: int
    rows: float
    seconds: float
    passes: int = 0


def draw(model: Any, labels: Tensor, seed: int, options: Mapping[str, Any], batch_size: int = 250) -> Drawn:
    """One sample for each of ``labels`` (N,); the calls of ``model.network`` are counted by a hook.

    A normalizing flow is called once for all its tokens, and once more where noise is removed.

    Raises:
        RuntimeError: more than 25 network calls for a sample.
    """
    seeds, parts, calls, rows, passes = seeds_from(seed, len(labels)), [], [], 0, 0

    def count(_network: Any, args: tuple[Tensor, ...], output: Any) -> None:
        nonlocal rows, passes
        calls[-1] += 1
        rows += len(args[0])
        passes = max(passes, getattr(output, "passes", 0))

    hook = model.network.register_forward_hook(count)
    start = time.perf_counter()
    try:
        for first in range(0, len(labels), batch_size):
            chunk = slice(first, first + batch_size)
            calls.append(0)
            condition = Condition(label=labels[chunk])
            parts.append(model.sample(condition, seeds=seeds[chunk], **options).float().cpu())
            if calls[-1] > MAX_CALLS:
                raise RuntimeError(f"{calls[-1]} network calls for a sample, at most {MAX_CALLS}: lower --steps")
    finally:
        hook.remove()
    return Drawn(torch.cat(parts), labels, max(calls), rows / len(labels), time.perf_counter() - start, passes)


def scale_of(model: Any, options: Mapping[str, Any]) -> float:
    """Guidance scale of the samples; 1 is off."""
    guidance = options.get("guidance", getattr(model, "guidance", None))
    return float(getattr(guidance, "scale", 1.0 if guidance is None else guidance))


def setting(model: Any, drawn: Drawn, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """How samples were drawn, as it stands beside every figure."""
    guidance = getattr(model, "guidance", None)
    return {
        "samples": len(drawn.labels),
        "seed": seed,
        "guidance_scale": scale_of(model, options),
        "guidance": None if guidance is None else repr(guidance),
        **_solved(model, drawn, options),
        "seconds_per_sample": drawn.seconds / len(drawn.labels),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def _solved(model: Any, drawn: Drawn, options: Mapping[str, Any]) -> dict[str, Any]:
    """What turned noise into samples, and its calls."""
    if zoo_flows.is_flow(model):
        return {**zoo_flows.setting_of(model, options), "nfe": drawn.calls, "passes": drawn.passes}
    return {
        "solver": repr(getattr(model, "solver", None)),
        "steps": options.get("steps", getattr(model, "steps", None)),
        "nfe": drawn.calls,
        "network_rows": drawn.rows,
    }


def frechet(real: Tensor, samples: Tensor, features: Extractor) -> float:
    """Frechet distance of two sets of images."""
    metric = Frechet(features)
    for which, images in ((True, real), (False, samples)):
        for rows in images.split(_ROWS):
            metric.update(rows, real=which)
    return metric.compute().item()


def prdc(real: Tensor, samples: Tensor, features: Extractor, nearest: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of two sets of images of one size."""
    metric = PRDC(features, nearest=nearest)
    for which, images in ((True, real), (False, samples)):
        for rows in images.split(_ROWS):
            metric.update(rows, real=which)
    return {name: value.item() for name, value in metric.compute().items()}


def nearest_pixels(x: Tensor, reference: Tensor, columns: int = 10_000) -> Tensor:
    """Distance (N,) of each of ``x`` (N, ...) to the nearest of ``reference`` (M, ...), in float32.

    The neighbour is found by |a|^2 + |b|^2 - 2ab in blocks of ``columns`` references, so that no large matrix
    is ever held; its distance is then computed directly, without the round-off of that formula.
    """
    x, reference = x.flatten(1).float(), reference.flatten(1).float()
    best = x.new_full((len(x),), torch.inf)
    found = torch.zeros(len(x), dtype=torch.long)
    for first in range(0, len(reference), columns):
        block = reference[first : first + columns]
        lengths = block.square().sum(1)
        for rows in torch.arange(len(x)).split(_ROWS):
            least = (lengths - 2 * x[rows] @ block.T).min(1)  # |a|^2 is the same for all of a row
            nearer = least.values < best[rows]
            best[rows] = torch.where(nearer, least.values, best[rows])
            found[rows] = torch.where(nearer, least.indices + first, found[rows])
    return (x - reference[found]).norm(dim=1)


def write(file: Path, block: str, values: Mapping[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Put the values as a block into a metrics file; its other blocks stay."""
    content = json.loads(file.read_text()) if file.exists() else {}
    versions = {name: version(name) for name in ("lightning-flows", "torch", *packages)}
    content[block] = {"values": dict(values), "versions": versions}
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)
