r"""A velocity of the straight path from a network whose input and target have unit variance at every time.

Let :math:`x_t = t\,x_1 + (1 - t)\,x_0` with noise and data of variance 1, and :math:`s(t) = (t^2 + (1 - t)^2)^{-1/2}`.
Then :math:`s\,x_t` has variance 1. What :math:`x_t` by itself tells of the velocity is handed past the network,

.. math:: v = (2 t - 1)\, s^2 x_t + s\, F(s\, x_t, t), \qquad F = s \left((1 - t)\, x_1 - t\, x_0\right),

so that the target of F has variance 1 and is uncorrelated with its input. At t = 1 it is :math:`-x_0`, at t = 0
:math:`x_1`: at neither end does the network have to copy what it was given. A plain network has to carry all of its
input through its layers to the output, which costs a joint state of many channels most of a narrow network.

References:
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), where F is called v.
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine, 2022).
"""

from __future__ import annotations

from torch import Tensor

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.paths import expand
from lightning_flows.networks.wrapper import Wrapper


class Preconditioned(Wrapper):
    """The velocity network above, for `flow.Linear` paths and data of about unit variance.

    Args:
        network: F: called with ``(s x, t, condition)``.

    Attributes:
        shape: shape (C, H, W) of ``network``.
        streams: streams of ``network``.
        in_channels: channels of ``network``.
    """

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Velocity at ``x`` (B, C, H, W) and ``t`` () or (B,); shape of ``x``, at least float32."""
        time = expand(t, x)
        variance = time.square() + (1 - time).square()  # 1 / s^2
        s = variance.rsqrt()
        inside = self.network((s * x).to(x.dtype), t, condition)
        return (2 * time - 1) / variance * x + s * inside
