r"""Couplings: which noise sample is paired with which data sample inside a batch.

The plain choice pairs them as they come. Pairing them by minibatch optimal transport,

.. math:: \pi = \arg\min_{\pi} \sum_i |x_0^{\pi(i)} - x_1^i|^2,

leaves both marginals of the batch untouched (every sample is used once) and makes the paths straighter.
A coupling has no state and draws no random numbers, so it may run in a data worker.

References:
    Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al.,
    2024); Multisample Flow Matching (Pooladian et al., 2023); The Curse of Conditions: Analyzing and
    Improving Optimal Transport for Conditional Flow-Based Generation (Cheng, Schwing, 2025).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flows.flow.condition import Condition


class Coupling(ABC):
    """Pairs the noise and the data of a batch."""

    @abstractmethod
    def __call__(
        self, x0: Tensor, x1: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor, Condition | None]:
        """Returns the batch paired anew.

        Args:
            x0: Noise, (B, ...).
            x1: Data, (B, ...), the same shape.
            condition: What the data rows are conditioned on, if anything.

        Returns:
            x0, x1, condition, row i belonging to row i.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """Leaves the pairs as they were drawn: noise independent of data."""

    def __call__(
        self, x0: Tensor, x1: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor, Condition | None]:
        """See `Coupling`."""
        return x0, x1, condition


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    r"""Pairs noise and data by the assignment of least squared distance, computed exactly.

    .. math:: \text{cost}_{ij} = |x_1^i - x_0^j|^2 + w\, d(c_i, c_j)

    **The noise is permuted, never the data**: x1 and its condition keep their rows, so that whatever else
    lies in the batch (index, weights, captions) still belongs to them; noise rows are exchangeable.

    With a condition, plain transport (w = 0) biases generation: it makes noise depend on the condition (each
    class gets its own part of the Gaussian), while sampling starts every class from the whole Gaussian. With
    w > 0 noise row j is first given the condition of row j, and changing it costs w: d is 1 between different
    labels and the squared distance between condition vectors (or spatial conditions). A large w pairs within
    a class only and removes the bias.

    Args:
        condition_weight: w >= 0, in units of the squared distance between samples.

    Raises:
        ValueError: In the constructor if w is negative or not finite; in a call if shapes differ, a value is
            not finite, or w > 0 and the condition has no stream with a distance (label, vector, spatial).
    """

    condition_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.condition_weight) and self.condition_weight >= 0):
            raise ValueError(f"condition_weight must be a finite number >= 0, got {self.condition_weight!r}")

    def __call__(
        self, x0: Tensor, x1: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor, Condition | None]:
        """See `Coupling`; x0 comes back with its rows permuted."""
        if x0.shape != x1.shape or x0.ndim == 0:
            raise ValueError(f"x0 and x1 must have one shape (B, ...), got {tuple(x0.shape)} and {tuple(x1.shape)}")
        conditional = condition is not None and bool(condition.streams)
        if conditional and self.condition_weight == 0:
            self._warn_once()
        order = _assign(self._cost(x0, x1, condition if conditional else None))
        return x0[order.to(x0.device)], x1, condition

    def _cost(self, x0: Tensor, x1: Tensor, condition: Condition | None) -> Tensor:
        """Cost of giving noise row j to data row i, (B, B), up to terms that no assignment can change."""
        cost = _distances(x1, x0)
        if condition is not None and self.condition_weight > 0:
            cost = cost + self.condition_weight * _condition_distances(condition).to(cost)
        return cost

    def _warn_once(self) -> None:
        if self.__dict__.get("_warned"):
            return
        object.__setattr__(self, "_warned", True)  # a note, not a field
        warnings.warn(
            "OptimalTransport(condition_weight=0) pairs noise with data whatever the condition is: noise "
            "then depends on the condition, which biases conditional generation. Set condition_weight > 0.",
            stacklevel=3,
        )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """-2 <a_i, b_j>, (B, B): |a_i|^2 and |b_j|^2 add the same to every assignment and are left out."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)  # 16-bit sums lose the differences that decide
        return a.detach().flatten(1).to(dtype) @ b.detach().flatten(1).to(dtype).T * -2


def _condition_distances(condition: Condition) -> Tensor:
    """d(c_i, c_j), (B, B): 1 for different labels plus squared distances; absent rows are alike."""
    terms = []
    if condition.label is not None:
        label = torch.where(condition.presence("label"), condition.label, -1)
        terms.append((label[:, None] != label[None, :]).float())
    for stream, values in (("vector", condition.vector), ("spatial", condition.spatial)):
        if values is not None:
            flat = values.flatten(1).float() * condition.presence(stream)[:, None]
            terms.append(torch.cdist(flat, flat).square())
    if not terms:
        raise ValueError(f"condition_weight > 0 needs a label, vector or spatial stream, got {condition.streams}")
    return torch.stack(terms).sum(0)


def _assign(cost: Tensor) -> Tensor:
    """The column of each row in the assignment of least total cost, (B,) int64."""
    from scipy.optimize import linear_sum_assignment  # here: nothing else on this floor needs scipy

    if not bool(cost.isfinite().all()):
        raise ValueError("x0 and x1 (and the condition) must be finite for optimal transport, got inf or nan")
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
