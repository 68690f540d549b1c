"""The zoo at a glance: every entry that this installation can load without a network, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_flows.hub.cards import METRICS, family, figures, read_header
from lightning_flows.store import CONFIG, WEIGHTS, read_config, zoo_folders

_COLUMNS = ("id", "family", "data", "metric", "size", "licence")


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        id: what ``from_pretrained`` takes.
        folder: where it lies.
        family: class of the model.
        data: names of the training data, from the card.
        metric: the first figure of ``metrics.json`` with its name; empty without one.
        size: bytes of the weights; None where they are kept elsewhere.
        licence: of the weights, from the card.
        config: raw config.
        metrics: content of ``metrics.json``.
    """

    id: str
    folder: Path
    family: str
    data: str
    metric: str
    size: int | None
    licence: str
    config: Mapping[str, Any] = field(repr=False)
    metrics: Any = field(repr=False)


def entries() -> list[Entry]:
    """Entries of all local zoo folders by id; of two with one id, the one that ``from_pretrained`` takes.

    Raises:
        ValueError: a file of an entry is damaged; names it.
    """
    found: dict[str, Entry] = {}
    for place in zoo_folders():
        for file in sorted(place.glob(f"*/{CONFIG}")):
            entry = read_entry(file.parent)
            kept = found.get(entry.id)
            if kept is None or (kept.size is None and entry.size is not None):
                found[entry.id] = entry
    return [found[name] for name in sorted(found)]


def read_entry(folder: Path) -> Entry:
    """Entry of one folder.

    Raises:
        ValueError: ``config.json``, ``metrics.json`` or the header of the card is damaged.
    """
    config, header, metrics = read_config(folder), read_header(folder), _metrics(folder / METRICS)
    best = next(iter(figures(metrics)), None)
    weights = folder / WEIGHTS
    return Entry(
        id=folder.name,
        folder=folder,
        family=family(config),
        data=", ".join(_listed(header.get("datasets"))),
        metric=f"{best.name} {best.value:.4g}" if best else "",
        size=weights.stat().st_size if weights.is_file() else None,
        licence=str(header.get("license", "")),
        config=config,
        metrics=metrics,
    )


def table() -> str:
    """Markdown table of `entries` in columns of equal width, without a line break at the end."""
    rows = [(e.id, e.family, e.data, e.metric, _megabytes(e.size), e.licence) for e in entries()]
    widths = [max(len(cell) for cell in column) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_COLUMNS, tuple("-" * width for width in widths), *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _metrics(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"metrics file {file} is not JSON ({error}).") from error


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or []]


def _megabytes(size: int | None) -> str:
    return "on the Hub" if size is None else f"{size / 1e6:.1f} MB"
