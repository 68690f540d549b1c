"""Which items of the whole data a process has before it, so that none is counted twice and a bound is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class Places:
    """Counts the items of this process and gives each its place among those of all processes.

    Items are dealt in turn, as `DistributedSampler` and ours do: the j-th item of rank r has the place
    ``j world_size + r``. Where the items do not divide evenly, those samplers repeat the first ones, and the places of
    the repeats lie beyond the data.

    Args:
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.restart()

    def restart(self) -> None:
        """Begin with the first item again."""
        self._seen = self._fresh = 0
        self._seen_of: dict[int, int] = {}

    def take(self, count: int, loader: Any, which: int = 0) -> tuple[Tensor, Tensor]:
        """Places of the next items of a loader, int64 ``(count,)``, and which are no repeats, bool ``(count,)``."""
        own = torch.arange(count)
        places = (self._seen + own) * self.world_size + self.rank
        inside = (self._seen_of.get(which, 0) + own) * self.world_size + self.rank
        length = _length(loader) if self.world_size > 1 else None
        fresh = inside < length if length is not None else torch.ones(count, dtype=torch.bool)
        self._seen += count
        self._seen_of[which] = self._seen_of.get(which, 0) + count
        self._fresh += int(fresh.sum())
        return places, fresh

    def first(self, places: Tensor) -> int:
        """The first place of these items on any process: the same number on all of them."""
        return int(places[0]) - self.rank

    def fresh(self, device: torch.device) -> Tensor:
        """Number of items taken that were no repeats, a scalar."""
        return torch.tensor(self._fresh, device=device)


def _length(loader: Any) -> int | None:
    """Number of different items that a loader deals out to the processes; None where it does not deal."""
    if not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return None
    try:
        return len(loader.dataset)
    except TypeError:
        return None
