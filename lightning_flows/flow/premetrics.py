"""How far a prediction is from its target, one number a sample, float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Premetric(ABC):
    """A distance between tensors (B, ...), shape (B,)."""

    @abstractmethod
    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each sample, float32 (float64 for float64 input), shape (B,)."""


@dataclass(frozen=True)
class SquaredError(Premetric):
    """Mean of the squared differences over all elements of a sample."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See `Premetric.__call__`."""
        return squared_error(prediction, target)


@dataclass(frozen=True)
class PseudoHuber(Premetric):
    """``(sqrt(|prediction - target|^2 + c^2) - c) / d`` with ``c = scale d`` for d elements.

    Args:
        scale: c per element.

    References:
        Improving the Training of Rectified Flows (Lee et al., 2024).
    """

    scale: float = 0.00054

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See `Premetric.__call__`."""
        elements = prediction[0].numel()
        c = self.scale * elements
        squared = squared_error(prediction, target) * elements
        # (sqrt(s + c^2) - c) without its cancellation, which float32 would feel for small errors
        return squared / (torch.sqrt(squared + c**2) + c) / elements


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample (B, ...), shape (B,), at least float32."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
