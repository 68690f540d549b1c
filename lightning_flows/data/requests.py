"""What to sample: requests for ``predict``, each with an id, a seed and the fields of its condition.

A request's sample depends on its own seed alone, and seed i of a run with one ``seed`` is
`lightning_flows.flow.noise.seeds_from` (seed, n)[i]: neither batch size nor the number of devices changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_flows.data.keyed import EvaluationSampler
from lightning_flows.data.transforms import Size, height_width, read_mask, resize_mask
from lightning_flows.flow.noise import key, seeds_from
from lightning_flows.store import Recorded

CONDITION_KEYS = ("label", "caption", "mask")


class RequestList(Dataset):
    """Requests i = 0..n-1 from lists of condition fields, each repeated cyclically."""

    def __init__(self, n: int, seeds: Sequence[int], fields: dict[str, Sequence[Any]], size: Size | None) -> None:
        self.n, self.seeds, self.fields, self.size = n, list(seeds), fields, height_width(size)

    def __len__(self) -> int:
        """Number of requests."""
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        """``id``, ``seed`` and the given ones of ``label``, ``caption``, ``mask`` (H, W) int64."""
        fields = {name: values[i % len(values)] for name, values in self.fields.items()}
        if "mask" in fields:
            fields["mask"] = self._mask(fields["mask"])
        tail = f"-label{fields['label']}" if "label" in fields else ""
        return {"id": f"{i:05d}{tail}", "seed": self.seeds[i], **fields}

    def _mask(self, path: str | Path) -> Any:
        mask = read_mask(path)
        if self.size is None:
            return mask
        mask = resize_mask(mask, self.size)
        top, left = ((have - want) // 2 for have, want in zip(mask.shape, self.size, strict=True))
        return mask[top : top + self.size[0], left : left + self.size[1]]


class ItemRequests(Dataset):
    """One request for each item of a data set, with the item's own condition; seed i is ``key(seed, i)``."""

    def __init__(self, items: Dataset, seed: int) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """``id``, ``seed`` and the fields of `RequestList` that the item has."""
        item = self.items[i]
        fields = {name: item[name] for name in CONDITION_KEYS if name in item}
        tail = f"-label{fields['label']}" if "label" in fields else ""
        return {"id": f"{i:05d}{tail}", "seed": key(self.seed, i), **fields}


class Requests(LightningDataModule, Recorded):
    """Requests for ``lightning-flows predict``.

    With several of ``labels``, ``prompts`` and ``masks``, entry i of each belongs to request i: the lists
    must have one length. Ids read ``00003``, or ``00003-label7`` where there are labels. Over several devices
    the requests are dealt out in turn, none twice (with and without
    ``Trainer(use_distributed_sampler=...)``).

    Args:
        labels: class index of each request.
        prompts: text of each request (batch key ``caption``).
        masks: mask image file of each request (grey levels are class ids).
        seed: seed of the whole run; request i gets ``seeds_from(seed, n)[i]``.
        seeds: one seed a request instead.
        n: number of requests; the lists are repeated cyclically (or cut) to it. None: as many as the lists
            have.
        batch_size: requests sampled at once on each device.
        size: side or (height, width) to which masks are resized (nearest pixel) and cropped; None keeps them.
        num_workers: data workers.

    Raises:
        ValueError: no request at all, lists or seeds of different lengths, negative labels.
    """

    def __init__(
        self,
        labels: list[int] | None = None,
        prompts: list[str] | None = None,
        masks: list[str] | None = None,
        *,
        seed: int = 0,
        seeds: list[int] | None = None,
        n: int | None = None,
        batch_size: int = 16,
        size: int | tuple[int, int] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        given = {"label": labels, "caption": prompts, "mask": masks}
        self.fields: dict[str, Sequence[Any]] = {name: v for name, v in given.items() if v is not None}
        self.n = _count(labels, prompts, masks, seeds, n)
        if labels is not None and min(labels) < 0:
            raise ValueError(f"labels must be class indices >= 0, got {min(labels)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.seeds = list(seeds) if seeds is not None else seeds_from(seed, self.n).tolist()
        self.batch_size, self.size, self.num_workers = batch_size, size, num_workers

    def requests(self) -> RequestList:
        """The requests as a data set."""
        return RequestList(self.n, self.seeds, self.fields, self.size)

    def predict_dataloader(self) -> DataLoader:
        """Batches of requests: ``id``, ``seed`` (B,), ``label`` (B,), ``caption``, ``mask`` (B, H, W)."""
        requests = self.requests()
        return DataLoader(
            requests,
            batch_size=self.batch_size,
            sampler=EvaluationSampler(len(requests)),
            num_workers=self.num_workers,
        )


def _count(
    labels: list[int] | None,
    prompts: list[str] | None,
    masks: list[str] | None,
    seeds: list[int] | None,
    n: int | None,
) -> int:
    """Number of requests that the arguments ask for."""
    named = {"labels": labels, "prompts": prompts, "masks": masks}
    lengths = {name: len(values) for name, values in named.items() if values is not None}
    if empty := [name for name, length in lengths.items() if length == 0]:
        raise ValueError(f"{empty[0]} is an empty list: there is nothing to sample")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have one length, entry i of each belonging to request i, got {lengths}")
    count = n if n is not None else max(lengths.values(), default=len(seeds or []))
    if count < 1:
        raise ValueError(
            f"nothing to sample: give labels, prompts, masks, seeds or n >= 1, got n={n!r}, seeds={seeds!r}"
        )
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"seeds must have one seed for each of the {count} requests, got {len(seeds)}")
    return count
