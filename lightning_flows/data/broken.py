"""Items that cannot be read: an error that names the file, or, where one asks for it, the next item in their place.

The item that stands in for item i is the first readable one of i + 1, i + 2, ... (around the end of the split). That
depends on the files alone: batches keep their size, and a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils.data import Dataset

ERRORS = (ValueError, OSError)  # what reading a file raises when the file is at fault


class SkipBroken(Dataset):
    """The items of a data set, each that cannot be read replaced by the next that can.

    The tally lies in shared memory, so that all data workers of a process count together; each broken item is
    warned of once, with the name of its file.

    Args:
        items: a data set of dictionaries.
        most: largest share of broken items, in [0, 1]; one more is an error.
        name: of the split, for messages.
    """

    def __init__(self, items: Dataset, most: float, name: str) -> None:
        self.items, self.most, self.name = items, most, name
        self.tally = torch.zeros(len(self), dtype=torch.uint8).share_memory_()  # 1: found to be broken

    def __len__(self) -> int:
        """Number of items, broken ones included."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index``, or the one that stands in for it.

        Raises:
            ValueError: more than the allowed share of the items is broken; names the last of them.
        """
        for place in range(index, index + len(self)):
            try:
                return self.items[place % len(self)]
            except ERRORS as error:
                self._note(place % len(self), error)
        raise ValueError(f"none of the {len(self)} {self.name} items can be read")

    @property
    def broken(self) -> list[int]:
        """Places of the items found to be broken so far."""
        return self.tally.nonzero().flatten().tolist()

    def _note(self, place: int, error: Exception) -> None:
        if self.tally[place]:
            return
        self.tally[place] = 1
        found = len(self.broken)
        if found > self.most * len(self):
            raise ValueError(
                f"{found} of the {len(self)} {self.name} items cannot be read, more than max_broken={self.most} "
                f"allows; the last of them: {error}"
            ) from error
        warnings.warn(f"{error}: the next readable item takes its place (on_broken='skip')", stacklevel=2)


class InMemory(Dataset):
    """The items of a data set, read once and kept (as uint8, before any transform).

    Args:
        items: the data set.
        lenient: an item that cannot be read raises its error when it is asked for, not now.
    """

    def __init__(self, items: Dataset, lenient: bool = False) -> None:
        length = len(items)  # type: ignore[arg-type]
        self.items = [_read_or_keep_error(items, i) if lenient else items[i] for i in range(length)]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A shallow copy of item ``index``."""
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return dict(item)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image of item ``index``."""
        height, width = self[index]["image"].shape[-2:]
        return height, width


def _read_or_keep_error(items: Dataset, index: int) -> dict[str, Any] | Exception:
    try:
        return items[index]
    except ERRORS as error:
        return error.with_traceback(None)
