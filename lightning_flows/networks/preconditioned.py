r"""A velocity of the straight path from a network that need not copy its input, and is not shown noise as data.

Let :math:`x_t = t\,x_1 + (1 - t)\,x_0` with noise and data of variance 1, and :math:`s(t) = (t^2 + (1 - t)^2)^{-1/2}`.
What :math:`x_t` by itself tells of the velocity is handed past the network,

.. math:: v = (2 t - 1)\, s^2 x_t + s\, F(\hat x, t), \qquad F = s \left((1 - t)\, x_1 - t\, x_0\right),

so that the target of F has variance 1 and is uncorrelated with :math:`x_t`. At t = 1 it is :math:`-x_0`, at t = 0
:math:`x_1`: at neither end does the network have to carry its input through its layers to the output.

F sees each channel as the best linear estimate of its clean end, :math:`\hat x = t\, s^2 x_t` of data and
:math:`(1 - t)\, s^2 x_t` of channels that are clean at t = 0, such as the codes of SymmFlow. So a channel that holds
nothing but noise is silent. Where ten planes of a label are noise and one holds the image, a narrow network else takes
long to find the image.

Planes of a label are the same at every place while they are clean, so that their mean over the places is all that there
is to know, and how :math:`x_t` departs from it is noise: with a deviation of the clean planes of variance
:math:`\tau^2`, nearly 0, its best linear estimate of the velocity is

.. math:: v' = \frac{t - (1 - t)\,\tau^2}{t^2 + (1 - t)^2 \tau^2}\, x_t', \qquad x_t' = x_t - \bar x_t .

The network sees the mean alone, and only the mean of what it says counts: places vote on a label.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine, 2022).
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), where F is called v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.paths import expand
from lightning_flows.networks.layers import at_least_float32
from lightning_flows.networks.wrapper import Wrapper

DEVIATION = 0.01  # tau: of clean planes from their mean; not 0, so that the velocity at t = 0 is finite


class Preconditioned(Wrapper):
    """The velocity network above, for `flow.Linear` paths and data of about unit variance.

    Args:
        network: F: called with ``(estimate of x, t, condition)``.
        codes: number of last channels that are clean at t = 0 and noise at t = 1.
        constant: number of the last of them whose clean planes are the same at every place: labels, not masks.

    Attributes:
        shape: shape (C, H, W) of ``network``.
        streams: streams of ``network``.
        in_channels: channels of ``network``.

    Raises:
        ValueError: a negative number of codes, or more that are constant.
    """

    def __init__(self, network: nn.Module, *, codes: int = 0, constant: int = 0) -> None:
        super().__init__(network)
        if codes < 0:
            raise ValueError(f"codes must not be negative, got {codes}")
        if not 0 <= constant <= codes:
            raise ValueError(f"constant must lie between 0 and codes={codes}, got {constant}")
        self.codes, self.constant = codes, constant

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Velocity at ``x`` (B, C, H, W) and ``t`` () or (B,); shape of ``x``, at least float32.

        Raises:
            ValueError: fewer channels than codes.
        """
        if x.shape[1] < self.codes:
            raise ValueError(f"x must have more channels than the {self.codes} codes, got shape {tuple(x.shape)}")
        time = expand(t, x)
        variance = time.square() + (1 - time).square()  # 1 / s^2
        seen = self._voted(x)
        inside = self.network((self.shares(time, x) / variance * seen).to(x.dtype), t, condition)
        velocity = (2 * time - 1) / variance * seen + variance.rsqrt() * self._voted(inside)
        if not self.constant:
            return velocity
        of_noise = time.square() + (1 - time).square() * DEVIATION**2  # variance of x - seen
        return velocity + (time - (1 - time) * DEVIATION**2) / of_noise * (x - seen)

    def _voted(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) with each of the constant planes at its mean, which is taken in float32."""
        if not self.constant:
            return x
        planes = x[:, -self.constant :]
        mean = at_least_float32(planes).mean((2, 3), keepdim=True)  # (B, L, 1, 1)
        return torch.cat([x[:, : -self.constant], mean.to(x.dtype).expand_as(planes)], dim=1)

    def shares(self, time: Tensor, x: Tensor) -> Tensor:
        """Factor of the clean end of every channel of ``x`` at ``time``, broadcasting over ``x``."""
        if not self.codes:
            return time
        data = x.shape[1] - self.codes
        late = (torch.arange(x.shape[1], device=x.device) >= data)[:, None, None]  # (C, 1, 1)
        return torch.where(late, 1 - time, time)
