"""The field of a pair of image and code, with guidance of the image by its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow import Condition, Guidance, SampleNoise
from lightning_flows.flow.paths import Path
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
        branches, condition = _Branches(self.network, self.path, self.hidden), Condition(spatial=code)
        guided = guidance(branches, image, t, condition)  # (B, C, h, w)
        if branches.code_velocity is None:  # a rule that lets the image stand still has not asked the network
            branches(image, t, condition)
        return torch.cat([guided, branches.code_velocity], dim=1)


class Held:
    """A joint field whose image follows a given path outside of a region, at every call.

    Args:
        field: of the pair.
        start: image at t = 0, shape (B, C, h, w).
        end: image at t = 1, the same shape.
        inside: where the field moves the image, bool, shape (B, 1, h, w).
        path: from start to end.
    """

    def __init__(self, field: JointField, start: Tensor, end: Tensor, inside: Tensor, path: Path) -> None:
        self.field, self.start, self.end, self.inside, self.path = field, start, end, inside, path

    @property
    def stateful(self) -> bool:
        """See `JointField.stateful`."""
        return self.field.stateful

    @property
    def guidance(self) -> Guidance | None:
        """See `JointField`."""
        return self.field.guidance

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        """The velocity at ``state`` and ``t``."""
        channels, held = self.end.shape[1], self.path.sample(self.start, self.end, t)
        image = torch.where(self.inside, state[:, :channels], held.x_t)
        velocity = self.field(joint(image, state[:, channels:]), t)
        moved = torch.where(self.inside, velocity[:, :channels], held.velocity)
        return torch.cat([moved, velocity[:, channels:]], dim=1)


class _Branches:
    """The network as guidance knows networks: an image, and a condition that is there or not."""

    streams = (CODE,)

    def __init__(self, network: Any, path: Path, hidden: Hidden) -> None:
        self.network, self.path, self.hidden = network, path, hidden
        self.code_velocity: Tensor | None = None  # of the last call

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
        self.code_velocity = velocity[: len(line), x.shape[1] :]  # that of the branch with the code, which comes first
        return velocity[:, : x.shape[1]]


def joint(image: Tensor, code: Tensor) -> Tensor:
    """Both side by side, (B, C, h, w) and (B, S, h, w) -> (B, C + S, h, w), float32."""
    return torch.cat([image.float(), code.float()], dim=1)
