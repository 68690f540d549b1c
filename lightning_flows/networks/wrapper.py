"""What a network around a network hands through."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.store import Recorded


class Wrapper(Recorded, nn.Module, ABC):
    """A network that is called in another way; its shape, its streams and what they mean stay its own.

    Args:
        network: the network inside.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one sample."""
        return self.network.shape  # type: ignore[return-value]

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the condition's streams that the network reads."""
        return self.network.streams  # type: ignore[return-value]

    @property
    def in_channels(self) -> int:
        """Channels of one sample."""
        return self.network.in_channels  # type: ignore[return-value]

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """See the network."""
        return self.network.null(condition, batch_size)  # type: ignore[operator]

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """See the network."""
        return self.network.drop(condition, generator)  # type: ignore[operator]

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict at ``x`` (B, C, H, W) and ``t`` () or (B,); shape of ``x``."""
