"""Parts of a model by the names of their parameters: patterns, and how deep a parameter lies.

A pattern is a name or has the wildcards of `fnmatch`: ``network.blocks.0.*`` is all of the first block.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_flows.networks.parallel import blocks_of


def matching(names: Iterable[str], patterns: Sequence[str], *, argument: str) -> list[str]:
    """The names that fit a pattern, in order.

    Args:
        names: of parameters.
        patterns: names or patterns.
        argument: what the caller calls ``patterns``, for the error.

    Raises:
        ValueError: a string in the place of a list, or a pattern that fits nothing.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} is a string; give a list of names or patterns")
    names = list(names)
    hits = {pattern: {name for name in names if _fits(name, pattern)} for pattern in patterns}
    if idle := [pattern for pattern, found in hits.items() if not found]:
        raise ValueError(f"{argument}={idle} names no parameter; parameters are called like {_some(names)}")
    found = set().union(*hits.values())
    return [name for name in names if name in found]


def factors_of(names: Iterable[str], factors: Mapping[str, float], *, argument: str) -> dict[str, float]:
    """A factor for every name: that of the first pattern which it fits, else 1.

    Args:
        names: of parameters.
        factors: name or pattern -> factor.
        argument: what the caller calls ``factors``, for the error.

    Raises:
        ValueError: a pattern that fits nothing, or a factor that is not positive.
    """
    names = list(names)
    for pattern, factor in factors.items():
        if not factor > 0:
            raise ValueError(f"{argument}[{pattern!r}] must be positive, got {factor} (to train nothing, freeze it)")
    if factors.keys() <= set(names):  # no patterns: thousands of names are looked up at once
        return {name: factors.get(name, 1.0) for name in names}
    matching(names, list(factors), argument=argument)
    return {name: next((f for pattern, f in factors.items() if _fits(name, pattern)), 1.0) for name in names}


def depths(network: nn.Module) -> tuple[dict[str, int], int]:
    """How deep every parameter of a network lies, and the number of its blocks (see `blocks_of`).

    0 before the first block (embeddings), i + 1 in block i, ``number of blocks + 1`` behind the last one. What stands
    between two blocks counts to the first of them. Before and behind are the order in which parts were registered.

    Raises:
        ValueError: a network without blocks.
    """
    names = [name for name, _ in network.named_parameters()]
    blocks = [f"{block}." for block in blocks_of(network) if any(name.startswith(f"{block}.") for name in names)]
    found, depth = {}, 0
    for name in names:
        inside = next((i for i, block in enumerate(blocks) if name.startswith(block)), None)
        if inside is not None:
            depth = inside + 1
        elif depth == len(blocks):
            depth += 1
        found[name] = depth
    return found, len(blocks)


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _some(names: Sequence[str]) -> list[str]:
    """A handful of names from the first to the last."""
    step = max(1, len(names) // 8)
    return list(names[::step][:9])
