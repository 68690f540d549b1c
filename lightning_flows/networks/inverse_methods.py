r"""How a flow block is inverted: token by token, or many tokens at once by fixed-point iteration.

Token i of the data solves :math:`x_i = \mu(x_{<i}) + \sigma(x_{<i}) z_i`. `Sequential` finds one token after another:
as many passes as tokens, each over one token. `Jacobi` guesses a whole segment and puts the guess into the right-hand
side until it stays: token i of a segment is exact after i passes at the latest, and mostly much sooner, but each pass
costs the arithmetic of the whole segment. It pays where a pass over one token is bound by overhead: small batches, long
sequences. `Automatic` chooses for each block.

References:
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
    Accelerate TarFlow Sampling with GS-Jacobi Iteration (Liu et al., 2025).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_flows.networks.block_run import BlockRun
from lightning_flows.networks.parallel import is_sharded
from lightning_flows.networks.pass_cost import Cost

Settled = Callable[[int], None]  # called with the number of tokens of a block that are settled
Guess = Literal["noise", "zeros"]


@dataclass(frozen=True)
class InverseMethod(ABC):
    """A way to find the x of a block's z."""

    @abstractmethod
    def __call__(self, run: BlockRun, settled: Settled) -> None:
        """Settle all tokens of a run, in order.

        Args:
            run: where it stands; its ``inputs`` are written.
            settled: called with the number of tokens that are settled so far.
        """

    def of_block(self, index: int) -> InverseMethod:
        """The method for block ``index`` of the stack."""
        return self


@dataclass(frozen=True)
class Sequential(InverseMethod):
    """One token after another: exact."""

    def __call__(self, run: BlockRun, settled: Settled) -> None:
        """See `InverseMethod.__call__`."""
        self.after(0, run, settled)

    def after(self, start: int, run: BlockRun, settled: Settled) -> None:
        """Settle the tokens after the first ``start`` ones, which are known."""
        run.rewind(start)
        for i in range(start, run.steps):
            run.settle(i, *run.evaluate(i, i + 1))
            settled(i + 1)


@dataclass(frozen=True)
class Jacobi(InverseMethod):
    r"""Segments of tokens, each iterated until it stays the same.

    A segment has settled when

    .. math:: \operatorname{mean} (x^{k+1} - x^k)^2 < \text{threshold} \cdot \operatorname{mean} (x^{k+1})^2 .

    The keys and values that later segments see are those of the last pass, whose inputs were the last guess but one: an
    error of the size of the threshold, unless ``refresh``.

    Args:
        segment: tokens in a segment.
        threshold: on the relative mean square of the last change.
        max_iterations: most passes over a segment.
        growth: segments that begin after ``grow_after`` tokens are this many times as long.
        grow_after: None for the tokens of one image: then segments of an image do not grow.
        faithful: the official iterates: one criterion for the whole batch, and passes until it is met, also after a
            segment must be exact. Else every sample stops by itself, costs nothing more afterwards, and does not
            depend on the samples around it.
        refresh: one more pass over a settled segment, so that its keys and values are those of its tokens.
        guess: what an iteration starts from: the ``"noise"`` of a token, or ``"zeros"``.
        clamp: largest magnitude of a guess; None for no bound. Extreme guesses can overflow.

    Raises:
        ValueError: an argument out of its range.
    """

    segment: int = 16
    threshold: float = 1e-3
    max_iterations: int = 32
    growth: int = 4
    grow_after: int | None = None
    faithful: bool = False
    refresh: bool = False
    guess: Guess = "noise"
    clamp: float | None = None

    def __post_init__(self) -> None:
        for name in ("segment", "max_iterations", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")
        if self.guess not in get_args(Guess):
            raise ValueError(f"guess must be one of {get_args(Guess)}, got {self.guess!r}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive or None, got {self.clamp}")

    def __call__(self, run: BlockRun, settled: Settled) -> None:
        """See `InverseMethod.__call__`."""
        if self.guess == "zeros":
            run.inputs[:, 1:] = 0
        for start, stop in self.segments(run.steps):
            (self._together if self.faithful else self.settle)(run, start, stop)
            if self.refresh:
                run.rewind(start)
                run.evaluate(start, stop)
            settled(stop)

    def segments(self, steps: int) -> Iterator[tuple[int, int]]:
        """First and last place (excluded) of every segment."""
        start, change = 0, steps if self.grow_after is None else self.grow_after
        while start < steps:
            stop = min(steps, start + self.segment * (self.growth if start >= change else 1))
            yield start, stop
            start = stop

    def _pass(self, run: BlockRun, start: int, stop: int, exact: int = 0) -> Tensor:
        """One pass over a segment without its first ``exact`` inputs, whose keys are kept.

        Returns:
            Pairs (mean square of the change, of the tokens) over the whole segment, shape (B, 2).
        """
        begin = start + exact
        run.rewind(begin)
        old = run.inputs[:, begin + 1 : stop + 1].clone()
        new, log_scales = run.evaluate(begin, stop)
        if self.clamp is not None:
            new = new.clamp(-self.clamp, self.clamp)
        run.settle(begin, new, log_scales)
        size = run.inputs[:, start + 1 : stop + 1].square().flatten(1).mean(1)
        change = (new - old).square().flatten(1).sum(1) / ((stop - start) * new.shape[2])
        return torch.stack([change, size], dim=1)

    def _together(self, run: BlockRun, start: int, stop: int) -> None:
        for _ in range(self.max_iterations):
            change, size = self._pass(run, start, stop).mean(0).tolist()
            if change < self.threshold * size:
                return

    def settle(self, run: BlockRun, start: int, stop: int) -> int:
        """Iterate one segment, every sample until it has settled.

        Token i is exact after pass i, and its keys after the next one: each pass leaves one more input out.

        Returns:
            Tokens of the segment that are known: all, or the exact ones where ``max_iterations`` came first.
        """
        part, alive, k = run, torch.arange(len(run.inputs), device=run.inputs.device), 0
        while len(alive) and k < min(self.max_iterations, stop - start):
            pairs = self._pass(part, start, stop, k).tolist()  # one look at the device in a pass
            moving = [not change < self.threshold * size for change, size in pairs]  # what is not a number moves
            k += 1
            if not all(math.isfinite(change) for change, _ in pairs):
                _restart(part, start + k, stop)
            if not all(moving):
                part, alive = _without_settled(run, part, alive, moving, start, stop)
        if part is not run:
            run.put(alive, part, start, stop)
            run.passes = part.passes
        run.rewind(stop)
        return k if len(alive) else stop - start


def _without_settled(
    run: BlockRun, part: BlockRun, alive: Tensor, moving: list[bool], start: int, stop: int
) -> tuple[BlockRun, Tensor]:
    """The samples that still move, as a copy, after those of ``part`` have been written to ``run``."""
    passes = part.passes
    if part is not run:
        run.put(alive, part, start, stop)
    alive = alive[torch.tensor(moving, device=alive.device)]
    part = run.rows(alive) if len(alive) else run
    part.passes = passes
    return part, alive


def _restart(run: BlockRun, start: int, stop: int) -> None:
    """Guess the inputs that overflowed afresh, but the exact one at ``start``: attention would spread them."""
    guess = run.inputs[:, start + 1 : stop + 1]
    guess.copy_(torch.where(guess.isfinite(), guess, run.noise[:, start:stop]))


@dataclass(frozen=True)
class Automatic(InverseMethod):
    """`Sequential` or `Jacobi`, for each block by an estimate of what both cost, corrected by what happens.

    A pass over n tokens of R rows costs a fixed time for every layer, and that of its arithmetic. Where a segment is
    expected to settle in fewer passes than pay, it is iterated. The next one is twice as long if that is cheaper a
    token; and once a segment does not settle while it pays, the rest of the block goes token by token. A block whose
    parameters are spread over devices goes token by token: all of them must make equally many passes.

    Args:
        segment: fewest tokens of the first segment; as many as the overhead of a pass hides, where that is more.
        threshold: see `Jacobi`; small, so that both methods agree for the eye.
        iterations: passes that the first segment is expected to need.

    Raises:
        ValueError: see `Jacobi`.
    """

    segment: int = 16
    threshold: float = 1e-5
    iterations: float = 5.0

    def __post_init__(self) -> None:
        self.jacobi()

    def __call__(self, run: BlockRun, settled: Settled) -> None:
        """See `InverseMethod.__call__`."""
        start, cost = 0, Cost.of(run)
        length = self._first(cost)
        while start < run.steps and self.choose(run) != Sequential():
            stop, before = min(run.steps, start + length), run.passes
            start += replace(self.jacobi(), max_iterations=cost.worth(stop - start)).settle(run, start, stop)
            settled(start)
            if start < stop:
                break
            taken = run.passes - before
            if cost.passes(taken + 1, 2 * length) < 2 * cost.passes(taken, length):
                length *= 2
        Sequential().after(start, run, settled)

    def _first(self, cost: Cost) -> int:
        return max(self.segment, cost.cheap())

    def jacobi(self) -> Jacobi:
        """The other method."""
        return Jacobi(segment=self.segment, threshold=self.threshold)

    def choose(self, run: BlockRun) -> InverseMethod:
        """The method to begin with."""
        cost = Cost.of(run)
        tokens = min(self._first(cost), run.steps)
        pays = cost.passes(self.iterations, tokens) < cost.passes(tokens, 1)
        return self.jacobi() if pays and not is_sharded(run.block) else Sequential()


@dataclass(frozen=True)
class PerBlock(InverseMethod):
    """A method for each block, such as `calibrate` finds (GS-Jacobi: hard blocks in more segments than easy ones).

    Args:
        methods: in the order of the blocks of the network, the deep one last.

    Raises:
        ValueError: no method.
    """

    methods: Sequence[InverseMethod] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods must have one for each block of the network, got none")

    def __call__(self, run: BlockRun, settled: Settled) -> None:
        """A block has its own method.

        Raises:
            ValueError: always; see `of_block`.
        """
        raise ValueError("PerBlock has a method for each block of a network, none for a block alone")

    def of_block(self, index: int) -> InverseMethod:
        """See `InverseMethod.of_block`.

        Raises:
            ValueError: there is no method for this block.
        """
        if index >= len(self.methods):
            raise ValueError(f"methods has {len(self.methods)} entries, but the network has a block {index}")
        return self.methods[index]
