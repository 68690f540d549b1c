"""Statistics of real items in a safetensors file, so that a test needs no real images.

Tensors are ``mean`` (D,) and ``covariance`` (D, D) in float64 and, on request, ``features`` (N, D); those of an
extractor that keeps places (sFID) have the prefix ``spatial.``. The metadata says of which extractor and weights, of
how many items and of what shape they are: a file that does not fit is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_flows.metrics.features import Extractor


class Gaussian(NamedTuple):
    """Mean ``(D,)`` and covariance ``(D, D)`` (divisor ``count - 1``) of ``count`` rows, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int


@dataclass(frozen=True)
class Reference:
    """What is known of the real items in one extractor's features.

    Attributes:
        gaussian: of all rows.
        features: the rows themselves ``(N, D)``, for metrics that need them all; or None.
        shape: of one item, ``()`` where it is not known.
        file: name of the file.
        about: further metadata of the file: data, split, versions.
    """

    gaussian: Gaussian
    features: Tensor | None = None
    shape: tuple[int, ...] = ()
    file: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of real items."""
        return self.gaussian.count

    def admit(self, shape: tuple[int, ...]) -> None:
        """Check the shape of an item.

        Raises:
            ValueError: items of another shape than those of the file.
        """
        if self.shape and tuple(shape) != self.shape:
            raise ValueError(f"reference {self.file} is of items {self.shape}, the samples are {tuple(shape)}")

    def description(self) -> dict[str, object]:
        """File, count and origin, for a result."""
        known = {key: self.about[key][:16] for key in ("split", "sha256") if key in self.about}
        if "data" in self.about:
            known["data"] = json.loads(self.about["data"])["class_path"].rpartition(".")[2]
        return {"file": Path(self.file).name, "count": self.count, **known}


def load_reference(file: str | Path, extractor: Extractor, *, features: bool = True) -> Reference:
    """Read the statistics of an extractor's features.

    Args:
        file: of `save_references`.
        extractor: whose statistics are wanted.
        features: read the rows too, where there are any.

    Raises:
        ValueError: no such file, or its features come from another extractor or other weights.
    """
    if not Path(file).is_file():
        raise ValueError(f"reference must be a file of statistics (lightning-flows statistics), got {str(file)!r}")
    prefix = _prefix(extractor)
    with safe_open(file, framework="pt") as stored:
        meta = stored.metadata() or {}
        if meta.get(f"{prefix}extractor") != extractor.name:
            found = ", ".join(repr(value) for key, value in sorted(meta.items()) if key.endswith("extractor"))
            raise ValueError(f"reference {file} is of {found or 'no extractor'}, not of {extractor.name!r}")
        weights = meta.get(f"{prefix}fingerprint", "")
        if weights and weights != extractor.fingerprint():
            raise ValueError(f"reference {file} was computed with other weights of {extractor.name!r}")
        mean, covariance = (stored.get_tensor(prefix + name) for name in ("mean", "covariance"))
        rows = stored.get_tensor(f"{prefix}features") if features and f"{prefix}features" in stored.keys() else None  # noqa: SIM118
    gaussian = Gaussian(mean, covariance, int(meta["count"]))
    return Reference(gaussian, rows, tuple(json.loads(meta.get("shape", "[]"))), str(file), meta)


def save_references(file: str | Path, parts: Iterable[tuple[Extractor, Reference]], **about: str) -> Path:
    """Write statistics of the same items in the features of one or more extractors, whole or not at all.

    Args:
        file: made with its folder.
        parts: at most one extractor that keeps places and one that does not.
        about: further metadata.

    Raises:
        ValueError: two extractors for the same place in the file, or other counts.
    """
    tensors: dict[str, Tensor] = {}
    meta = dict(about)
    for extractor, known in parts:
        prefix = _prefix(extractor)
        if f"{prefix}mean" in tensors or meta.setdefault("count", str(known.count)) != str(known.count):
            raise ValueError(f"parts: {extractor.name!r} does not fit beside {meta}")
        meta["shape"] = json.dumps(known.shape)
        meta |= {f"{prefix}extractor": extractor.name, f"{prefix}fingerprint": extractor.fingerprint()}
        tensors |= {f"{prefix}mean": known.gaussian.mean, f"{prefix}covariance": known.gaussian.covariance}
        if known.features is not None:
            tensors[f"{prefix}features"] = smallest(known.features)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata=meta)
    partial.replace(file)
    return file


def smallest(rows: Tensor) -> Tensor:
    """The rows in float32 where that loses nothing (networks give float32), else as they are."""
    short = rows.float()
    return short if torch.equal(short.to(rows.dtype), rows) else rows


def _prefix(extractor: Extractor) -> str:
    return "spatial." if extractor.spatial else ""
