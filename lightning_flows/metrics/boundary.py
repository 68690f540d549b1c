r"""How well the borders of masks are drawn, which shares of pixels hardly notice.

For a class of an image, with P the boundary pixels of the predicted region and T those of the true one,

.. math:: F = \frac{2 p r}{p + r}, \qquad p = \frac{|\{a \in P : d(a, T) \le \theta\}|}{|P|}, \qquad
   r = \frac{|\{b \in T : d(b, P) \le \theta\}|}{|T|} ,

d the Euclidean distance of pixel centres. "What is a good evaluation measure for semantic segmentation?" (Csurka,
Larlus, Perronnin, 2013); for a single region "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation" (Perazzi, Pont-Tuset, McWilliams, Van Gool, Gross, Sorkine-Hornung, 2016).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_flows.codecs import IGNORE
from lightning_flows.metrics.segmentation import check_classes, label_maps

SHARE = 0.0075  # of the diagonal


class BoundaryFScore(Metric):
    """Mean over images of the mean F over the classes that an image has, in truth or in prediction.

    A boundary pixel belongs to the class and has one of its four neighbours in another class; the edge of the image and
    unlabelled pixels are no boundary, on either side. Of a class without any boundary pixel, as one that fills the
    image, F is 1 if truth and prediction both have it, else 0. Images without a labelled pixel are not counted.

    Args:
        num_classes: K.
        tolerance: in pixels; None is 0.0075 of the image's diagonal, rounded up. 0 wants the very same pixels.
        reads: output of the step that holds the predicted masks.
        name: of the value.

    Raises:
        ValueError: ``num_classes`` outside 1 .. 255, or a negative ``tolerance``.
    """

    full_state_update = False
    higher_is_better = True

    total: Tensor
    count: Tensor

    def __init__(
        self, num_classes: int, tolerance: int | None = None, *, reads: str = "segmented", name: str = "boundary_f"
    ) -> None:
        super().__init__()
        if tolerance is not None and tolerance < 0:
            raise ValueError(f"tolerance must be pixels, 0 or more, or None, got {tolerance}")
        self.num_classes, self.tolerance = check_classes(num_classes), tolerance
        self.consumes, self.name = (reads, "mask"), name
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, segmented: Tensor, mask: Tensor) -> None:
        """Take in predicted and true masks, both integers (B, H, W).

        Raises:
            ValueError: other shapes or types, or ids that are no class.
        """
        pairs = label_maps(segmented.to(self.device), mask.to(self.device), self.num_classes)
        radius = self.radius(*mask.shape[1:])
        for prediction, truth in zip(*pairs, strict=True):  # one by one: each has a few of the classes
            scores = boundary_scores(prediction, truth, self.num_classes, radius)
            if len(scores):
                self.total = self.total + scores.mean()
                self.count = self.count + 1

    def radius(self, height: int, width: int) -> int:
        """The tolerance in pixels for an image."""
        return math.ceil(SHARE * math.hypot(height, width)) if self.tolerance is None else self.tolerance

    def compute(self) -> Tensor:
        """The mean over images, a float64 scalar.

        Raises:
            ValueError: no labelled pixel was seen.
        """
        if not self.count:
            raise ValueError(f"{self.name}: mask had no labelled pixel")
        return self.total / self.count

    def settings(self) -> dict[str, Any]:
        """Classes and tolerance, for the result."""
        tolerance = f"ceil({SHARE} diagonal)" if self.tolerance is None else self.tolerance
        return {"num_classes": self.num_classes, "tolerance": tolerance}


def boundary_scores(prediction: Tensor, truth: Tensor, num_classes: int, radius: int) -> Tensor:
    """F, float64 (c,), of the c classes that an image has; both masks int64 (H, W), see `label_maps`."""
    known = truth != IGNORE
    present = torch.cat([prediction[known], truth[known]]).unique()
    present = present[present < num_classes][:, None, None]  # (c, 1, 1)
    regions = [(ids == present) & known for ids in (prediction, truth)]  # (c, H, W)
    edges = [boundary(each, known) for each in regions]
    counts = [edge.sum((1, 2)).double() for edge in edges]
    precision, recall = (
        (own & within(other, radius)).sum((1, 2)) / count.clamp(min=1)
        for own, other, count in zip(edges, edges[::-1], counts, strict=True)
    )
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    in_both = regions[0].any(2).any(1) & regions[1].any(2).any(1)
    return torch.where(counts[0] + counts[1] == 0, in_both.double(), score)


def boundary(regions: Tensor, known: Tensor) -> Tensor:
    """Pixels of regions, bool (c, H, W), with one of four neighbours outside of theirs but ``known``, bool (H, W)."""
    other = F.pad(known & ~regions, (1, 1, 1, 1))  # (c, H + 2, W + 2), nothing beyond the edge
    beside = other[:, 1:-1, :-2] | other[:, 1:-1, 2:] | other[:, :-2, 1:-1] | other[:, 2:, 1:-1]
    return regions & beside


def within(pixels: Tensor, radius: int) -> Tensor:
    """What lies no farther than ``radius`` from the given pixels, both bool (c, H, W): a dilation by a disk."""
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (radius,) * 4)  # (c, H + 2 radius, W + 2 radius)
    reached = [padded[..., radius : radius + width]]  # by up to 0, 1, ... pixels to the left and right
    for reach in range(1, radius + 1):
        left, right = (padded[..., start : start + width] for start in (radius - reach, radius + reach))
        reached.append(reached[-1] | left | right)  # (c, H + 2 radius, W)
    found = torch.zeros_like(pixels)
    for rows in range(-radius, radius + 1):  # the disk is a stack of such segments
        found |= reached[math.isqrt(radius**2 - rows**2)][:, radius + rows : radius + rows + height]
    return found
