"""What a sample is conditioned on: typed streams, each with its values and its presence.

A stream that is *absent* for a sample says "no condition here". What a network makes of that (a null row of a
table, a zero vector, an empty mask) and how often training drops it belong to the network's embedding of the
stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

STREAMS = ("label", "tokens", "vector", "spatial")


class Tokens(NamedTuple):
    """A sequence of embedded tokens.

    Attributes:
        values: embeddings, shape (B, L, D).
        mask: True where the token is real, False where it is padding, shape (B, L).
    """

    values: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition of a batch of B samples; ``Condition()`` is no condition at all.

    Attributes:
        label: class index, int64, shape (B,).
        tokens: embedded words and their mask, shapes (B, L, D) and (B, L).
        vector: a pooled embedding or any numbers, shape (B, D).
        spatial: a map aligned with the data (mask, low-resolution image), shape (B, C, H, W).
        present: stream name -> bool, shape (B,); a given stream that is not named here is present for every
            sample.

    Raises:
        ValueError: streams of different batch sizes, or ``present`` naming a stream that is not given.
    """

    label: Tensor | None = None
    tokens: Tokens | None = None
    vector: Tensor | None = None
    spatial: Tensor | None = None
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(_values(self, name)) for name in self.streams}
        sizes |= {f"present[{name!r}]": len(mask) for name, mask in self.present.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the streams of a condition must have one batch size, got {sizes}")
        if unknown := set(self.present) - set(self.streams):
            raise ValueError(f"present names {sorted(unknown)}, but the condition has only {list(self.streams)}")

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are given."""
        return tuple(name for name in STREAMS if getattr(self, name) is not None)

    @property
    def batch_size(self) -> int | None:
        """Number of samples, None where no stream is given."""
        return len(_values(self, self.streams[0])) if self.streams else None

    def presence(self, stream: str, batch_size: int | None = None, device: Any = None) -> Tensor:
        """Which samples have this stream, bool, shape (B,); all False where it is not given.

        Raises:
            ValueError: an unknown stream, or no batch size to be had.
        """
        if stream not in STREAMS:
            raise ValueError(f"stream must be one of {list(STREAMS)}, got {stream!r}")
        size = self.batch_size if batch_size is None else batch_size
        if size is None:
            raise ValueError("batch_size is needed: this condition has no stream to take it from")
        if getattr(self, stream) is None:
            return torch.zeros(size, dtype=torch.bool, device=device)
        mask = self.present.get(stream)
        if mask is None:
            device = _values(self, stream).device if device is None else device
            return torch.ones(size, dtype=torch.bool, device=device)
        return mask if device is None else mask.to(device)

    def absent(self, *streams: str, where: Tensor | None = None) -> Condition:
        """The same condition with ``streams`` (default: all) absent where ``where`` (B,) is True."""
        present = dict(self.present)
        for name in streams or self.streams:
            if getattr(self, name, None) is None:
                continue
            now = self.presence(name)
            present[name] = torch.zeros_like(now) if where is None else now & ~where.to(now.device)
        return replace(self, present=present)

    def to(self, device: Any) -> Condition:
        """The same condition with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, index: Any) -> Condition:
        """The samples chosen by a slice, an index tensor or a bool tensor."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, function: Any) -> Condition:
        values = {name: _apply(getattr(self, name), function) for name in self.streams}
        return Condition(**values, present={name: function(mask) for name, mask in self.present.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The samples of several conditions in one, in order.

        Raises:
            ValueError: conditions with different streams.
        """
        names = {condition.streams for condition in conditions}
        if len(names) != 1:
            raise ValueError(f"conditions with different streams cannot be joined: {sorted(names)}")
        (streams,) = names
        values = {name: _join([getattr(c, name) for c in conditions]) for name in streams}
        marked = {name for c in conditions for name in c.present}
        return Condition(**values, present={name: torch.cat([c.presence(name) for c in conditions]) for name in marked})


def _values(condition: Condition, name: str) -> Tensor:
    value = getattr(condition, name)
    return value.values if isinstance(value, Tokens) else value


def _apply(value: Any, function: Any) -> Any:
    return Tokens(*map(function, value)) if isinstance(value, Tokens) else function(value)


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], Tokens):
        return Tokens(*(torch.cat(parts) for parts in zip(*values, strict=True)))
    return torch.cat(values)


assert tuple(f.name for f in fields(Condition))[:-1] == STREAMS
