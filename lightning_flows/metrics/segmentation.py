r"""How well masks are read: counts of true against predicted classes, and what follows from them.

With :math:`n_{ij}` pixels of class i that were called j, over the whole set,

.. math:: \mathrm{IoU}_i = \frac{n_{ii}}{\sum_j n_{ij} + \sum_j n_{ji} - n_{ii}} .

Masks are ids 0 .. K - 1 and `codecs.IGNORE`, 255, where nobody said what a pixel is: such pixels are never counted. A
prediction of 255 at a labelled pixel is a miss of its class and a false alarm of none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_flows.codecs import IGNORE


class Confusion(Metric):
    """Counts of pixels by true and predicted class, of all items seen.

    Args:
        num_classes: K.
        reads: output of the step that holds the predicted masks.
        name: of the value; None is the metric's own.

    Attributes:
        matrix: int64 (K, K + 1), true classes down, predicted ones across; the last column is "no class".

    Raises:
        ValueError: ``num_classes`` outside 1 .. 255.
    """

    full_state_update = False
    higher_is_better = True
    family = "confusion"

    matrix: Tensor

    def __init__(self, num_classes: int, *, reads: str = "segmented", name: str | None = None) -> None:
        super().__init__()
        self.num_classes = check_classes(num_classes)
        self.consumes: tuple[str, ...] = (reads, "mask")
        self.name = name or self.family
        empty = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("matrix", empty, dist_reduce_fx="sum")

    def update(self, segmented: Tensor, mask: Tensor) -> None:
        """Take in predicted and true masks, both integers (B, H, W).

        Raises:
            ValueError: other shapes or types, or ids that are no class.
        """
        segmented, mask = label_maps(segmented.to(self.device), mask.to(self.device), self.num_classes)
        found = multiclass_confusion_matrix(
            segmented, mask, self.num_classes + 1, ignore_index=IGNORE, validate_args=False
        )
        self.matrix = self.matrix + found[: self.num_classes]

    def settings(self) -> dict[str, Any]:
        """Number of classes, for the result."""
        return {"num_classes": self.num_classes}

    def counts(self) -> Tensor:
        """The matrix in float64.

        Raises:
            ValueError: no labelled pixel was seen.
        """
        if not self.matrix.any():
            raise ValueError(f"{self.name}: mask had no labelled pixel")
        return self.matrix.double()


class MeanIoU(Confusion):
    """Intersection over union of each class, pooled over all pixels of the set, and its mean over the classes.

    A class without a pixel in truth and prediction is in neither; its value is NaN (null in the result).

    - ``rule="strict"``: every class counts.
    - ``rule="paper"``: pixels whose truth is the class ``ignored`` are not looked at, so that false alarms there cost
      nothing, and the class is left out of the mean: the evaluation of "Symmetrical Flow Matching" (Caetano, Viviers,
      de With, van der Sommen, 2025), which ignores 0 on CelebAMask-HQ and 171, "unlabelled", on COCO-Stuff. Where
      unlabelled pixels are `codecs.IGNORE` and no class, as our data have them, both rules agree.

    Args:
        num_classes: K.
        rule: see above.
        ignored: class that ``rule="paper"`` ignores.
        reads: output of the step that holds the predicted masks.
        name: of the value; None is ``miou`` or ``miou[paper]``.

    Raises:
        ValueError: an unknown rule, or ``ignored`` that does not fit it.
    """

    family = "miou"
    logged = ("mean",)

    def __init__(
        self,
        num_classes: int,
        rule: Literal["strict", "paper"] = "strict",
        ignored: int | None = None,
        *,
        reads: str = "segmented",
        name: str | None = None,
    ) -> None:
        if rule not in ("strict", "paper"):
            raise ValueError(f"rule must be 'strict' or 'paper', got {rule!r}")
        if rule == "strict" and ignored is not None:
            raise ValueError(f"ignored must be None for rule='strict', where all classes count, got {ignored}")
        if rule == "paper" and (ignored is None or not 0 <= ignored < num_classes):
            raise ValueError(f"ignored must be a class 0..{num_classes - 1} for rule='paper', got {ignored}")
        super().__init__(num_classes, reads=reads, name=name or ("miou" if rule == "strict" else "miou[paper]"))
        self.rule, self.ignored = rule, ignored

    def compute(self) -> dict[str, Tensor]:
        """``{"mean" (), "per_class" (K,)}``, float64.

        Raises:
            ValueError: no labelled pixel was seen, or none of a class that counts.
        """
        counts = self.counts()
        if self.ignored is not None:
            counts[self.ignored] = 0  # what predictions there overwritten by the truth leave to the other classes
        per_class = class_iou(counts)  # (K,)
        if self.ignored is not None:
            per_class[self.ignored] = torch.nan
        if per_class.isnan().all():
            raise ValueError(f"{self.name}: mask had no pixel of a class other than ignored={self.ignored}")
        return {"mean": per_class.nanmean(), "per_class": per_class}

    def settings(self) -> dict[str, Any]:
        """Number of classes and the rule."""
        return {**super().settings(), "rule": self.rule, "ignored": self.ignored}


class PixelAccuracy(Confusion):
    """Share of the labelled pixels that got their class, pooled over the set; takes the arguments of `Confusion`."""

    family = "pixel_accuracy"

    def compute(self) -> Tensor:
        """The share, a float64 scalar.

        Raises:
            ValueError: no labelled pixel was seen.
        """
        counts = self.counts()
        return counts.diagonal().sum() / counts.sum()


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union (K,) of each class from counts (K, K + 1); NaN where a class has no pixel at all."""
    hits = counts.diagonal()  # (K,)
    union = counts.sum(1) + counts[:, :-1].sum(0) - hits
    return hits / union


def check_classes(num_classes: int) -> int:
    """The number of classes.

    Raises:
        ValueError: it is below 1, or so large that 255 would be a class.
    """
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes must lie in 1..{IGNORE} ({IGNORE} is unlabelled), got {num_classes}")
    return num_classes


def label_maps(segmented: Tensor, mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Predicted and true masks, int64 (B, H, W), where a prediction of "no class" has become ``num_classes``.

    Raises:
        ValueError: other shapes or types, or ids that are no class.
    """
    for name, ids in (("segmented", segmented), ("mask", mask)):
        if ids.ndim != 3 or ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"{name} must be integer class ids (B, H, W), got {ids.dtype} {tuple(ids.shape)}")
        wrong = (ids < 0) | (ids >= num_classes) & (ids != IGNORE)
        if wrong.any():
            allowed = f"0..{num_classes - 1} or {IGNORE}"
            raise ValueError(f"{name} must hold class ids {allowed}, got {ids[wrong][0].item()}")
    if segmented.shape != mask.shape:
        shapes = f"{tuple(segmented.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"segmented and mask must have one shape, got {shapes}")
    return segmented.long().masked_fill(segmented == IGNORE, num_classes), mask.long()
