"""Learning-rate schedules in optimizer steps, as classes that a recipe can name."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupConstant(LambdaLR):
    """A linear rise over ``warmup_steps`` optimizer steps, then a constant rate.

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: steps of the rise; step 1 has 1 / warmup_steps of the rate.
        last_epoch: see torch's schedulers.

    Raises:
        ValueError: a negative ``warmup_steps``.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        super().__init__(optimizer, lambda step: _rise(step, warmup_steps), last_epoch)


class WarmupCosine(LambdaLR):
    """A rise, then half a cosine down to ``final`` times the rate at ``total_steps``, constant after that.

    The one-cycle schedule of SymmFlow over N steps, W of them to warm up, is ``total_steps=N - 1, warmup_steps=W - 1,
    rise="cosine"`` with ``start`` and ``final`` 1e-6 over the rate: it ends with its last step, not after it.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps until the end of the cosine.
        warmup_steps: steps of the rise.
        final: fraction of the rate at the end.
        start: fraction of the rate at which the rise begins, so that step k has
            ``start + (1 - start) k / warmup_steps``, as in TARFlow and STARFlow. None rises as `WarmupConstant` does.
        first: fraction of the rate at step 0 alone; None follows the curve. The official STARFlow code takes it from
            ``final``, whatever the rise begins at.
        rise: ``"linear"``, or ``"cosine"``: half a cosine up.
        last_epoch: see torch's schedulers.

    Raises:
        ValueError: an unknown ``rise``; unless ``0 <= warmup_steps < total_steps``, and the fractions lie in [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        final: float = 0.0,
        last_epoch: int = -1,
        start: float | None = None,
        first: float | None = None,
        rise: Literal["linear", "cosine"] = "linear",
    ) -> None:
        if rise not in ("linear", "cosine"):
            raise ValueError(f"rise must be 'linear' or 'cosine', got {rise!r}")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps must lie in [0, total_steps={total_steps}), got {warmup_steps}")
        for name, value in (("final", final), ("start", start), ("first", first)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")

        def factor(step: int) -> float:
            if step == 0 and first is not None:
                return first
            done = min(1.0, max(0.0, (step - warmup_steps) / (total_steps - warmup_steps)))
            return _rise(step, warmup_steps, start, rise) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

        super().__init__(optimizer, factor, last_epoch)


def _rise(step: int, warmup_steps: int, start: float | None = None, rise: str = "linear") -> float:
    if step >= warmup_steps:
        return 1.0
    done = step / warmup_steps if start is not None else (step + 1) / warmup_steps
    if rise == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return done if start is None else start + (1 - start) * done
