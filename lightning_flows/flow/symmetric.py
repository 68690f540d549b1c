r"""Symmetrical flow matching: one velocity for a pair that runs in opposite directions.

The image x goes from noise to data while its semantic code y (a mask, a label) goes from data to noise:

.. math:: x_t = t\,x + (1 - (1-\sigma) t)\,e_x, \qquad y_t = t\,e_y + (1 - (1-\sigma) t)\,y .

With :math:`x_0 = (e_x, y)` and :math:`x_1 = (x, e_y)`, side by side on the channels, that is one linear path. At
t = 0 the code is clean, at t = 1 the image is: solved forwards the flow draws, backwards it reads.

Reference:
    Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based Generative
    Models (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow.noise import Noise
from lightning_flows.flow.objectives import Losses
from lightning_flows.flow.paths import Linear, PathSample, expand
from lightning_flows.flow.times import TimeSampler, Uniform

SIGMA_MIN = 1e-4  # of the paper


class Joint(NamedTuple):
    """A pair on its path and what was regressed there.

    Attributes:
        point: the joint path, images first, shape (B, C + S, h, w).
        velocity: what the network predicts there, float32, the same shape.
        code: the estimate of the clean code behind it, shape (B, S, h, w).
        losses: see `SymmetricMatching`.
    """

    point: PathSample
    velocity: Tensor
    code: Tensor
    losses: Losses


@dataclass(frozen=True)
class SymmetricMatching(ABC):  # noqa: B024  (a parser writes plain dataclasses without their class)
    r"""Regression of the two velocities, :math:`w\,L_x + (1 - w)\,L_y`, each a mean over its own elements.

    Args:
        image_weight: w; each part is a mean, so that channel counts do not matter.
        path: a linear path; its ``sigma_min`` is what is left of the noise (and of the code) at the end.
        times: law of the training times.
        read_rate: rate at which a sample is taken at t = 1, where a code is read in one step: a plain regression of
            E[code | image]. Uniform times are near that end too seldom to make it sharp; 0 as published. The image's
            velocity is not regressed there.
        drop_rate: rate at which a part of the code is hidden: noise stands in its place on the whole path, so that the
            network also learns to draw without it (for guidance). Its velocity is then not regressed: at t = 1 a code
            that was hidden cannot be told from one that was not, and reading would tend to nothing.

    Raises:
        ValueError: a weight or rate out of its range, or another path.
    """

    image_weight: float = 0.7
    path: Linear = field(default_factory=lambda: Linear(SIGMA_MIN))
    times: TimeSampler = field(default_factory=Uniform)
    read_rate: float = 0.0
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight must lie in [0, 1], got {self.image_weight}")
        for name in ("read_rate", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not isinstance(self.path, Linear):
            raise ValueError(f"path must be Linear (the code is read along straight lines), got {self.path!r}")

    def time(self, count: int, noise: Noise) -> Tensor:
        """Training times, float32, shape (count,)."""
        t = self.times(count, noise.generator("time"))
        if not self.read_rate:
            return t
        return torch.where(noise.uniform("read", count) < self.read_rate, 1.0, t)

    def hidden(self, count: int, parts: int, noise: Noise) -> Tensor:
        """Which parts of the codes are hidden, each by itself, bool, shape (count, parts)."""
        draws = torch.stack([noise.uniform(f"drop:{part}", count) for part in range(parts)], dim=1)
        return draws < self.drop_rate

    def __call__(self, network: Any, image: Tensor, code: Tensor, noise: Noise, hidden: Tensor | None = None) -> Joint:
        """Losses of a batch.

        Args:
            network: called as ``network(x (B, C + S, h, w), t (B,), None)``: the code is part of the point.
            image: images or their latents, shape (B, C, h, w).
            code: their semantic codes, shape (B, S, h, w).
            noise: every random number of the step; ``"source"`` and ``"semantic"`` are the two noises.
            hidden: where the code is hidden, bool, shape (B, S).

        Raises:
            ValueError: an image and a code of different sizes.
        """
        if image.shape[2:] != code.shape[2:] or len(image) != len(code):
            raise ValueError(f"image and code must agree in B, h, w, got {tuple(image.shape)} and {tuple(code.shape)}")
        image, code = image.float(), code.float()
        end = noise.normal("semantic", code)
        start = code if hidden is None else torch.where(spread(hidden), noise.normal("hidden", code), code)
        t = self.time(len(image), noise).to(image.device)
        x0 = torch.cat([noise.normal("source", image), start], dim=1)  # (B, C + S, h, w)
        point = self.path.sample(x0, torch.cat([image, end], dim=1), t)
        velocity = network(point.x_t, t, None).float()
        error = (velocity - point.velocity).square()
        channels = image.shape[1]
        of_image, of_code = error[:, :channels], error[:, channels:]
        if self.read_rate:  # the image's velocity at t = 1 is mostly noise that nobody sees there
            of_image = torch.where(expand(t < 1, of_image), of_image, 0.0)
        if hidden is not None:
            of_code = torch.where(spread(hidden), 0.0, of_code)
        parts = {"loss_image": of_image.flatten(1).mean(1), "loss_semantic": of_code.flatten(1).mean(1)}
        loss = self.image_weight * parts["loss_image"] + (1 - self.image_weight) * parts["loss_semantic"]
        logs = {"t": t, **{name: part.detach() for name, part in parts.items()}}
        return Joint(point, velocity, clean_code(point.x_t, velocity, t, channels), Losses(loss, logs))


def clean_code(x_t: Tensor, velocity: Tensor, t: Tensor, channels: int) -> Tensor:
    """The code y (B, S, h, w) behind a joint point and its velocity (B, C + S, h, w): ``y_t - t v_y``.

    At t = 1 it is what one step backwards reads.
    """
    y_t, v_y = x_t[:, channels:], velocity[:, channels:]
    return y_t - expand(t, y_t) * v_y


def spread(mask: Tensor) -> Tensor:
    """A mask of channels (B, S) in a shape that broadcasts over (B, S, h, w)."""
    return mask[:, :, None, None]
