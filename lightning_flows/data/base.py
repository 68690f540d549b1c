"""The base of every training data set: splits, transforms, loaders; a subclass only says how an item is read.

Batches are dictionaries with the keys of `Batch`. What an item looks like depends on (seed, epoch, index)
alone, see `lightning_flows.data.keyed`: not on the number of workers, and a run resumed inside an epoch sees
what an uninterrupted one would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypedDict

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_flows.data.broken import InMemory, SkipBroken
from lightning_flows.data.bucketed import bucketed_evaluation, bucketed_requests, bucketed_training
from lightning_flows.data.buckets import AspectBuckets, AspectItems, sort_into, transforms_of
from lightning_flows.data.keyed import Collate, EvaluationSampler, KeyedItems, KeyedLoader, KeyedSampler
from lightning_flows.data.requests import ItemRequests
from lightning_flows.data.transforms import ImageTransform, Scaling, height_width
from lightning_flows.data.workers import explain_dead_worker
from lightning_flows.flow.couplings import Coupling
from lightning_flows.flow.noise import generator_of
from lightning_flows.store import Recorded

SPLITS = ("train", "val", "test")


class Batch(TypedDict, total=False):
    """What a batch may hold; a data set gives some of these keys.

    Attributes:
        image: float32 in [-1, 1], (B, C, H, W).
        label: class index, int64, (B,).
        caption: one text for each item.
        mask: class id of every pixel, 255 where it is unlabelled, int64, (B, H, W).
        aspect: width to height of each image's bucket, such as "16:9"; one for all of a batch.
        latent: encoded image, the mean of its posterior, float32, (B, c, h, w).
        latent_std: deviation of that posterior, float32, (B, c, h, w).
        tokens: encoded caption, float32, (B, L, D).
        tokens_mask: where a token is real and not padding, bool, (B, L).
        video: float32 in [-1, 1], (B, T, C, H, W).
        object: whatever a 3D family reads.
        source: noise x0 coupled with the images, float32, (B, C, H, W).
        index: position in the split, int64, (B,).
        epoch: epoch of the item (training only), int64, (B,).
    """

    image: Tensor
    label: Tensor
    caption: list[str]
    mask: Tensor
    aspect: list[str]
    latent: Tensor
    latent_std: Tensor
    tokens: Tensor
    tokens_mask: Tensor
    video: Tensor
    object: Any
    source: Tensor
    index: Tensor
    epoch: Tensor


class FlowDataModule(LightningDataModule, Recorded, ABC):
    """A data module whose randomness is keyed by (seed, epoch, index).

    A subclass implements `read`; it may override ``classes``, ``num_classes`` and ``levels``.

    The loaders split the data over the devices themselves, so Lightning need not (our command line passes
    ``use_distributed_sampler=False``; with True nothing changes, the samplers are left as they are). Training
    leaves out what does not fill a global batch (``drop_last``), validation repeats up to ``devices - 1``
    items so that all devices have equally many, test and predict count each item exactly once.

    Args:
        batch_size: items in a batch of one device; the global batch is this times devices times accumulation.
        size: side or (height, width) in pixels: the shorter side is resized to cover it and the rest cropped.
            None keeps the files' size, which must then be one for all.
        resize: scale to cover this size before ``size`` is cropped from it; None: to cover ``size``.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); None keeps what the files have.
        crop: ``"center"``, or ``"random"`` in training.
        flip: mirror training images (and masks) left and right with probability 1/2.
        scaling: ``"bicubic"``, or ``"adm"``: as the published ImageNet runs scale (halvings, then bicubic), so
            that ``crop="center"`` gives their pixels; for images of 8 bits.
        background: grey level 0..255 under transparent pixels that lose their alpha.
        buckets: sizes of different shapes in the place of ``size``: every image is scaled to cover the size of the
            nearest shape and cropped to it, and a batch holds images of one of them.
        val_fraction: part of the training items set aside for validation, where the data has no such split.
        test_fraction: the same for the test.
        test_split: the split that ``test`` and ``predict`` read.
        coupling: pairs noise with data in the data workers and adds it to training batches as ``source``. In
            pixels: of use where the flow runs on the images themselves, not behind a codec.
        cache: read every file once and keep it in memory as uint8.
        on_broken: an item that cannot be read: ``"raise"`` the error, which names its file, or ``"skip"`` it: the next
            readable item takes its place, with one warning for each file and a count at the end.
        max_broken: the share of a split, in [0, 1], that ``"skip"`` accepts; one item more is an error.
        seed: seed of order, augmentation, noise and requests.
        split_seed: seed of the division by the fractions; apart from ``seed``, so that another run keeps the
            split.
        drop_last: leave out training items that do not fill a global batch (False: a smaller last batch, and
            up to ``devices - 1`` items twice).
        num_workers: data workers of each loader.
        pin_memory: None pins where there is CUDA.
        persistent_workers: None keeps workers alive between epochs where there are any.

    Raises:
        ValueError: names the argument that is out of range.
    """

    levels: int | None = 256  # number of grey levels of the stored pixels, for dequantisation; None: continuous

    def __init__(
        self,
        *,
        batch_size: int = 64,
        size: int | tuple[int, int] | None = None,
        resize: int | tuple[int, int] | None = None,
        channels: int | None = None,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        scaling: Scaling = "bicubic",
        background: int = 255,
        buckets: AspectBuckets | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        test_split: Literal["train", "val", "test"] = "test",
        coupling: Coupling | None = None,
        cache: bool = False,
        on_broken: Literal["raise", "skip"] = "raise",
        max_broken: float = 0.01,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
    ) -> None:
        super().__init__()
        _check(batch_size=batch_size, num_workers=num_workers, channels=channels, test_split=test_split)
        _check_fractions(val_fraction, test_fraction)
        _check_broken(on_broken, max_broken)
        self.on_broken, self.max_broken = on_broken, max_broken
        self.batch_size, self.drop_last, self.num_workers = batch_size, drop_last, num_workers
        self.size, self.channels, self.background = height_width(size), channels, background
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.test_split, self.coupling, self.cache = test_split, coupling, cache
        self.seed, self.split_seed = seed, split_seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.persistent_workers = num_workers > 0 if persistent_workers is None else persistent_workers
        options = {"crop": crop, "flip": flip, "scaling": scaling}
        self.buckets, self.transforms = buckets, transforms_of(ImageTransform(size, resize, **options), buckets)  # type: ignore[arg-type]
        self._raw: dict[str, Dataset | None] = {}
        self._datasets: dict[str, KeyedItems | None] = {}

    # ---- what a subclass says

    @abstractmethod
    def read(self, split: str) -> Dataset | None:
        """Items of ``"train"``, ``"val"`` or ``"test"``, not random; None where there is no such split.

        An item is a dictionary with some of ``image`` (uint8 or float32 in [-1, 1], (C, H, W)), ``label``
        (int), ``caption`` (str), ``mask`` (int64, (H, W)).
        """

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None where there are none."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None where there are none."""
        return None if self.classes is None else len(self.classes)

    # ---- the splits

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image; reads the first one where ``size`` and ``channels`` do not say it (and of buckets)."""
        if self.size is not None and self.channels is not None:
            return (self.channels, *self.size)
        channels, height, width = self.dataset("train")[0]["image"].shape
        return channels, height, width

    def dataset(self, split: str) -> KeyedItems:
        """The items of a split as its loader sees them.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self._datasets:
            items = self._prepared(split)
            seed = self.seed if split == "train" else None
            self._datasets[split] = None if items is None else KeyedItems(items, self.transforms[split], seed=seed)
        found = self._datasets[split]
        if found is None:
            ways = {"val": ": give val_fraction=...", "test": ": give test_fraction=..., or test_split='val'"}
            raise ValueError(f"{type(self).__name__} has no {split!r} split{ways.get(split, '')}")
        return found

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return self._read(split) is not None or self.fractions.get(split, 0) > 0

    def _read(self, split: str) -> Dataset | None:
        if split not in self._raw:
            items = self.read(split)
            if items is not None and self.fractions.get(split):
                raise ValueError(
                    f"{split}_fraction={self.fractions[split]} but the data has a {split!r} split of its own"
                )
            cached = self.cache and items is not None
            self._raw[split] = InMemory(items, lenient=self.on_broken == "skip") if cached else items  # type: ignore[arg-type]
        return self._raw[split]

    def _items(self, split: str) -> Dataset | None:
        """The split's own items, or its part of the training items."""
        own = self._read(split)
        if not self.has(split) or (split != "train" and own is not None) or not any(self.fractions.values()):
            return own
        whole = self._read("train")
        if whole is None:
            raise ValueError(f"{split}_fraction={self.fractions[split]} needs a train split to take the items from")
        return Subset(whole, self._places(split, len(whole)))  # type: ignore[arg-type]

    def _prepared(self, split: str) -> Dataset | None:
        """The items of a split: with buckets those that are large enough; broken ones replaced where asked for."""
        items, lenient, places = self._items(split), self.on_broken == "skip", None
        if items is not None and self.buckets is not None:
            items, places = sort_into(self.buckets, items, split, lenient)
        if items is not None and lenient:
            items = SkipBroken(items, self.max_broken, split)
        return items if places is None else AspectItems(items, self.buckets.ratios, places)  # type: ignore

    def _places(self, split: str, length: int) -> list[int]:
        """Sorted positions of a split within ``length`` items: test first, then val, the rest is train."""
        order = torch.randperm(length, generator=generator_of(self.split_seed, "split"))
        n_test, n_val = (round(self.fractions[name] * length) for name in ("test", "val"))
        parts = dict(zip(("test", "val", "train"), order.tensor_split([n_test, n_test + n_val]), strict=True))
        if len(parts[split]) == 0:
            raise ValueError(f"the {split!r} part of {length} items is empty with fractions {self.fractions}")
        return parts[split].sort().values.tolist()

    def setup(self, stage: str | None = None) -> None:
        """Reads what a stage needs: ``fit``, ``validate``, ``test``, ``predict``; None reads all there is."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}.get(stage, (self.test_split,))
        for split in wanted:
            if self.has(split) or split == "train":
                self.dataset(split)

    def broken(self, split: str) -> list[int]:
        """Places of a split's items that were found to be broken so far (``on_broken="skip"``)."""
        found = self._datasets.get(split)
        items = found.items if found is not None else None
        items = items.items if isinstance(items, AspectItems) else items
        return items.broken if isinstance(items, SkipBroken) else []

    def teardown(self, stage: str | None = None) -> None:
        """Says how many items were replaced."""
        for split in self._datasets:
            if places := self.broken(split):
                rank_zero_warn(
                    f"{len(places)} of {len(self.dataset(split))} {split} items could not be read and were replaced "
                    f"by others (on_broken='skip'): {places[:8]}{' ...' if len(places) > 8 else ''}"
                )

    def on_exception(self, exception: BaseException) -> None:
        """Says what to do when a data worker has died."""
        explain_dead_worker(exception, self.num_workers)

    # ---- the loaders

    def train_dataloader(self) -> KeyedLoader:
        """Shuffled batches that can be stopped and resumed after any of them.

        Raises:
            ValueError: there is no full batch.
        """
        items, collate = self.dataset("train"), Collate(self.coupling, self.seed)
        order = {"seed": self.seed, "drop_last": self.drop_last, **self._replica()}
        if isinstance(items.items, AspectItems):
            return bucketed_training(items, items.items, order, collate_fn=collate, **self._options())
        sampler = KeyedSampler(len(items), **order)
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} on {sampler.world_size} device(s) is more than the "
                f"{len(items)} training items: there is no full batch (lower batch_size, or drop_last=False)"
            )
        return KeyedLoader(items, sampler=sampler, collate_fn=collate, drop_last=self.drop_last, **self._options())

    def val_dataloader(self) -> DataLoader | list:
        """Validation items in order; an empty list, which Lightning skips, where there is no such split."""
        return self._evaluation(self.dataset("val"), wrap=True) if self.has("val") else []

    def test_dataloader(self) -> DataLoader:
        """Items of ``test_split`` in order."""
        return self._evaluation(self.dataset(self.test_split))

    def predict_dataloader(self) -> DataLoader:
        """One request (id, seed, condition) for every item of ``test_split``."""
        items = self.dataset(self.test_split)
        requests = ItemRequests(items, self.seed)
        if isinstance(items.items, AspectItems):
            return bucketed_requests(requests, items.items.buckets, self._replica(), **self._options())
        return self._evaluation(requests)

    def _evaluation(self, items: Dataset, wrap: bool = False) -> DataLoader:
        if isinstance(items, KeyedItems) and isinstance(items.items, AspectItems):
            return bucketed_evaluation(items, items.items.buckets, wrap, self._replica(), **self._options())
        sampler = EvaluationSampler(len(items), wrap=wrap, **self._replica())  # type: ignore[arg-type]
        return DataLoader(items, sampler=sampler, collate_fn=Collate(), **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "persistent_workers": self.persistent_workers,
            "generator": generator_of(self.seed, "workers"),  # else each iteration draws from the global stream
        }

    def _replica(self) -> dict[str, int]:
        """Rank and world size as the trainer's strategy counts replicas of the data; empty without one."""
        known = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"rank": known["rank"], "world_size": known["num_replicas"]} if known else {}


def _check(*, batch_size: int, num_workers: int, channels: int | None, test_split: str) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if channels not in (None, 1, 3, 4):
        raise ValueError(f"channels must be 1 (grey), 3 (RGB), 4 (RGBA) or None, got {channels!r}")
    if test_split not in SPLITS:
        raise ValueError(f"test_split must be one of {SPLITS}, got {test_split!r}")


def _check_broken(on_broken: str, max_broken: float) -> None:
    if on_broken not in ("raise", "skip"):
        raise ValueError(f"on_broken must be 'raise' or 'skip', got {on_broken!r}")
    if not 0 <= max_broken <= 1:
        raise ValueError(f"max_broken must lie in [0, 1], got {max_broken}")


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction + test_fraction must be below 1, got {val_fraction + test_fraction}")
