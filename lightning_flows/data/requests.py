"""What to sample: requests for ``predict``, each with an id, a seed and the fields of its condition.

A request's sample depends on its own seed alone, and seed i of a run with one ``seed`` is
`lightning_flows.flow.noise.seeds_from` (seed, n)[i]: neither batch size nor the number of devices changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_flows.codecs.aspect import width_to_height
from lightning_flows.data.bucketed import bucketed_requests
from lightning_flows.data.keyed import Collate, EvaluationSampler
from lightning_flows.data.tasks import CollateTask, check_task, in_pairs, stacked
from lightning_flows.data.transforms import MODES, ImageTransform, Size, height_width, read_image, read_mask
from lightning_flows.flow.noise import key, seeds_from
from lightning_flows.store import Recorded

CONDITION_KEYS = ("label", "caption", "mask", "aspect")


class RequestList(Dataset):
    """Requests i = 0..n-1 from lists of fields, each repeated cyclically; images and masks are given by their files.

    Args:
        n: number of requests.
        seeds: of the requests, one for each or two.
        fields: lists by key of the batch.
        size: that images and masks are scaled to cover, and cropped to; None keeps that of the files.
        channels: of the images; None keeps what each file has.
    """

    def __init__(
        self,
        n: int,
        seeds: Sequence[int | Sequence[int]],
        fields: dict[str, Sequence[Any]],
        size: Size | None,
        channels: int | None = None,
    ) -> None:
        self.n, self.seeds, self.fields, self.channels = n, list(seeds), fields, channels
        self.transform = ImageTransform(size)

    def __len__(self) -> int:
        """Number of requests."""
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        """``id``, ``seed`` and what is given of ``label``, ``caption``, ``mask``, ``image``, ``aspect``.

        A mask is (H, W) int64, an image (C, H, W) float32 in [-1, 1]; a pair of images (2, C, H, W), and of seeds (2,).

        Raises:
            FileNotFoundError: there is no such file; names it.
            ValueError: a file cannot be read, or image and mask differ in size; names them.
        """
        fields = {name: values[i % len(values)] for name, values in self.fields.items()}
        if isinstance(fields.get("image"), tuple):
            ends = [self._read({"image": file})["image"] for file in fields["image"]]
            fields["image"] = stacked("images", fields["image"], ends)
        else:
            fields |= self._read({name: fields[name] for name in ("image", "mask") if name in fields})
        tail = f"-label{fields['label']}" if "label" in fields else ""
        seed = self.seeds[i]
        return {"id": f"{i:05d}{tail}", "seed": seed if isinstance(seed, int) else torch.tensor(seed), **fields}

    def _read(self, files: dict[str, str | Path]) -> dict[str, Any]:
        """Image and mask, scaled and cropped alike."""
        read: dict[str, Any] = {}
        if "image" in files:
            read["image"] = read_image(files["image"], self.channels)
        if "mask" in files:
            read["mask"] = read_mask(files["mask"])
        if len(read) == 2 and read["image"].shape[1:] != read["mask"].shape:
            sizes = f"{tuple(read['mask'].shape)} and {tuple(read['image'].shape[1:])}"
            raise ValueError(f"mask {files['mask']} and image {files['image']} differ in size: {sizes}")
        return self.transform(read)


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

    With several of ``labels``, ``prompts``, ``masks``, ``images`` and a list ``aspect``, entry i of each belongs to
    request i: the lists must have one length. Ids read ``00003``, or ``00003-label7`` where there are labels. Over
    several devices the requests are dealt out in turn, none twice (with and without
    ``Trainer(use_distributed_sampler=...)``).

    Beside samples a model may have other tasks, see `NormalizingFlow` and `SymmFlow`; one that has not refuses them:

    - ``"classify"`` the ``images``: the likeliest class of each.
    - ``"segment"`` the ``images``: the mask of each.
    - ``"edit"`` the ``images`` where the ``masks`` are not those that the model sees; 255 leaves it to the model.
    - ``"score"`` the ``images``: how strange each is, under its label or prompt or without one.
    - ``"inpaint"`` the ``images`` where the ``masks`` are not zero.
    - ``"interpolate"`` from the first of the ``images`` to the second, from the third to the fourth ...: two for each
      request. Without images from one sample to another: ``seeds`` has two for each request.

    Args:
        labels: class index of each request.
        prompts: text of each request (batch key ``caption``).
        masks: mask image file of each request (grey levels are class ids).
        images: image file of each request (batch key ``image``, float32 in [-1, 1]); one with a mask has its size.
        aspect: width to height, such as ``"16:9"`` (in YAML in quotation marks), for all requests or a list with one
            for each. Requests of different ones come in different batches; ids and seeds stay those of the order
            in which they are given.
        seed: seed of the whole run; request i gets ``seeds_from(seed, n)[i]``.
        task: ``"sample"`` (also None), ``"classify"``, ``"segment"``, ``"edit"``, ``"score"``, ``"inpaint"`` or
            ``"interpolate"``. Without a task, a `SymmFlow` reads ``images`` that come alone.
        task_options: arguments of the model's method for the task, such as ``{"steps": 200}``.
        seeds: one seed a request instead; two for an interpolation.
        n: number of requests; the lists are repeated cyclically (or cut) to it. None: as many as the lists
            have.
        batch_size: requests sampled at once on each device.
        size: side or (height, width) that images, and masks with the nearest pixel, are scaled to cover and cropped
            to; None keeps them.
        channels: 1, 3 or 4: images are converted; None keeps what each has.
        num_workers: data workers.

    Raises:
        ValueError: no request at all, lists or seeds of different lengths, negative labels, an argument that is
            out of range, or one that the task lacks or has no use for.
    """

    def __init__(
        self,
        labels: list[int] | None = None,
        prompts: list[str] | None = None,
        masks: list[str] | None = None,
        images: list[str] | None = None,
        aspect: str | list[str] | None = None,
        *,
        task: str | None = None,
        task_options: dict[str, Any] | None = None,
        seed: int = 0,
        seeds: list[int] | None = None,
        n: int | None = None,
        batch_size: int = 16,
        size: int | tuple[int, int] | None = None,
        channels: int | None = 3,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        named = {"labels": labels, "prompts": prompts, "masks": masks, "images": images, "aspect": aspect}
        check_task(task, task_options, named)
        self.task, self.task_options = task, task_options
        ratios = [aspect] if isinstance(aspect, str) else aspect
        pairs, ends = (in_pairs("images", images), in_pairs("seeds", seeds)) if self.paired else (images, seeds)
        given = {"label": labels, "caption": prompts, "mask": masks, "image": pairs, "aspect": ratios}
        self.fields: dict[str, Sequence[Any]] = {name: v for name, v in given.items() if v is not None}
        lists = {"labels": labels, "prompts": prompts, "masks": masks, "images": pairs}
        self.n = _count(lists if isinstance(aspect, str) else {**lists, "aspect": aspect}, ends, n)
        for ratio in ratios or []:
            width_to_height(ratio, "aspect")
        if labels is not None and min(labels) < 0:
            raise ValueError(f"labels must be class indices >= 0, got {min(labels)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if channels is not None and channels not in MODES:
            raise ValueError(f"channels must be 1 (grey), 3 (RGB), 4 (RGBA) or None, got {channels!r}")
        self.channels = channels
        derived = seeds_from(seed, 2 * self.n).reshape(self.n, 2) if self.paired else seeds_from(seed, self.n)
        self.seeds = list(ends) if ends is not None else derived.tolist()
        self.batch_size, self.size, self.num_workers = batch_size, height_width(size), num_workers

    @property
    def paired(self) -> bool:
        """Whether a request has two images, or two seeds."""
        return self.task == "interpolate"

    def requests(self) -> RequestList:
        """The requests as a data set."""
        return RequestList(self.n, self.seeds, self.fields, self.size, self.channels)

    def predict_dataloader(self) -> DataLoader:
        """Batches of requests, of one aspect each.

        They hold ``id``, ``seed`` (B,) and what is given of ``label`` (B,), ``caption``, ``mask`` (B, H, W), ``image``
        (B, C, H, W), ``aspect``, ``task`` and ``task_options``; for interpolations ``seed`` (B, 2) and ``image``
        (B, 2, C, H, W).
        """
        requests = self.requests()
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        if len(set(self.fields.get("aspect", ()))) > 1:
            return bucketed_requests(requests, self._aspects(), {}, **options)
        asked = self.task not in (None, "sample")
        collate = CollateTask(str(self.task), self.task_options) if asked else Collate()
        return DataLoader(requests, sampler=EvaluationSampler(len(requests)), collate_fn=collate, **options)

    def _aspects(self) -> Tensor:
        """Number of each request's aspect ratio, counted as they first occur, int64, (n,)."""
        given = self.fields["aspect"]
        numbers = {ratio: number for number, ratio in enumerate(dict.fromkeys(given))}
        return torch.tensor([numbers[given[i % len(given)]] for i in range(self.n)])


def _count(named: dict[str, list[Any] | None], seeds: Sequence[Any] | None, n: int | None) -> int:
    """Number of requests that the arguments ask for."""
    lengths = {name: len(values) for name, values in named.items() if values is not None}
    if empty := [name for name, length in lengths.items() if length == 0]:
        raise ValueError(f"{empty[0]} is an empty list: there is nothing to sample")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have one length, entry i of each belonging to request i, got {lengths}")
    count = n if n is not None else max(lengths.values(), default=len(seeds or []))
    if count < 1:
        raise ValueError(
            f"nothing to sample: give labels, prompts, masks, images, seeds or n >= 1, got n={n!r}, seeds={seeds!r}"
        )
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"seeds must have one seed for each of the {count} requests, got {len(seeds)}")
    return count
