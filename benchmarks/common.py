"""How times are compared: as ratios within one run, so that a busy machine weighs on both sides alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Timing(NamedTuple):
    """Median CPU seconds of a contender, and the median over rounds of its ratio to the bare one."""

    seconds: float
    ratio: float


def compare(contenders: dict[str, Callable[[], Any]], rounds: int, bare: str) -> dict[str, Timing]:
    """Time each contender once per round, in an order that rotates, after one run of each to warm up.

    Times are CPU seconds of this process. A ratio sets two times of the same round against each other, and
    the median over rounds is taken of the ratios, so that a slow spell of the machine cancels out.

    Args:
        contenders: name -> function without arguments.
        rounds: number of rounds.
        bare: name of the contender that is the measure.

    Raises:
        ValueError: no round, or ``bare`` is not among the contenders.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if bare not in contenders:
        raise ValueError(f"bare must be one of {sorted(contenders)}, got {bare!r}")
    names = list(contenders)
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = time.process_time()
            contenders[name]()
            seconds[name].append(time.process_time() - start)
    return {name: _timing(seconds[name], seconds[bare]) for name in names}


def _timing(own: list[float], bare: list[float]) -> Timing:
    ratios = [a / max(b, 1e-9) for a, b in zip(own, bare, strict=True)]
    return Timing(statistics.median(own), statistics.median(ratios))


STEP_PARTS = ("forward", "backward", "optimizer")


class Stepping(Protocol):
    """A contender that takes training steps.

    Attributes:
        parts: seconds of each part of a step, by its name in `STEP_PARTS`, one for each step that was timed.
    """

    parts: dict[str, list[float]]

    def step(self) -> None:
        """Take a step."""

    def timed(self) -> None:
        """Take a step and add its seconds to ``parts``."""


def measure(made: Mapping[str, Stepping], rounds: int) -> None:
    """One step of each per round, in an order that rotates, after two steps of each to warm up."""
    names = list(made)
    for name in names + names:
        made[name].step()
    for contender in made.values():
        contender.parts = {name: [] for name in STEP_PARTS}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            made[name].timed()


def ratio(own: list[float], bare: list[float]) -> float:
    """Median over rounds of the ratios of two times."""
    return statistics.median(a / b for a, b in zip(own, bare, strict=True))


def single_thread() -> None:
    """One thread for torch; the libraries below it listen to the environment before they are loaded."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import torch

    torch.set_num_threads(1)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in lines)


def show(text: str) -> None:
    """One line (or table) on standard output."""
    sys.stdout.write(text + "\n")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share: ``--json FILE``."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", type=Path, help="also write the figures to this file")
    return out


def finish(figures: dict[str, Any], failed: list[str], file: Path | None) -> None:
    """Write the figures where asked, and end with status 1 and the reasons where a bar was missed."""
    if file is not None:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        partial.replace(file)
    for reason in failed:
        show(f"MISSED: {reason}")
    if failed:
        raise SystemExit(1)
