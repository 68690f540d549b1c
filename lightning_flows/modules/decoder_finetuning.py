r"""Training a decoder on noisy latents while the encoder stays as it is: what is frozen, and how much noise there is.

A normalizing flow is trained on latents with noise, so it draws latents with noise. With the codec's scale and the
flow's own statistics it sees

.. math:: z = ((u - \text{shift}) \cdot \text{scale} - \text{latent\_shift}) \cdot \text{latent\_scale} + \sigma\,
    \epsilon, \qquad \epsilon \sim N(0, I),

of the autoencoder's own latents u, on which that is noise of deviation
:math:`\sigma / (\text{latent\_scale} \cdot \text{scale})`. A decoder trained on it needs no other denoiser.

Reference: STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu, Chen, Berthelot, Zheng,
Wang, Zhang, Dinh, Bautista, Susskind, Zhai, 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from lightning_flows.flow import Noise

Trained = Literal["all", "decoder"]


def deviations(given: float | Sequence[float], channels: int | None) -> list[float]:
    """Deviations of the noise: one for all channels, or one for each.

    Args:
        given: the argument ``latent_noise``.
        channels: of a latent, None where they are not known.

    Raises:
        ValueError: a number that is negative or not finite, or not one number for each channel.
    """
    values = list(given) if isinstance(given, Sequence) else [given]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"latent_noise must be finite and not negative, got {given}")
    if isinstance(given, Sequence) and (not values or channels not in (None, len(values))):
        raise ValueError(
            f"latent_noise must be a number, or a list of one for each of the {channels} channels of a "
            f"latent, got {values}"
        )
    return [float(value) for value in values]


def with_noise(u: Tensor, sigma: Sequence[float], scaling_factor: float, noise: Noise) -> Tensor:
    """``u + sigma / scaling_factor * normal`` of an autoencoder's own latents u (B, c, h, w); keyed "latent_noise".

    Args:
        u: latents.
        sigma: deviation in units of ``scaling_factor * u``, one or c.
        scaling_factor: of the autoencoder.
        noise: where the normal numbers come from.
    """
    if not any(sigma):
        return u
    deviation = u.new_tensor(sigma).view(-1, 1, 1) / scaling_factor
    return u + deviation * noise.normal("latent_noise", like=u)


def frozen_parts(network: nn.Module, trained: Trained) -> list[nn.Module]:
    """What stays as it is: nothing, or what encodes; frozen here.

    Raises:
        ValueError: an unknown choice, or a network that does not say what encodes.
    """
    if trained not in get_args(Trained):
        raise ValueError(f"trained must be one of {get_args(Trained)}, got {trained!r}")
    parts = list(getattr(network, "encoder_parts", [])) if trained == "decoder" else []
    if trained == "decoder" and not parts:
        raise ValueError(f"trained='decoder' needs a network with encoder_parts, got {type(network).__name__}")
    for part in parts:
        part.requires_grad_(False).eval()
    return parts
