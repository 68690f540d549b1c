"""Keyed randomness: a draw is named by what it is for, not by how many came before it.

At sampling, draw j of sample i comes from the key (seed_i, j), made on the CPU in float32 and then moved, so
that a sample depends on its own seed alone and not on the batch, the order or the number of devices around
it. In training a draw comes from the key (run seed, step, rank, purpose), so that a resumed run repeats it
without any saved stream.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Sampler = Callable[[tuple[int, ...], torch.Generator], Tensor]


def key(*parts: int | str) -> int:
    """A 63-bit key of a sequence of integers and words, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeds_from(seed: int, n: int, start: int = 0) -> Tensor:
    """Seeds of samples ``start`` to ``start + n - 1`` of a run with one seed, int64, shape (n,)."""
    return torch.tensor([key(seed, i) for i in range(start, start + n)], dtype=torch.int64)


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator that starts at the key of ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


class Noise(ABC):
    """A source of named draws for a batch."""

    @abstractmethod
    def draw(self, purpose: int | str, shape: Sequence[int], sampler: Sampler) -> Tensor:
        """One draw for the batch, float32 on the CPU, shape ``shape`` = (B, ...).

        Args:
            purpose: names the draw; the same purpose gives the same numbers.
            shape: full shape, batch first.
            sampler: ``(shape, generator) -> Tensor`` that makes the numbers.
        """

    @abstractmethod
    def generator(self, purpose: int | str) -> torch.Generator:
        """A CPU generator for draws that concern the batch as a whole (times, dropped conditions)."""

    def normal(self, purpose: int | str, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of ``like`` (B, ...)."""
        return self.draw(purpose, like.shape, _normal).to(device=like.device, dtype=like.dtype)

    def uniform(self, purpose: int | str, n: int, device: Any = None) -> Tensor:
        """Numbers in [0, 1), shape (n,)."""
        return self.draw(purpose, (n,), _uniform).to(device)


class SampleNoise(Noise):
    """Every row of a draw comes from its own sample's seed.

    Args:
        seeds: one integer a sample, shape (B,).
    """

    def __init__(self, seeds: Sequence[int] | Tensor) -> None:
        self.seeds = [int(seed) for seed in seeds]

    def draw(self, purpose: int | str, shape: Sequence[int], sampler: Sampler) -> Tensor:
        """See `Noise.draw`; row i depends on ``(seeds[i], purpose)`` alone.

        Raises:
            ValueError: a batch of another size than the seeds.
        """
        if shape[0] != len(self.seeds):
            raise ValueError(f"shape asks for {shape[0]} samples, but there are {len(self.seeds)} seeds")
        row = tuple(shape[1:])
        rows = [sampler(row, generator_of(seed, purpose)) for seed in self.seeds]
        return torch.stack(rows) if rows else torch.empty(tuple(shape))

    def generator(self, purpose: int | str) -> torch.Generator:
        """See `Noise.generator`; keyed by all seeds together."""
        return generator_of("batch", purpose, *self.seeds)


class StepNoise(Noise):
    """Draws of one training or validation step: one stream for each purpose.

    Args:
        seed: seed of the run.
        step: step of the run, or index of the validation batch.
        rank: index of the process.
    """

    def __init__(self, seed: int, step: int = 0, rank: int = 0) -> None:
        self.seed, self.step, self.rank = int(seed), int(step), int(rank)

    def draw(self, purpose: int | str, shape: Sequence[int], sampler: Sampler) -> Tensor:
        """See `Noise.draw`; the whole batch comes from one stream."""
        return sampler(tuple(shape), self.generator(purpose))

    def generator(self, purpose: int | str) -> torch.Generator:
        """See `Noise.generator`; keyed by (seed, step, rank, purpose)."""
        return generator_of(self.seed, self.step, self.rank, purpose)

    def normal(self, purpose: int | str, like: Tensor) -> Tensor:
        """Standard normal numbers like ``like``; on an accelerator they are drawn there."""
        if like.device.type not in ("cuda", "xpu"):
            return super().normal(purpose, like)
        stream = torch.Generator(like.device).manual_seed(key(self.seed, self.step, self.rank, purpose))
        return torch.randn(like.shape, generator=stream, device=like.device, dtype=torch.float32).to(like.dtype)
