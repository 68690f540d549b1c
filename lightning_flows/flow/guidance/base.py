r"""Guidance: a conditional velocity pushed away from a worse one.

Every rule here starts from two velocities at the same point, the one that is wanted :math:`v_c` and a worse
one :math:`v_u` (without the condition, or of a weaker network), and returns their extrapolation

.. math:: v = v_u + w\,(v_c - v_u),

or a refinement of it. One convention holds for all: ``scale`` 1 is off and then only the conditional velocity
is computed; all channels are guided. Conditional and null branch share one call on a doubled batch.

A rule may remember earlier calls (``stateful``). It then needs the calls of one fixed-step solve in their
order: take a fresh copy by ``begin()`` for each solve; adaptive solvers and likelihoods must refuse it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.paths import Path, expand


class Guided(Protocol):
    """What guidance asks of a network: see `flow.fields.Velocity`."""

    @property
    def path(self) -> Path:
        """The path that the velocity belongs to."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the condition streams that the network knows; empty for an unconditional one."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Velocity at ``x`` (B, ...) and ``t`` () or (B,), shape (B, ...)."""

    def null(self, condition: Condition | None, batch_size: int) -> Condition:
        """The condition with every stream absent."""


class Companion(Protocol):
    """A second network that guides the first: ``(x, t, condition) -> velocity``."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Velocity at ``x`` (B, ...) and ``t`` () or (B,), shape (B, ...)."""


@dataclass
class Memory:
    """What a stateful rule keeps between the calls of one solve."""

    calls: int = 0
    average: Tensor | None = None


class Guidance(ABC):
    """A rule ``(network, x, t, condition) -> velocity`` with a ``scale`` (1 is off) and an ``interval`` of t.

    Outside the interval (ends included in it) the conditional velocity is returned, at half the cost.
    """

    scale: float
    interval: tuple[float, float]
    _memory: ClassVar[Memory | None] = None  # an instance made by `begin` has its own; never part of the config

    def __post_init__(self) -> None:
        require("scale", self.scale, self.scale >= 0, ">= 0 (1 is off)")
        low, high = map(float, self.interval)
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval must be (low, high) with 0 <= low < high <= 1, got {self.interval!r}")
        object.__setattr__(self, "interval", (low, high))  # a list, as YAML has it, becomes a tuple

    @property
    def stateful(self) -> bool:
        """Whether a call depends on the calls before it."""
        return False

    def begin(self) -> Self:
        """A copy with empty state, for one solve."""
        fresh = copy.copy(self)
        object.__setattr__(fresh, "_memory", Memory())
        return fresh

    @property
    def memory(self) -> Memory:
        """The state of this solve.

        Raises:
            RuntimeError: before `begin`: the calls of two solves would be mixed.
        """
        if self._memory is None:
            raise RuntimeError(f"{type(self).__name__} remembers its calls: use the copy that begin() returns")
        return self._memory

    def __call__(self, network: Guided, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """The guided velocity, shape and dtype of ``x``.

        Args:
            network: the velocity that is guided.
            x: points, shape (B, ...).
            t: time, shape () or (B,).
            condition: what is wanted.

        Raises:
            ValueError: there is no null branch: the network knows no condition, or none was given.
        """
        inside = self._inside(t)
        if self.scale == 1 or inside is False:
            return network(x, t, condition)
        wanted, worse = self._branches(network, x, t, condition)
        guided = self._combine(wanted, worse, x, t, network.path)
        return guided if inside is True else torch.where(expand(inside, x), guided, wanted)

    def _inside(self, t: Tensor) -> Tensor | bool:
        """Which times lie in the interval: True or False where all agree, else a mask (B,)."""
        if self.interval == (0.0, 1.0):
            return True  # without looking at t, which may lie on an accelerator
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        if bool(inside.all()):
            return True
        return inside if bool(inside.any()) else False

    def _branches(self, network: Guided, x: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """The wanted and the worse velocity, each (B, ...), from one call on the batch and its null copy."""
        rule = f"{type(self).__name__}(scale={self.scale})"
        if not network.streams:
            raise ValueError(f"{rule} needs a network with a condition; an unconditional one allows scale 1 only")
        if condition is None or not set(condition.streams) & set(network.streams):
            given = () if condition is None else condition.streams
            raise ValueError(f"{rule} needs a condition with one of {network.streams}, got {given}")
        both = Condition.cat([condition, network.null(condition, len(x))])
        velocity = network(torch.cat([x, x]), torch.cat([t, t]) if t.dim() else t, both)  # (2B, ...)
        wanted, worse = velocity.chunk(2)
        return wanted, worse

    @abstractmethod
    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        """The guided velocity (B, ...) from the two velocities (B, ...)."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of each sample (B, ...), at least float32, shape (B, 1, ...)."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    product = (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)
    return product.reshape(-1, *[1] * (a.dim() - 1))


def require(name: str, value: float, allowed: bool, what: str) -> None:
    if not (math.isfinite(value) and allowed):
        raise ValueError(f"{name} must be a finite number {what}".rstrip() + f", got {value!r}")
