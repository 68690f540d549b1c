r"""Training objectives: from data and a network to a loss for each sample.

References:
    Flow Matching for Generative Modeling (Lipman et al., 2023).
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024), for the weightings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.couplings import Coupling, Independent
from lightning_flows.flow.noise import Noise
from lightning_flows.flow.paths import QUANTITIES, Linear, Path, PathSample, Quantity, expand
from lightning_flows.flow.premetrics import Premetric, SquaredError, squared_error
from lightning_flows.flow.sources import Gaussian, Source
from lightning_flows.flow.times import TimeSampler, Uniform

Weighting = Literal["uniform", "velocity", "likelihood"]


class Losses(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: loss of each sample, with gradient, shape (B,).
        logs: detached quantities of each sample, among them ``t`` and ``squared_error``, each (B,).
    """

    loss: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class Objective(ABC):
    """``(network, x1, condition, noise) -> Losses``."""

    @abstractmethod
    def __call__(
        self, network: Any, x1: Tensor, condition: Condition | None, noise: Noise, x0: Tensor | None = None
    ) -> Losses:
        """Losses of a batch.

        Args:
            network: called as ``network(x, t, condition)``; its ``drop`` hides conditions during training.
            x1: data, shape (B, ...).
            condition: of the batch, or None.
            noise: every random number of the step.
            x0: noise that was drawn (and coupled) before, for example in a data worker, shape (B, ...).
        """


@dataclass(frozen=True)
class FlowMatching(Objective):
    r"""Regression of a path's velocity, or of data, noise or score, at a random time.

    ==========  =======================================
    prediction  loss of a sample (mean over elements)
    ==========  =======================================
    velocity    ``|network - (d_alpha x1 + d_sigma x0)|^2``
    data        ``|network - x1|^2``
    noise       ``|network - x0|^2``
    score       ``|sigma network + x0|^2``
    ==========  =======================================

    Args:
        path: where x_t lies.
        source: where x0 comes from.
        times: law of the training times.
        coupling: which x0 goes with which x1.
        prediction: what the network predicts.
        weighting: factor on the loss of noise and score prediction: ``velocity`` (w / sigma)^2 makes it the
            loss of the velocity, ``likelihood`` w / sigma^2 that of the likelihood bound, with w of
            `Path.drift`.
        premetric: the distance; the squared error by default.
        floor: smallest divisor in conversions at sampling (see `flow.fields.Velocity`).

    Raises:
        ValueError: an unknown prediction or weighting, a weighting without meaning, score prediction from a
            source that is not Gaussian.
    """

    path: Path = field(default_factory=Linear)
    source: Source = field(default_factory=Gaussian)
    times: TimeSampler = field(default_factory=Uniform)
    coupling: Coupling = field(default_factory=Independent)
    prediction: Quantity = "velocity"
    weighting: Weighting = "uniform"
    premetric: Premetric = field(default_factory=SquaredError)
    floor: float = 0.02

    def __post_init__(self) -> None:
        if self.prediction not in QUANTITIES:
            raise ValueError(f"prediction must be one of {list(QUANTITIES)}, got {self.prediction!r}")
        if self.weighting not in ("uniform", "velocity", "likelihood"):
            raise ValueError(f"weighting must be uniform, velocity or likelihood, got {self.weighting!r}")
        if self.weighting != "uniform" and self.prediction not in ("noise", "score"):
            raise ValueError(f"weighting {self.weighting!r} is for noise and score prediction, not {self.prediction!r}")
        if self.prediction == "score" and not self.source.gaussian:
            raise ValueError("prediction 'score' needs a Gaussian source")

    def __call__(
        self, network: Any, x1: Tensor, condition: Condition | None, noise: Noise, x0: Tensor | None = None
    ) -> Losses:
        """See `Objective.__call__`."""
        if x0 is None:
            x0 = self.source.sample(noise, "source", x1)
            x0, x1, condition = self.coupling(x0, x1, condition)
        t = self.times(len(x1), noise.generator("time")).to(x1.device)  # (B,) float32
        point = self.path.sample(x0, x1, t)
        if condition is not None and getattr(network, "training", False):
            condition = network.drop(condition, noise.generator("drop"))
        prediction, target = self.compare(network(point.x_t, t, condition), point)
        loss = self.premetric(prediction, target) * self.weight(t)
        return Losses(loss, {"t": t, "squared_error": squared_error(prediction, target).detach()})

    def compare(self, output: Tensor, point: PathSample) -> tuple[Tensor, Tensor]:
        """What is compared with what: prediction and target, each (B, ...)."""
        if self.prediction == "score":
            return self.path.sigma(expand(point.t, output)) * output, -point.x0
        return output, {"velocity": point.velocity, "data": point.x1, "noise": point.x0}[self.prediction]

    def weight(self, t: Tensor) -> Tensor | float:
        """Factor on the loss at the times ``t`` (B,), shape (B,)."""
        if self.weighting == "uniform":
            return 1.0
        sigma, w = self.path.sigma(t), self.path.drift(t)[1]
        return (w / sigma) ** 2 if self.weighting == "velocity" else w / torch.square(sigma)
