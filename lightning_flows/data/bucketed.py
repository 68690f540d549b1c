"""Samplers whose batches are of one bucket each: for training, for evaluation, and batches of requests.

A sampler of this module yields whole batches, lists of what the samplers of `lightning_flows.data.keyed` yield one
by one; a loader has ``batch_size=None`` and `Batched` around its items. Everything else is as there: the order is a
function of (seed, epoch), and the state of a loader is two integers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_flows.data.buckets import AspectItems
from lightning_flows.data.keyed import Collate, EvaluationSampler, KeyedLoader, KeyedSampler
from lightning_flows.flow.noise import generator_of


class BucketSampler(KeyedSampler):
    """Shuffled training batches of one epoch, each of one bucket, a function of (seed, epoch) alone.

    The permutation of the epoch is sorted into the buckets and cut into global batches (``batch_size`` times
    ``world_size`` items of one bucket), whose order is drawn; every rank takes each ``world_size``-th item of a
    global batch. So all ranks have equally many batches, batch k is of one bucket on all of them, and at the same
    global batch one device and many see the same. What does not fill a global batch of its bucket is left out
    (``drop_last=True``; other items in the next epoch), or makes a smaller one, for which up to ``world_size - 1``
    items of the bucket are taken twice.

    Args:
        buckets: bucket of each item, a number from 0, (N,).
        batch_size: items in a batch of one rank.
        seed: seed of the order.
        drop_last: leave out the rest of each bucket, or make smaller batches of it.
        rank: index of this process; None asks torch.distributed.
        world_size: number of processes; None asks torch.distributed.

    Raises:
        ValueError: an empty data set or a rank outside of the world.
    """

    def __init__(
        self,
        buckets: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(len(buckets), seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)
        self.buckets, self.batch_size = buckets, batch_size
        self.counts: list[int] = torch.bincount(buckets.long()).tolist()  # items of each bucket

    @property
    def global_batch(self) -> int:
        """Items of one batch of all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches in a whole epoch, the same on every rank."""
        return sum(
            count // self.global_batch if self.drop_last else -(-count // self.global_batch) for count in self.counts
        )

    def batches(self, epoch: int) -> list[Tensor]:
        """Positions of this rank's items in each batch of one epoch."""
        permutation = self.permutation(epoch)
        own = self.buckets[permutation]
        cut = [part for bucket in range(len(self.counts)) for part in self._cut(permutation[own == bucket])]
        order = torch.randperm(len(cut), generator=generator_of(self.seed, "batches", epoch)).tolist()
        return [cut[place][self.rank :: self.world_size] for place in order]

    def _cut(self, items: Tensor) -> Sequence[Tensor]:
        """Global batches of the items of one bucket."""
        kept = len(items) // self.global_batch * self.global_batch
        if not self.drop_last:
            kept = -(-len(items) // self.world_size) * self.world_size
        return items[torch.arange(kept) % len(items)].split(self.global_batch) if kept else []

    def order(self, epoch: int) -> Tensor:
        """Positions of this rank's items in one epoch, batch after batch, int64."""
        return torch.cat(self.batches(epoch)) if len(self) else torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[Any]:
        """Batches of integers ``epoch * length + index``, from batch ``start`` on."""
        epoch = self.epoch - self.offset
        return ((batch + epoch * self.length).tolist() for batch in self.batches(epoch)[self.start :])

    def units(self, batch_size: int) -> dict[str, Any]:
        """See `KeyedSampler.units`; ``buckets`` stands for all that the order depends on beside length and seed."""
        plan = hashlib.sha256(self.buckets.to(torch.uint8).numpy().tobytes())
        plan.update(f"{self.global_batch} {self.drop_last}".encode())
        return {**super().units(self.batch_size), "buckets": plan.hexdigest()[:16]}


class BucketEvaluationSampler(EvaluationSampler):
    """Every item once, in batches of one bucket, dealt out over the ranks in turn.

    The items lie bucket after bucket, without those that do not divide evenly over the ranks; these, fewer than
    ``world_size`` of each bucket, follow at the end as batches of one item. Of this order every rank takes each
    ``world_size``-th item, as `EvaluationSampler` does: ranks differ by at most one item and one batch, with ``wrap``
    by none, and a repeated item comes last.

    Args:
        buckets: bucket of each item, a number from 0, (N,).
        batch_size: most items in a batch.
        wrap: see `EvaluationSampler`.
        rank: index of this process; None asks torch.distributed.
        world_size: number of processes; None asks torch.distributed.
    """

    def __init__(
        self,
        buckets: Tensor,
        batch_size: int,
        *,
        wrap: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(len(buckets), wrap=wrap, rank=rank, world_size=world_size)
        groups = [(buckets == bucket).nonzero().flatten() for bucket in buckets.unique().tolist()]
        whole = [len(group) // self.world_size * self.world_size for group in groups]
        ends = [group[end:] for group, end in zip(groups, whole, strict=True)]
        self.items = torch.cat([group[:end] for group, end in zip(groups, whole, strict=True)] + ends)
        self.sizes = [  # of the batches of every rank, but for those of one item
            min(batch_size, end // self.world_size - start)
            for end in whole
            for start in range(0, end // self.world_size, batch_size)
        ]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.sizes) + super().__len__() - sum(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        """Lists of positions of this rank's items."""
        places = iter(range(super().__len__()))
        for size in itertools.chain(self.sizes, itertools.repeat(1)):
            turns = list(itertools.islice(places, size))
            if not turns:
                return
            yield [int(self.items[(self.rank + j * self.world_size) % self.length]) for j in turns]


class Batched(Dataset):
    """Items of a data set by lists of their numbers (a number alone is a list of one)."""

    def __init__(self, items: Dataset) -> None:
        self.items = items

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, numbers: int | Sequence[int]) -> list[Any]:
        """The items, not collated."""
        return [self.items[number] for number in ([numbers] if isinstance(numbers, int) else numbers)]


class BatchesOfRanks(Dataset):
    """A data set of whole batches, each of one bucket, which an `EvaluationSampler` deals out over the ranks.

    For ``predict``, where Lightning builds loaders anew around a `BatchSampler` of its own.

    Args:
        items: the data set.
        buckets: bucket of each item, (N,).
        batch_size: most items in a batch.
        world_size: number of processes.
    """

    def __init__(self, items: Dataset, buckets: Tensor, batch_size: int, world_size: int) -> None:
        self.items = items
        samplers = [
            BucketEvaluationSampler(buckets, batch_size, rank=r, world_size=world_size) for r in range(world_size)
        ]
        rows = itertools.zip_longest(*samplers)
        self.batches: list[list[int]] = [batch for row in rows for batch in row if batch is not None]

    def __len__(self) -> int:
        """Number of batches of all ranks."""
        return len(self.batches)

    def __getitem__(self, place: int) -> list[Any]:
        """Items of a batch, not collated."""
        return [self.items[number] for number in self.batches[place]]


class CollateOne:
    """Collates the items of the one batch that a loader with ``batch_size=1`` gives."""

    def __call__(self, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The batch."""
        (items,) = batches
        return Collate()(items)


# ---- the loaders


def bucketed_training(items: Dataset, sorted_items: AspectItems, order: dict[str, Any], **options: Any) -> KeyedLoader:
    """Loader of training batches.

    Args:
        items: by the sampler's numbers.
        sorted_items: tell the buckets.
        order: ``seed``, ``drop_last`` and, if known, ``rank`` and ``world_size`` of a `BucketSampler`.
        options: of `DataLoader`.

    Raises:
        ValueError: there is no full batch.
    """
    names = sorted_items.ratios
    sampler = BucketSampler(sorted_items.buckets, options["batch_size"], **order)
    size, world = sampler.batch_size, sampler.world_size
    if not len(sampler):
        counts = dict(zip(names, sampler.counts, strict=False))
        raise ValueError(
            f"batch_size={size} on {world} device(s) is more than the training items of any bucket, {counts}: there is "
            "no full batch (lower batch_size, or drop_last=False)"
        )
    few = {names[i]: count for i, count in enumerate(sampler.counts) if 0 < count < size * world}
    if sampler.drop_last and few:
        rank_zero_warn(
            f"buckets with fewer training items than a global batch of {size * world} are never seen, {few}: lower "
            "batch_size, or give fewer ratios, or drop_last=False"
        )
    return KeyedLoader(Batched(items), sampler=sampler, **{**options, "batch_size": None})


def bucketed_evaluation(
    items: Dataset, buckets: Tensor, wrap: bool, replica: dict[str, int], **options: Any
) -> DataLoader:
    """Loader of evaluation batches; ``replica`` holds ``rank`` and ``world_size``, or nothing."""
    sampler = BucketEvaluationSampler(buckets, options["batch_size"], wrap=wrap, **replica)
    return DataLoader(Batched(items), sampler=sampler, collate_fn=Collate(), **{**options, "batch_size": None})


def bucketed_requests(items: Dataset, buckets: Tensor, replica: dict[str, int], **options: Any) -> DataLoader:
    """Loader of requests in batches of one bucket; ``replica`` as for `bucketed_evaluation`."""
    world = EvaluationSampler(len(buckets), **replica).world_size
    batches = BatchesOfRanks(items, buckets, options["batch_size"], world)
    sampler = EvaluationSampler(len(batches), **replica)
    return DataLoader(batches, sampler=sampler, collate_fn=CollateOne(), **{**options, "batch_size": 1})
