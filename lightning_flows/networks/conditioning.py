"""How a velocity network meets a condition: the contract, the check, and the embedding of a class label.

What "no label" means and how often training says it belong to the embedding, never to the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.resize_rules import Rule
from lightning_flows.networks.resizing import resize_label_table

AbsentLabel = Literal["error", "last"]


@runtime_checkable
class VelocityNetwork(Protocol):
    """What every velocity network offers.

    Attributes:
        streams: names of the condition's streams that the network reads.
        shape: shape (C, H, W) of one sample.
    """

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the network reads."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one sample."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Prediction at x (B, C, H, W) and time t () or (B,); shape of x."""

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """``condition`` with every stream of the network absent, for ``batch_size`` samples."""

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with streams absent at random, each at the rate of its embedding."""


def check_condition(network: Any, condition: Condition | None) -> None:
    """Refuse a condition with a stream that the network would ignore.

    Raises:
        ValueError: naming the stream and what the network reads.
    """
    given = () if condition is None else condition.streams
    for stream in given:
        if stream not in network.streams:
            reads = list(network.streams) or "no condition at all"
            raise ValueError(f"condition gives {stream!r}, but {type(network).__name__} reads {reads}")


def times_of(t: Tensor, batch_size: int) -> Tensor:
    """One time a sample, shape (B,), from a time of shape () or (B,).

    Raises:
        ValueError: a time of another shape.
    """
    if t.dim() > 1 or (t.dim() == 1 and len(t) != batch_size):
        raise ValueError(f"t must have shape () or ({batch_size},), got {tuple(t.shape)}")
    return t.expand(batch_size)


class LabelEmbedding(nn.Module):
    """A table of class embeddings with an optional row for "no label".

    The null row exists if and only if ``dropout > 0``; it is the last one. Without it, an absent label is an
    error, unless there is a single class or ``absent="last"`` asks for the last class (official LFM and SiT).

    Args:
        num_classes: number K of classes.
        hidden_size: width D of the embedding.
        dropout: rate at which training drops a label, in [0, 1).
        absent: what a label that is absent means where there is no null row.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self, num_classes: int, hidden_size: int, *, dropout: float = 0.0, absent: AbsentLabel = "error"
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive (or None: no labels), got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {dropout}")
        if absent not in ("error", "last"):
            raise ValueError(f"absent_label must be 'error' or 'last', got {absent!r}")
        self.num_classes, self.dropout = num_classes, dropout
        self.may_be_absent = dropout > 0 or num_classes == 1 or absent == "last"
        self.meaning = self.rows_mean(num_classes, dropout, absent)
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)

    @staticmethod
    def rows_mean(num_classes: int, dropout: float, absent: AbsentLabel) -> tuple[int, bool]:
        """What the rows of the table are: (number of classes, whether the last row means "no label")."""
        last_means_none = dropout == 0 and absent == "last" and num_classes > 1
        return num_classes - last_means_none, dropout > 0 or last_means_none

    def resize_rule(self, source: Mapping[str, Any]) -> Rule:
        """How the table of a network with other arguments (``num_classes``, ``label_dropout``) becomes this one."""
        num_classes, dropout = source["num_classes"], source["label_dropout"]
        old = self.rows_mean(num_classes, dropout, source.get("absent_label", "error"))
        if (num_classes, dropout > 0) == (self.num_classes, self.dropout > 0):
            old = self.meaning  # the same rows, also where the last one is now said to mean "no label"
        return partial(resize_label_table, old=old, new=self.meaning)

    def rows(self, condition: Condition, batch_size: int) -> Tensor:
        """Row of the table for each sample, int64, shape (B,).

        Raises:
            ValueError: a label outside [0, K) (checked where it costs no synchronisation with a device), an
                absent label without a row for it, or labels of another batch size.
        """
        label = condition.label
        last = self.embedding_table.num_embeddings - 1
        device = self.embedding_table.weight.device
        if label is None:
            self._check_absent(any_absent=True)
            return torch.full((batch_size,), last, device=device)
        if label.shape != (batch_size,):
            raise ValueError(f"condition.label must have shape ({batch_size},), got {tuple(label.shape)}")
        if "label" not in condition.present:
            self._check_range(label)
            return label.to(device)
        here = condition.presence("label")
        self._check_range(torch.where(here, label, 0))
        self._check_absent(any_absent=not self.may_be_absent and not bool(here.all()))
        return torch.where(here, label, last).to(device)

    def forward(self, condition: Condition, batch_size: int) -> Tensor:
        """Embedding of the labels of ``condition``, shape (B, D)."""
        return self.embedding_table(self.rows(condition, batch_size))

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with each label absent at the rate ``dropout``, chosen by ``generator`` (CPU)."""
        if condition is None or condition.label is None or self.dropout == 0:
            return condition
        lost = torch.rand(len(condition.label), generator=generator) < self.dropout
        return condition.absent("label", where=lost.to(condition.label.device))

    def _check_absent(self, *, any_absent: bool) -> None:
        if any_absent and not self.may_be_absent:
            raise ValueError(
                f"condition.label is absent, but the network has {self.num_classes} classes and no null row "
                "(label_dropout=0): give a label for every sample, or train with label_dropout > 0"
            )

    def _check_range(self, label: Tensor) -> None:
        # Only where it is free: an accelerator would have to be waited for, a compiled graph would be cut.
        if label.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool(((label < 0) | (label >= self.num_classes)).any()):
            raise ValueError(f"condition.label must lie in [0, {self.num_classes}), got {label.tolist()}")
