"""What can be asked of a model beside samples, and what a request must hold for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flows.data.keyed import Collate


class Fields(NamedTuple):
    """Lists of `Requests` that go with a task.

    Attributes:
        needs: those without which it has no sense.
        takes: those that may be given as well.
    """

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


FIELDS: dict[str, Fields] = {
    "sample": Fields(takes=("labels", "prompts", "masks", "aspect")),
    "classify": Fields(needs=("images",)),
    "score": Fields(needs=("images",), takes=("labels", "prompts")),
    "inpaint": Fields(needs=("images", "masks"), takes=("labels", "prompts")),
    "segment": Fields(needs=("images",)),
    "edit": Fields(needs=("images", "masks"), takes=("labels",)),
    "interpolate": Fields(takes=("images", "labels", "prompts")),
}


def check_task(task: str | None, options: Mapping[str, Any] | None, given: Mapping[str, Any]) -> None:
    """Refuse requests that lack something, or give something that would be ignored.

    Args:
        task: see `Requests`.
        options: of the task.
        given: the lists by their name, None where they are not given.

    Raises:
        ValueError: naming the task and the list.
    """
    if task is not None and task not in FIELDS:
        raise ValueError(f"task must be one of {list(FIELDS)}, got {task!r}")
    if options and task in (None, "sample"):
        raise ValueError(f"task_options {sorted(options)} belong to a task other than 'sample', got task={task!r}")
    if task is None:
        return
    needs, takes = FIELDS[task]
    if missing := [name for name in needs if given.get(name) is None]:
        raise ValueError(f"task {task!r} needs {list(needs)}, but there are no {missing}")
    known = needs + takes
    if foreign := [name for name, value in given.items() if value is not None and name not in known]:
        raise ValueError(f"task {task!r} takes {list(known)} and has no use for {foreign}")


def in_pairs(name: str, values: Sequence[Any] | None) -> list[tuple[Any, Any]] | None:
    """The two ends of every interpolation: entries 0 and 1, 2 and 3 ...

    Raises:
        ValueError: an odd number of them.
    """
    if values is None:
        return None
    if len(values) % 2:
        raise ValueError(f"{name} must come in pairs for task 'interpolate', from one to the next, got {len(values)}")
    return list(zip(values[::2], values[1::2], strict=True))


def stacked(name: str, files: Sequence[Any], parts: Sequence[Tensor]) -> Tensor:
    """Both ends of an interpolation, shape (2, C, H, W).

    Raises:
        ValueError: ends of different shapes; names their files.
    """
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{name} {files[0]} and {files[1]} must have one shape, got {shapes[0]} and {shapes[1]}: give size=..."
        )
    return torch.stack(list(parts))


class CollateTask:
    """Puts items into a batch that says what is asked of it: ``task`` and ``task_options``."""

    def __init__(self, task: str, options: Mapping[str, Any] | None) -> None:
        self.asked = {"task": task, "task_options": dict(options or {})}
        self.collate = Collate()

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return {**self.collate(items), **self.asked}
