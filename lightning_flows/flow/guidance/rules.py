"""The guidance rules, from plain classifier-free guidance to its refinements."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.guidance.base import Companion, Guidance, Guided, dot, require
from lightning_flows.flow.paths import Path, expand


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance, ``v = v_u + scale (v_c - v_u)``, optionally in an interval of times only.

    Args:
        scale: 1 is off; ImageNet figures use about 1.5, pictures to look at about 4.
        interval: times (noise 0, data 1) in which guidance acts.

    References:
        Classifier-Free Diffusion Guidance (Ho, Salimans, 2022).
        Applying Guidance in a Limited Interval Improves Sample and Distribution Quality (Kynkäänniemi et al.,
        2024).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        return torch.lerp(worse, wanted, self.scale)


@dataclass(frozen=True)
class ZeroStar(Guidance):
    """CFG-Zero*: the null velocity is rescaled to fit the conditional one, and the first calls stand still.

    ``v = s v_u + scale (v_c - s v_u)`` with ``s = <v_c, v_u> / |v_u|^2`` for each sample; the first
    ``zero_init_steps`` calls return zero without calling the network. The count is of velocity calls: these
    are steps with one call a step (Euler); a Heun step has two.

    Args:
        scale: 1 is off, the standing still included.
        interval: times in which guidance acts; the first calls stand still whatever it is.
        zero_init_steps: number of calls that return zero; 0 makes the rule stateless.

    References:
        CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models (Fan et al., 2025).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    zero_init_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.zero_init_steps, bool) or not isinstance(self.zero_init_steps, int):
            raise ValueError(f"zero_init_steps must be an integer >= 0, got {self.zero_init_steps!r}")
        require("zero_init_steps", self.zero_init_steps, self.zero_init_steps >= 0, ">= 0")

    @property
    def stateful(self) -> bool:
        """Whether the first calls differ from later ones."""
        return self.scale != 1 and self.zero_init_steps > 0

    def __call__(self, network: Guided, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """See `Guidance.__call__`."""
        if self.stateful:
            self.memory.calls += 1
            if self.memory.calls <= self.zero_init_steps:
                return torch.zeros_like(x)
        return super().__call__(network, x, t, condition)

    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        fit = dot(wanted, worse) / dot(worse, worse).clamp_min(1e-12)  # (B, 1, ...)
        return torch.lerp((fit * worse).to(worse.dtype), wanted, self.scale)


@dataclass(frozen=True)
class AdaptiveProjected(Guidance):
    r"""Adaptive projected guidance (APG): large scales without oversaturation.

    It acts on data predictions D. Their difference :math:`\Delta = D_c - D_u` is averaged over the calls with
    (negative) momentum, bounded in norm, and its component along :math:`D_c`, which saturates, is weakened:

    .. math:: \Delta_i = D_c - D_u + \beta \Delta_{i-1}, \quad
              \Delta \leftarrow \Delta \min(1, r / |\Delta|), \quad
              D = D_c + (w - 1)(\Delta_\perp + \eta \Delta_\parallel).

    Velocity is linear in the data prediction, :math:`\Delta = k(t)\,(v_c - v_u)`, so the result is written as
    a change of velocity; only the momentum divides by k, which vanishes at t = 1 and is held at ``floor`` or
    above there.

    Args:
        scale: w; 1 is off.
        interval: times in which guidance acts.
        eta: what is kept of the parallel component; 1 is plain guidance, 0 the paper's choice.
        norm_threshold: r, the largest norm of the difference of a sample's data predictions; 0 is no bound.
            It grows with the square root of the data's dimension (the paper takes 15 for 4 x 128 x 128
            latents).
        momentum: beta in (-1, 1); the paper takes -0.5; 0 makes the rule stateless.
        floor: smallest k by which the momentum is divided.

    References:
        Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (Sadat et al.,
        2024).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    floor: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require("eta", self.eta, True, "")
        require("norm_threshold", self.norm_threshold, self.norm_threshold >= 0, ">= 0 (0 is no bound)")
        require("momentum", self.momentum, -1 < self.momentum < 1, "in (-1, 1)")
        require("floor", self.floor, self.floor > 0, "> 0")

    @property
    def stateful(self) -> bool:
        """Whether there is momentum."""
        return self.scale != 1 and self.momentum != 0

    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        k = expand(-path.sigma(t) / path.determinant(t), x)  # data difference per velocity difference
        difference = self._averaged(wanted - worse, k)
        data = path.convert(wanted, x, t, given="velocity", to="data")
        along = dot(difference, data) / dot(data, data).clamp_min(1e-12) * data
        update = difference - (1 - self.eta) * along
        if self.norm_threshold > 0:
            norm = k * dot(difference, difference).sqrt()
            update = update * (self.norm_threshold / norm.clamp_min(self.norm_threshold))
        return (wanted + (self.scale - 1) * update).to(wanted.dtype)

    def _averaged(self, difference: Tensor, k: Tensor) -> Tensor:
        if not self.stateful:
            return difference
        if self.memory.average is not None:
            difference = difference + self.momentum * self.memory.average / k.clamp_min(self.floor)
        self.memory.average = k * difference
        return difference


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """Guidance by a worse version of the network (smaller, or trained for less): ``v_g + scale (v - v_g)``.

    Both get the same condition, so that unconditional networks can be guided, too.

    Args:
        guide: the worse network as a velocity; a companion, never trained by this.
        scale: 1 is off; then the guide is not called.
        interval: times in which guidance acts.

    References:
        Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024).
    """

    guide: Companion = field(repr=False)
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def _branches(self, network: Guided, x: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        return network(x, t, condition), self.guide(x, t, condition)

    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        return torch.lerp(worse, wanted, self.scale)


@dataclass(frozen=True)
class RatioAware(Guidance):
    """Ratio-aware adaptive guidance (RAAG): less guidance where it would change the velocity much.

    ``v = v_u + w (v_c - v_u)`` with ``w = 1 + (scale - 1) exp(-alpha rho)``, ``rho = (|v_c - v_u| /
    |v_u|)^power`` for each sample. The sizes of rho depend on the data: look at them before choosing alpha.

    Args:
        scale: the largest weight, taken where both velocities agree; 1 is off.
        interval: times in which guidance acts.
        alpha: how fast the weight falls with the ratio, >= 0; 0 is plain guidance.
        power: 1 for the ratio of norms, 2 for that of squared norms.

    References:
        RAAG: Ratio Aware Adaptive Guidance (2025, arXiv 2508.03442).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    alpha: float = 12.0
    power: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require("alpha", self.alpha, self.alpha >= 0, ">= 0")
        require("power", self.power, self.power in (1, 2), "1 or 2")

    def ratio(self, wanted: Tensor, worse: Tensor) -> Tensor:
        """Ratio rho of each sample, for velocities (B, ...), shape (B, 1, ...)."""
        difference = wanted - worse
        squared = dot(difference, difference) / dot(worse, worse).clamp_min(1e-12)
        return squared if self.power == 2 else squared.sqrt()

    def _combine(self, wanted: Tensor, worse: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
        weight = 1 + (self.scale - 1) * torch.exp(-self.alpha * self.ratio(wanted, worse))
        return (worse + weight * (wanted - worse)).to(wanted.dtype)
