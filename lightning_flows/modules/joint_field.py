"""The field of a pair of image and code, with guidance of the image by its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow import Condition, Guidance, SampleNoise
from lightning_flows.flow.paths import Path, expand
from lightning_flows.flow.symmetric import spread

CODE = "spatial"  # stream of the condition in which guidance sees the code


class Hidden:
    """What stands in the place of a code that is not there: a straight line between two noises.

    Args:
        noise: one seed for each sample.
        like: a code, shape (B, S, h, w).
        path: of the code.
    """

    def __init__(self, noise: SampleNoise, like: Tensor, path: Path) -> None:
        self.path = path
        self.start, self.end = noise.normal("hidden", like), noise.normal("semantic", like)

    def at(self, t: Tensor) -> Tensor:
        """The line at time ``t`` (), shape (B, S, h, w)."""
        return self.path.sample(self.start, self.end, t).x_t

    def velocity(self, t: Tensor) -> Tensor:
        """Its velocity, the same shape."""
        return self.path.sample(self.start, self.end, t).velocity


class JointField:
    """``(state (B, C + S, h, w), t ()) -> velocity`` of the same shape, images first.

    Hidden parts of the code follow their own line. With guidance, the image's velocity is extrapolated from the one
    whose code is hidden altogether to the one with its code, both from one call; the code's own is never guided.

    Args:
        network: predicts both velocities.
        channels: C of the image.
        path: see `flow.SymmetricMatching`.
        given: parts of the code that are there, bool, shape (B, S); None for all.
        hidden: the lines of those that are not; needed with ``given`` and with guidance.
        guidance: of the image; None for none.
    """

    def __init__(
        self,
        network: Any,
        channels: int,
        path: Path,
        *,
        given: Tensor | None = None,
        hidden: Hidden | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.network, self.channels, self.path, self.given, self.hidden = network, channels, path, given, hidden
        self.guidance = guidance.begin() if guidance is not None and guidance.scale != 1 else None

    @property
    def stateful(self) -> bool:
        """Whether the value depends on the calls before."""
        return self.guidance is not None and self.guidance.stateful

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        """The velocity at ``state`` and ``t``."""
        if self.guidance is None:
            velocity = self.network(state, t, None).to(state.dtype)
        else:
            image, code = state[:, : self.channels], state[:, self.channels :]
            velocity = self._guided(self.guidance, image, t, code)
        if self.given is None:
            return velocity
        assert self.hidden is not None, "hidden parts need their lines"
        code = torch.where(spread(self.given), velocity[:, self.channels :], self.hidden.velocity(t))
        return torch.cat([velocity[:, : self.channels], code], dim=1)

    def _guided(self, guidance: Guidance, image: Tensor, t: Tensor, code: Tensor) -> Tensor:
        assert self.hidden is not None, "guidance needs the lines of hidden codes"
        branches = _Branches(self.network, self.path, self.hidden)
        guided = guidance(branches, image, t, Condition(spatial=code))  # (B, C, h, w)
        return torch.cat([guided, branches.code_velocity], dim=1)


class _Branches:
    """The network as guidance knows networks: an image, and a condition that is there or not."""

    streams = (CODE,)

    def __init__(self, network: Any, path: Path, hidden: Hidden) -> None:
        self.network, self.path, self.hidden = network, path, hidden
        self.code_velocity: Tensor

    def null(self, condition: Condition, batch_size: int) -> Condition:
        return condition.absent(CODE)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        assert condition.spatial is not None
        line = self.hidden.at(t)
        copies = len(x) // len(line)  # 2 where both branches share a call
        here = condition.presence(CODE)[:, None, None, None]
        code = torch.where(here, condition.spatial, line.repeat(copies, 1, 1, 1))
        velocity = self.network(torch.cat([x, code], dim=1), t, None).to(x.dtype)
        self.code_velocity = velocity[: len(line), x.shape[1] :]  # of the branch with the code, which comes first
        return velocity[:, : x.shape[1]]


def joint(image: Tensor, code: Tensor) -> Tensor:
    """Both side by side, (B, C, h, w) and (B, S, h, w) -> (B, C + S, h, w), float32."""
    return torch.cat([image.float(), code.float()], dim=1)


def between(start: Tensor, end: Tensor, t: Tensor, path: Path) -> Tensor:
    """The point of a path at ``t`` () between two images (B, C, h, w)."""
    return path.alpha(expand(t, end)) * end + path.sigma(expand(t, end)) * start
