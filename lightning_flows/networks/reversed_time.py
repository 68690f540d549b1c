"""The border for networks whose time runs from data (0) to noise (1), as in LFM, SD3 and DDPM.

A velocity changes sign with the direction of time; predictions of data or noise do not:

    v_ours(x, t) = -v_theirs(x, 1 - t)        noise_ours(x, t) = noise_theirs(x, 1 - t)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.wrapper import Wrapper

PREDICTIONS = ("velocity", "data", "noise", "score")


class ReversedTime(Wrapper):
    """A network of reversed time, seen from ours: noise at 0, data at 1.

    Args:
        network: velocity network that was trained with data at 0 and noise at 1.
        prediction: what it predicts; only a velocity changes sign.

    Attributes:
        shape: shape (C, H, W) of ``network``.
        streams: streams of ``network``.
        in_channels: channels of ``network``.

    Raises:
        ValueError: an unknown prediction.
    """

    def __init__(
        self, network: nn.Module, *, prediction: Literal["velocity", "data", "noise", "score"] = "velocity"
    ) -> None:
        super().__init__(network)
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {list(PREDICTIONS)}, got {prediction!r}")
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict at ``x`` (B, C, H, W) and our time ``t`` () or (B,); shape of ``x``."""
        theirs = self.network(x, 1 - t, condition)
        return -theirs if self.prediction == "velocity" else theirs
