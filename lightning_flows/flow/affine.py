r"""Affine autoregressive transforms of tokens, and how two of them are combined into a guided one.

Given the tokens before it, token x_i of data is Gaussian in a normalizing flow of the TARFlow family,

.. math:: x_i \mid x_{<i} \sim N(\mu_i, \operatorname{diag} \sigma_i^2), \qquad z_i = (x_i - \mu_i) / \sigma_i .

Guidance combines the Gaussian under a condition (c) with the one without it (u). With ``scale`` = 1 + w, 1 is off, and
then the unconditional Gaussian is not computed.

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025): TARFlow, and `LogLinear`.
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025): `GaussianProduct`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Guided = Literal["both", "scale", "mean"]


class Affine(NamedTuple):
    """The Gaussian of tokens, float32 (or float64).

    Attributes:
        mean: mu, shape (B, N, D).
        log_scale: log sigma, shape (B, N, D).
    """

    mean: Tensor
    log_scale: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        """``z = (x - mu) / sigma`` of x (B, N, D)."""
        return (x - self.mean) * torch.exp(-self.log_scale)

    def apply(self, z: Tensor) -> Tensor:
        """``x = mu + sigma z`` of z (B, N, D): the inverse of `normalize`."""
        return torch.addcmul(self.mean, torch.exp(self.log_scale), z)

    def rows(self, index: slice | Tensor) -> Affine:
        """The Gaussians of some samples."""
        return Affine(self.mean[index], self.log_scale[index])


@dataclass(frozen=True)
class AffineGuidance(ABC):
    """A rule ``(conditional, unconditional) -> guided`` for the Gaussians of tokens.

    Args:
        scale: strength; 1 is off.

    Raises:
        ValueError: a scale below 1 or not finite.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise ValueError(f"scale must be a finite number >= 1 (1 is off), got {self.scale!r}")

    @property
    def off(self) -> bool:
        """Whether the rule changes nothing, so that the unconditional Gaussian is not needed."""
        return self.scale == 1

    @property
    def null_temperature(self) -> float:
        """Temperature of the attention in the unconditional branch."""
        return 1.0

    def guides(self, deep: bool) -> bool:
        """Whether a block is guided: the deep one (the first at sampling), or another."""
        return not self.off

    @abstractmethod
    def __call__(self, conditional: Affine, unconditional: Affine, progress: Tensor) -> Affine:
        """The guided Gaussian, each (B, N, D).

        Args:
            conditional: under the condition.
            unconditional: without it.
            progress: share of the tokens that are known when a token has been drawn, in (0, 1], shape (N,).
        """


@dataclass(frozen=True)
class GaussianProduct(AffineGuidance):
    r"""STARFlow's rule: the Gaussian of the product :math:`p_c\,(p_c / p_u)^w`, with the ratio of variances clipped.

    .. math::

        s = \min(\sigma_c / \sigma_u, 1)^2, \qquad
        \sigma' = \frac{\sigma_c}{\sqrt{1 + w - w s}}, \qquad
        \mu' = \mu_c + \frac{w s}{1 + w - w s}\,(\mu_c - \mu_u), \qquad w = \text{scale} - 1 .

    Equal variances give the linear rule of classifier-free guidance; a less certain unconditional Gaussian is heard
    less, so that large scales do not blow up.

    Args:
        scale: strength; 1 is off.
        deep_only: guide the deep block alone, also where other blocks see the condition.
    """

    deep_only: bool = False

    def guides(self, deep: bool) -> bool:
        """See `AffineGuidance.guides`."""
        return super().guides(deep) and (deep or not self.deep_only)

    def __call__(self, conditional: Affine, unconditional: Affine, progress: Tensor) -> Affine:
        """See `AffineGuidance.__call__`; the same rule at every token."""
        w = self.scale - 1
        s = torch.exp(2 * (conditional.log_scale - unconditional.log_scale).clamp(max=0))
        wider = 1 + w - w * s
        mean = conditional.mean + w * s / wider * (conditional.mean - unconditional.mean)
        return Affine(mean, conditional.log_scale - 0.5 * wider.log())


@dataclass(frozen=True)
class LogLinear(AffineGuidance):
    r"""TARFlow's rule: linear extrapolation of the logarithm of the scale and of the mean.

    .. math::

        \log\sigma' = \log\sigma_c + w_i (\log\sigma_c - \log\sigma_u), \qquad
        \mu' = \mu_c + w_i (\mu_c - \mu_u), \qquad w = \text{scale} - 1,

    with :math:`w_i = w`, or rising linearly with the token (``annealed``).

    Args:
        scale: strength; 1 is off.
        annealed: raise the strength from 0 at the first token to ``scale`` at the last.
        temperature: of the attention in the unconditional branch. A model without condition can be guided too: its
            worse branch is itself at a temperature other than 1.
        what: extrapolate the ``"scale"``, the ``"mean"`` or ``"both"``.

    Raises:
        ValueError: a scale below 1, a temperature that is not positive, an unknown ``what``.
    """

    annealed: bool = False
    temperature: float = 1.0
    what: Guided = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        if self.what not in get_args(Guided):
            raise ValueError(f"what must be one of {get_args(Guided)}, got {self.what!r}")

    @property
    def null_temperature(self) -> float:
        """See `AffineGuidance.null_temperature`."""
        return self.temperature

    def __call__(self, conditional: Affine, unconditional: Affine, progress: Tensor) -> Affine:
        """See `AffineGuidance.__call__`."""
        w = (self.scale - 1) * (progress[:, None] if self.annealed else torch.ones_like(progress)[:, None])  # (N, 1)
        mean, log_scale = conditional
        if self.what != "scale":
            mean = mean + w * (mean - unconditional.mean)
        if self.what != "mean":
            log_scale = log_scale + w * (log_scale - unconditional.log_scale)
        return Affine(mean, log_scale)


def log_normal(z: Tensor, std: Tensor | None = None) -> Tensor:
    """Log-density of z (B, ...) under independent normals of mean 0, in nats, float32, shape (B,)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if std is None:
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return (-0.5 * (z / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
