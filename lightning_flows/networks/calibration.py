r"""Which inverse suits which block: measured once on real data (GS-Jacobi).

Blocks of a trained flow differ: most settle in a few passes over all tokens at once, one or two need many. So each
block gets its own number of segments and its own first guess, by what they cost on data whose noise one pass tells.

References:
    Accelerate TarFlow Sampling with GS-Jacobi Iteration (Liu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.block_run import BlockRun
from lightning_flows.networks.flow_block import Context, FlowBlock
from lightning_flows.networks.flow_stack import FlowStack
from lightning_flows.networks.inverse_methods import Guess, InverseMethod, Jacobi, PerBlock, Sequential
from lightning_flows.networks.pass_cost import Cost
from lightning_flows.networks.rotary import Rotation


class _Known(NamedTuple):
    """A block with data before it and the noise that it makes of them, each (B, N, D)."""

    block: FlowBlock
    x: Tensor
    z: Tensor
    context: Context
    rotation: Rotation | None


@torch.no_grad()
def calibrate(
    network: FlowStack,
    x: Tensor,
    condition: Condition | None = None,
    *,
    threshold: float = 1e-3,
    segments: Sequence[int] = (1, 2, 4, 8),
    guesses: Sequence[Guess] = ("noise", "zeros"),
    max_iterations: int = 32,
    accuracy: float | None = None,
    overhead: float | None = None,
) -> PerBlock:
    """The cheapest way to invert each block, found on data.

    A pass over n tokens costs ``overhead + n``; `Sequential` is always among the candidates. A candidate counts only
    if the relative mean square of its error against the data is at most ``accuracy``.

    Args:
        network: trained.
        x: data as the network reads them, with their noise, shape (B, C, H, W); a batch of the size of later samples.
        condition: of the data; None for none.
        threshold: see `Jacobi`.
        segments: numbers of segments to try.
        guesses: first guesses to try.
        max_iterations: see `Jacobi`.
        accuracy: of the tokens that a block gives back; ``threshold`` by default.
        overhead: what a pass costs beside its tokens, in tokens: large for small batches, 0 counts arithmetic alone. By
            default an estimate for this batch on this device (`Cost`).

    Returns:
        A method for each block, to be given as ``method``; frozen dataclasses, as a config can hold them.

    Raises:
        ValueError: no segment, or a negative overhead.
    """
    if not segments or min(segments) < 1:
        raise ValueError(f"segments must be numbers of at least 1, got {list(segments)}")
    if overhead is not None and not overhead >= 0:
        raise ValueError(f"overhead must not be negative, got {overhead}")
    allowed = threshold if accuracy is None else accuracy
    return PerBlock([_cheapest(known, threshold, segments, guesses, max_iterations, allowed, overhead)
                     for known in _known(network, x, condition)])  # fmt: skip


def _known(network: FlowStack, x: Tensor, condition: Condition | None) -> list[_Known]:
    training = network.training
    encoded = network.eval()(x, condition, states=True)
    network.train(training)
    states = [*encoded.states, network.patchify(encoded.z)]
    contexts, rotations = network.contexts(condition, len(x)), network.rotations(*network.grid(x), x.device)
    return [_Known(*parts) for parts in zip(network.stack, states, states[1:], contexts, rotations, strict=False)]


def _cheapest(
    known: _Known,
    threshold: float,
    segments: Sequence[int],
    guesses: Sequence[Guess],
    max_iterations: int,
    accuracy: float,
    overhead: float | None,
) -> InverseMethod:
    if not len(known.block.attn_blocks):
        return Sequential()
    steps = known.x.shape[1] - (known.block.sos_embed is None)  # the first token is copied
    if overhead is None:
        estimate = Cost.of(BlockRun(known.block, known.z, known.context, known.rotation))
        overhead = estimate.fixed / estimate.work
    best: InverseMethod = Sequential()
    least = steps * (overhead + 1)
    for count in dict.fromkeys(min(count, steps) for count in segments):
        for guess in guesses:
            method = Jacobi(-(-steps // count), threshold, max_iterations, guess=guess)
            passes, error = _tried(known, method)
            cost = passes * (overhead + method.segment)
            if cost < least and error <= accuracy:  # an error that is not a number is none
                best, least = method, cost
    return best


def _tried(known: _Known, method: InverseMethod) -> tuple[int, float]:
    """Passes that a method needs, and the relative mean square of its error."""
    run = BlockRun(known.block, known.z, known.context, known.rotation)
    method(run, lambda count: None)
    error = (run.result()[0] - known.x).square().mean() / known.x.square().mean()
    return run.passes, float(error)
