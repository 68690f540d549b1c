"""Mean loss per slice of time: where along the path a network errs.

One number over all times hides that the ends are easy or hard; Esser et al., "Scaling Rectified Flow
Transformers" (2024), find the validation loss of flow matching to follow sample quality when read this way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class LossPerTimeBin(Metric):
    """Mean of per-sample losses in equal bins of ``t`` in [0, 1] (0 = noise, 1 = data).

    Args:
        bins: number of bins; ``t = 1`` belongs to the last.

    Raises:
        ValueError: ``bins`` below 1.
    """

    full_state_update = False
    higher_is_better = False
    name = "loss_per_time"
    consumes = ("losses", "t")  # outputs of `validation_step` that `Evaluation` hands to update

    total: Tensor
    count: Tensor

    def __init__(self, bins: int = 10) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        self.add_state("total", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, t: Tensor) -> None:
        """Take in losses ``(B,)`` at times ``(B,)``.

        Raises:
            ValueError: shapes differ, or a time lies outside [0, 1].
        """
        if loss.ndim != 1 or loss.shape != t.shape:
            raise ValueError(f"loss and t must both be (B,), got {tuple(loss.shape)} and {tuple(t.shape)}")
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t must lie in [0, 1], got [{t.min().item()}, {t.max().item()}]")
        index = (t.detach().double() * self.bins).long().clamp(max=self.bins - 1).to(self.device)  # (B,)
        self.total = self.total.index_add(0, index, loss.detach().double().to(self.device))
        self.count = self.count + torch.bincount(index, minlength=self.bins)

    def compute(self) -> dict[str, Tensor]:
        """``{"mean" (bins,) float64, "count" (bins,) int64}``; the mean of an empty bin is NaN."""
        return {"mean": self.total / self.count, "count": self.count.clone()}
