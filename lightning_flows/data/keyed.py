"""Data whose randomness is keyed: what happens to an item depends on (seed, epoch, index) alone.

The sampler yields one integer for each item, ``epoch * length + index``; the data set takes it apart again
and draws its crops and flips from a generator with the key (seed, epoch, index). The number of workers, the
order in which they finish and an interruption change nothing, and the whole state of the training data is two
integers.

Lightning keeps the state of a training loader that has ``state_dict``; it asks for it when a checkpoint is
written and hands it back before the first batch is fetched. `KeyedLoader` counts the batches that were handed
out (not those that workers prepared ahead), so that a run stopped in the middle of an epoch goes on with the
very next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.couplings import Coupling
from lightning_flows.flow.noise import SampleNoise, generator_of, key

Transform = Callable[[dict[str, Any], torch.Generator | None], dict[str, Any]]


def replica() -> tuple[int, int]:
    """``(rank, world_size)`` of this process: of torch.distributed when it is initialised, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _RankSampler(DistributedSampler):
    """Base of samplers that split the data over the ranks themselves.

    It is a `DistributedSampler` in name only, so that Lightning leaves it in its place whatever
    ``Trainer(use_distributed_sampler=...)`` says.
    """

    def __init__(self, length: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        own_rank, own_world = replica()
        self.length = length
        self.rank = own_rank if rank is None else rank
        self.world_size = own_world if world_size is None else world_size
        self.epoch = 0
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in 0..{self.world_size - 1} (world_size - 1), got {self.rank}")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration (called by Lightning)."""
        self.epoch = int(epoch)


class KeyedSampler(_RankSampler):
    """Shuffled training order of one epoch, a function of (seed, epoch) alone.

    Every rank takes each ``world_size``-th entry of one permutation, so batch k of all ranks together is the
    same set of items on one device as on many (at the same global batch). The items are never repeated
    silently: what does not divide evenly over the ranks is left out (``drop_last=True``; another permutation
    in the next epoch leaves out other items), or the first items of the permutation are taken again
    (``drop_last=False``).

    Args:
        length: number of items N in the data set.
        seed: seed of the order.
        drop_last: leave out the rest, or wrap around.
        rank: index of this process; None asks torch.distributed.
        world_size: number of processes; None asks torch.distributed.

    Raises:
        ValueError: an empty data set or a rank outside of the world.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(length, rank=rank, world_size=world_size)
        self.seed, self.drop_last = int(seed), drop_last
        # set by the loader for an iteration that resumes a run:
        self.start = 0  # what this rank skips of the iteration
        self.offset = 0  # epochs that the trainer counted, but that had no batch

    def __len__(self) -> int:
        """Items of this rank in a whole epoch."""
        return self.length // self.world_size if self.drop_last else -(-self.length // self.world_size)

    def order(self, epoch: int) -> Tensor:
        """Positions of this rank's items in one epoch, int64, shape (len(self),)."""
        places = torch.arange(len(self)) * self.world_size + self.rank
        return self.permutation(epoch)[places % self.length]  # the remainder only matters where drop_last=False wraps

    def permutation(self, epoch: int) -> Tensor:
        """All positions in the order of one epoch, the same on every rank, int64, shape (N,)."""
        return torch.randperm(self.length, generator=generator_of(self.seed, "order", epoch))

    def units(self, batch_size: int) -> dict[str, Any]:
        """What the batches of a loader's state are counted in, and what their order depends on.

        Args:
            batch_size: items in a batch of this rank.
        """
        return {"global_batch": batch_size * self.world_size, "length": self.length, "seed": self.seed}

    def __iter__(self) -> Iterator[int]:
        """Integers ``epoch * length + index``, from item ``start`` of this rank on."""
        epoch = self.epoch - self.offset
        numbers = self.order(epoch)[self.start :] + epoch * self.length
        return iter(numbers.tolist())


class EvaluationSampler(_RankSampler):
    """The data set in order, every ``world_size``-th item for each rank.

    Args:
        length: number of items N.
        wrap: False counts every item exactly once (ranks may differ by one item: for test and predict); True
            repeats up to ``world_size - 1`` first items so that all ranks have equally many (validation
            inside ``fit``, where a rank with fewer batches would leave the others waiting).
        rank: index of this process; None asks torch.distributed.
        world_size: number of processes; None asks torch.distributed.
    """

    def __init__(
        self, length: int, *, wrap: bool = False, rank: int | None = None, world_size: int | None = None
    ) -> None:
        super().__init__(length, rank=rank, world_size=world_size)
        self.wrap = wrap

    def __len__(self) -> int:
        """Items of this rank."""
        extra = self.world_size - 1 if self.wrap else self.world_size - 1 - self.rank
        return (self.length + extra) // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Positions of this rank's items."""
        return ((self.rank + j * self.world_size) % self.length for j in range(len(self)))


class KeyedItems(Dataset):
    """Decodes the sampler's integers and gives every item a generator with its own key.

    Args:
        items: data set of dictionaries, without randomness.
        transform: ``(item, generator | None) -> item``.
        seed: seed of the augmentations; None for evaluation: no generator, no ``epoch`` in the item.
    """

    def __init__(self, items: Dataset, transform: Transform, *, seed: int | None = None) -> None:
        self.items, self.transform, self.seed = items, transform, seed

    def __len__(self) -> int:
        """Number of items N."""
        return len(self.items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The items of epoch 0 in order (any number has an item, so iteration would not end by itself)."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Item ``number % N`` in epoch ``number // N``, with ``index`` and, in training, ``epoch``."""
        epoch, index = divmod(int(number), len(self))
        item = dict(self.items[index])
        if self.seed is None:
            return {**self.transform(item, None), "index": index}
        generator = generator_of(self.seed, "augment", epoch, index)
        return {**self.transform(item, generator), "index": index, "epoch": epoch}


class Collate:
    """Puts items into a batch and, on request, couples it with its noise (in the data worker).

    Args:
        coupling: pairs noise and data; None adds no noise.
        seed: seed of the noise; row i is drawn from the key (seed, epoch, index).
    """

    def __init__(self, coupling: Coupling | None = None, seed: int = 0) -> None:
        self.coupling, self.seed = coupling, seed

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch; with a coupling also ``source``: x0 of the shape of the images (or cached latents), (B, C, H, W).

        Raises:
            ValueError: images or masks of different shapes, or a coupling that moves the data instead of the noise.
        """
        self._check(items)
        batch = default_collate(list(items))
        if self.coupling is not None:
            batch["source"] = self._source(batch)
        return batch

    def _check(self, items: Sequence[Mapping[str, Any]]) -> None:
        for name in ("image", "mask"):
            shapes = sorted({tuple(item[name].shape) for item in items if name in item})
            if len(shapes) > 1:
                several = len({item.get("aspect") for item in items}) > 1
                hint = "they have several aspects" if several else "give the data module a size=... (and channels=...)"
                raise ValueError(f"{name}s of one batch must have one shape, got {shapes}: {hint}")

    def _source(self, batch: Mapping[str, Any]) -> Tensor:
        x1 = batch["image"] if "image" in batch else batch["latent"]
        epochs = batch["epoch"].tolist() if "epoch" in batch else [0] * len(x1)
        seeds = [key(self.seed, "source", e, i) for e, i in zip(epochs, batch["index"].tolist(), strict=True)]
        x0 = SampleNoise(seeds).normal("x0", like=x1)
        condition = Condition(label=batch["label"]) if "label" in batch else None
        x0, paired, _ = self.coupling(x0, x1, condition)  # type: ignore[misc]
        if paired is not x1 and not torch.equal(paired, x1):
            raise ValueError(
                f"coupling must reorder the noise x0 and leave the data in place, {self.coupling} does not"
            )
        return x0


class KeyedLoader(DataLoader):
    """A `DataLoader` over a `KeyedSampler` that can be stopped after any batch and goes on with the next one.

    ``state_dict()`` counts the batches handed out in the current epoch. Nothing is fetched before the first
    ``next``, because Lightning makes the iterator first and names the epoch (``set_epoch``) later. Iterated
    anew without ``set_epoch`` after a complete epoch, it goes on to the next epoch by itself. The length is
    that of a whole epoch, also for the epoch that is resumed in its middle.

    After a resume the loader counts epochs from its own state: Lightning 2.6, bounded by ``max_steps`` and
    resumed from a checkpoint of an epoch's end, counts one epoch without batches. Another number than the one
    in the state only says that a new epoch begins.
    """

    _position: tuple[int, int] = (0, 0)  # epoch, batches handed out in it
    _announced: int | None = None  # the number that set_epoch gave this epoch; None before the first iteration
    _resuming: bool = False

    def __iter__(self) -> Iterator[Any]:
        """Batches of the sampler's epoch, from the loaded position on."""
        if not isinstance(self.sampler, KeyedSampler):  # Trainer(overfit_batches=...) puts its own in
            yield from super().__iter__()
            return
        epoch, done = self._position = self._begin(self.sampler)
        self._announced, self._resuming = self.sampler.epoch, False
        self.sampler.offset, self.sampler.start = self.sampler.epoch - epoch, done * (self.batch_size or 1)
        for batch in super().__iter__():
            self._position = (epoch, self._position[1] + 1)
            yield batch

    def _begin(self, sampler: KeyedSampler) -> tuple[int, int]:
        """Epoch and number of batches to skip of an iteration that starts now."""
        epoch, done = self._position
        if self._announced is None:
            return sampler.epoch, 0
        if sampler.epoch != self._announced:
            return (epoch + 1 if self._resuming else sampler.epoch - sampler.offset), 0
        if done >= len(self):
            return epoch + 1, 0
        return epoch, done if self._resuming else 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch (and the trainer's number for it), batches handed out in it, and what they are counted in."""
        epoch, batches = self._position
        announced = epoch if self._announced is None else self._announced
        return {"epoch": epoch, "trainer_epoch": announced, "batches": batches, **self._units()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken.

        With another number of devices or batch size the epoch goes on at the last whole batch; with
        another number of items, another seed or other buckets the order is another one: a warning says that the
        epoch starts anew.
        """
        if not isinstance(self.sampler, KeyedSampler) or not state:
            return
        units, samples = self._units(), state["batches"] * state["global_batch"]
        if any(units.get(name) != state.get(name) for name in ("length", "seed", "buckets")):
            rank_zero_warn(f"the training data changed from {dict(state)} to {units}: the epoch starts anew")
            samples = 0
        self._position = (state["epoch"], min(samples // units["global_batch"], len(self)))
        self._announced, self._resuming = state["trainer_epoch"], True
        self.sampler.set_epoch(state["trainer_epoch"])

    def _units(self) -> dict[str, Any]:
        if not isinstance(self.sampler, KeyedSampler):
            return {"global_batch": 0, "length": 0, "seed": 0}
        return self.sampler.units(self.batch_size or 1)
