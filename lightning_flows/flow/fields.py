"""From a network to the vector field that a solver integrates.

`Velocity` is a network seen as a velocity, whatever it predicts; `Field` is a velocity with its condition and
its guidance bound, a function of the point and the time only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.guidance import Guidance
from lightning_flows.flow.paths import Linear, Path, Quantity


class Network(Protocol):
    """What the mathematics asks of a network: a prediction shaped like ``x``, and what "no condition" means.

    Attributes:
        streams: names of the condition streams that it knows; empty for an unconditional network.
    """

    streams: tuple[str, ...]

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Prediction at ``x`` (B, ...) and ``t`` () or (B,), shape (B, ...)."""

    def null(self, condition: Condition | None, batch_size: int) -> Condition:
        """The condition of ``batch_size`` samples without any condition."""


class Velocity:
    """A network that predicts velocity, data, noise or score, seen as a velocity.

    The point is handed to the network in its own dtype; the conversion runs in float32 (or float64).

    Args:
        network: see `Network`.
        path: the path that it was trained on.
        prediction: what it predicts.
        floor: smallest magnitude of the coefficient by which a conversion divides (see `Path.convert`):
            without it noise and score prediction are singular at t = 0, data prediction at t = 1.
    """

    def __init__(
        self,
        network: Network,
        path: Path | None = None,
        prediction: Quantity = "velocity",
        floor: float = 0.02,
    ) -> None:
        self.network, self.path, self.prediction, self.floor = network, path or Linear(), prediction, floor

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Velocity at ``x`` (B, ...) and ``t`` () or (B,), shape and dtype of ``x``."""
        value = self.network(x, t, condition).to(x.dtype)
        if self.prediction == "velocity":
            return value
        return self.path.convert(value, x, t, given=self.prediction, to="velocity", floor=self.floor)

    def null(self, condition: Condition | None, batch_size: int) -> Condition:
        """See `Network.null`."""
        return self.network.null(condition, batch_size)

    @property
    def streams(self) -> tuple[str, ...]:
        """See `Network.streams`."""
        return tuple(self.network.streams)


def evaluate(
    velocity: Velocity, x: Tensor, t: Tensor, condition: Condition | None = None, guidance: Guidance | None = None
) -> Tensor:
    """The guided velocity at ``x`` (B, ...) and ``t`` () or (B,), shape (B, ...).

    Whatever a solver asks of a model goes through this one function, so that it can be compiled as a whole: both
    branches of the guidance, the conversion to a velocity and the combination.
    """
    if guidance is None:
        return velocity(x, t, condition)
    return guidance(velocity, x, t, condition)


class Field:
    """A velocity with its condition and its guidance bound: ``field(x, t) -> velocity``.

    Args:
        velocity: network as a velocity.
        condition: of the whole batch, or None.
        guidance: how conditional and unconditional velocities are mixed; None is the conditional velocity
            alone.
        compiled: stands in for `evaluate`, such as its compiled form; not used where the field is stateful,
            whose counts would be compiled into it.

    Attributes:
        path: path of the velocity, for solvers that need the score.
        guidance: fresh copy of the guidance, with empty state.
    """

    def __init__(
        self,
        velocity: Velocity,
        condition: Condition | None = None,
        guidance: Guidance | None = None,
        *,
        compiled: Callable[..., Tensor] | None = None,
    ) -> None:
        self.velocity, self.condition, self.path = velocity, condition, velocity.path
        self.guidance = guidance.begin() if guidance is not None else None
        self._evaluate = compiled if compiled is not None and not self.stateful else evaluate

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity at ``x`` (B, ...) and ``t`` (), shape (B, ...)."""
        return self._evaluate(self.velocity, x, t, self.condition, self.guidance)

    @property
    def stateful(self) -> bool:
        """Whether the value depends on the calls before (then only fixed-step solvers may use it)."""
        return self.guidance is not None and self.guidance.stateful


def score_noise(path: Path, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The noise E[x0 | x_t = x] (B, ...) behind a velocity; the score is ``-E / sigma(t)``.

    Finite at both ends, unlike the score, which is why stochastic solvers are written with it.
    """
    return path.convert(velocity, x, torch.as_tensor(t, dtype=x.dtype), given="velocity", to="noise")
