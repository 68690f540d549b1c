r"""Classes that a generative model reads: how often it is right, and whether it knows how sure it may be.

With the items sorted into M equal bins :math:`B_m` of their confidence, the score of the class that was called,

.. math:: \mathrm{ECE} = \sum_m \frac{|B_m|}{N} \, \bigl| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \bigr| .

"On Calibration of Modern Neural Networks" (Guo, Pleiss, Sun, Weinberger, 2017).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flows.codecs import IGNORE


class LabelAccuracy(Metric):
    """Share of the items whose label is among the ``top_k`` best scored classes; of equal scores the first class wins.

    Args:
        num_classes: K.
        top_k: 1 is the usual accuracy.
        reads: output of the step that holds the scores.
        name: of the value; None is ``accuracy`` or ``accuracy[top-k]``.

    Raises:
        ValueError: ``num_classes`` below 1, or ``top_k`` outside 1 .. K.
    """

    full_state_update = False
    higher_is_better = True

    hits: Tensor
    count: Tensor

    def __init__(
        self, num_classes: int, top_k: int = 1, *, reads: str = "class_scores", name: str | None = None
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k must lie in 1..{num_classes}, got {top_k}")
        self.num_classes, self.top_k, self.consumes = num_classes, top_k, (reads, "label")
        self.name = name or ("accuracy" if top_k == 1 else f"accuracy[top-{top_k}]")
        for state in ("hits", "count"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, class_scores: Tensor, label: Tensor) -> None:
        """Take in scores (B, K) and labels, integers (B,).

        Raises:
            ValueError: other shapes, labels that are no class, or scores that are not finite.
        """
        scores, label = class_scores.to(self.device), label.to(self.device)
        if scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise ValueError(f"class_scores must be (B, {self.num_classes}), got {tuple(scores.shape)}")
        check_scores(scores, label, "class_scores", "label")
        own = scores.gather(1, label.long()[:, None])  # (B, 1)
        earlier = torch.arange(self.num_classes, device=scores.device) < label[:, None]
        rank = ((scores > own) | (scores == own) & earlier).sum(1)  # (B,)
        self.hits = self.hits + (rank < self.top_k).sum()
        self.count = self.count + len(label)

    def compute(self) -> Tensor:
        """The share, a float64 scalar.

        Raises:
            ValueError: nothing was taken in.
        """
        if not self.count:
            raise ValueError(f"{self.name}: class_scores were never given")
        return self.hits.double() / self.count

    def settings(self) -> dict[str, Any]:
        """Number of classes, for the result."""
        return {"num_classes": self.num_classes}


class Calibration(Metric):
    """Expected calibration error of probabilities, and the bins of the reliability diagram.

    A bin holds the confidences from its lower edge up to, but without, its upper one; 1 belongs to the last. Only sums
    are kept, so that the pixels of masks (``of="mask"``) need no memory; unlabelled ones are left out.

    Args:
        bins: number of equal bins over [0, 1].
        of: ``"label"`` reads the outputs ``class_scores`` (B, K) and ``label`` (B,), ``"mask"`` reads ``mask_scores``
            (B, K, H, W) and ``mask`` (B, H, W).
        name: of the value; None is ``calibration`` or ``calibration[mask]``.

    Raises:
        ValueError: ``bins`` below 1, or an unknown ``of``.
    """

    full_state_update = False
    higher_is_better = False
    logged = ("error",)

    sums: Tensor

    def __init__(self, bins: int = 15, of: Literal["label", "mask"] = "label", *, name: str | None = None) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        if of not in ("label", "mask"):
            raise ValueError(f"of must be 'label' or 'mask', got {of!r}")
        self.bins, self.of = bins, of
        self.consumes = ("class_scores", "label") if of == "label" else ("mask_scores", "mask")
        self.name = name or ("calibration" if of == "label" else "calibration[mask]")
        self.add_state("sums", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, truth: Tensor) -> None:
        """Take in probabilities (B, K, ...) and the true classes, integers (B, ...).

        Raises:
            ValueError: other shapes, ids that are no class, or scores that are no probabilities.
        """
        scores, truth = scores.to(self.device), truth.to(self.device)
        check_scores(scores, truth, *self.consumes, allowed=() if self.of == "label" else (IGNORE,))
        total = scores.double().sum(1)
        if (scores < -1e-6).any() or (total - 1).abs().max() > 1e-3:
            raise ValueError(f"{self.consumes[0]} must be probabilities that sum to 1 over dimension 1")
        confidence, called = scores.max(1)
        labelled = truth != IGNORE if self.of == "mask" else torch.ones_like(truth, dtype=torch.bool)
        confidence, right = confidence[labelled].double(), (called == truth)[labelled].double()  # (n,)
        index = (confidence * self.bins).long().clamp(0, self.bins - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, right])  # (3, n)
        self.sums = self.sums.index_add(1, index, rows)

    def compute(self) -> dict[str, Any]:
        """``{"error" (), "bins": {"count", "confidence", "accuracy"} each (bins,)}``, float64; empty bins are NaN.

        Raises:
            ValueError: nothing was taken in.
        """
        count, confidence, right = self.sums
        if not count.any():
            raise ValueError(f"{self.name}: {self.consumes[0]} were never given beside a true class")
        error = (right - confidence).abs().sum() / count.sum()
        return {
            "error": error,
            "bins": {"count": count.clone(), "confidence": confidence / count, "accuracy": right / count},
        }

    def settings(self) -> dict[str, Any]:
        """Number of bins, for the result."""
        return {"bins": self.bins}


def check_scores(scores: Tensor, truth: Tensor, of: str, beside: str, allowed: tuple[int, ...] = ()) -> None:
    """Refuse scores (B, K, ...) and true classes (B, ...) that do not belong together.

    Raises:
        ValueError: other shapes or types, ids that are neither a class nor ``allowed``, or scores that are not finite.
    """
    if scores.ndim < 2 or not scores.is_floating_point() or not scores.isfinite().all():
        raise ValueError(f"{of} must be finite scores (B, K, ...), got {scores.dtype} {tuple(scores.shape)}")
    if truth.is_floating_point() or truth.shape != scores.shape[:1] + scores.shape[2:]:
        wanted = tuple(scores.shape[:1] + scores.shape[2:])
        raise ValueError(f"{beside} must be integers {wanted} as {of} has it, got {truth.dtype} {tuple(truth.shape)}")
    wrong = (truth < 0) | (truth >= scores.shape[1])
    for value in allowed:
        wrong &= truth != value
    if wrong.any():
        raise ValueError(f"{beside} must hold classes 0..{scores.shape[1] - 1}, got {truth[wrong][0].item()}")
