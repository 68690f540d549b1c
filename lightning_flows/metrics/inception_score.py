r"""Inception score: are samples sure of their class, and are all classes there?

    IS = exp E_x KL(p(y | x) || p(y))

"Improved Techniques for Training GANs" (Salimans et al., 2016). It looks at samples only, and says nothing
outside the classes of its classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.metrics.base import FeatureMetric, _cat, in_order
from lightning_flows.metrics.features import Extractor
from lightning_flows.metrics.inception import Inception

_ENOUGH = 5000


class InceptionScore(FeatureMetric):
    """Mean and standard deviation of the score over random splits of the samples.

    ``torchmetrics.image.InceptionScore`` shuffles with the global random state and keeps float32; ours has a
    seed and float64.

    Args:
        features: extractor that gives the logits of a classifier; None means
            ``Inception("logits_unbiased")``, the only one with which the value is called ``is``.
        splits: number of splits.
        seed: seed of the shuffle.

    Raises:
        ValueError: ``splits`` below 1.
    """

    family = "inception_score"
    standard_names = ("is",)
    higher_is_better = True
    needs_real = False

    logits: list[Tensor]

    def __init__(self, features: Extractor | None = None, *, splits: int = 10, seed: int = 0) -> None:
        super().__init__(features if features is not None else Inception("logits_unbiased"))
        if splits < 1:
            raise ValueError(f"splits must be at least 1, got {splits}")
        self.splits, self.seed = splits, seed
        self.add_state("logits", default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor, real: bool = False) -> None:
        """Take in samples ``(B, C, H, W)``; real items are ignored."""
        if not real:
            self.logits.append(self.features(x).to(self.device))  # (B, classes)

    def compute(self) -> dict[str, Tensor]:
        """``{"mean", "std"}`` over the splits.

        Raises:
            ValueError: fewer samples than splits.
        """
        logits = _cat(self.logits)
        if len(logits) < self.splits:
            raise ValueError(f"{self.name}: {len(logits)} samples are fewer than splits = {self.splits}")
        logits = in_order(logits)
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(self.seed))
        parts = logits[order.to(logits.device)].log_softmax(1).tensor_split(self.splits)
        scores = torch.stack([_score(part) for part in parts])
        return {"mean": scores.mean(), "std": scores.std(unbiased=False)}

    @property
    def needed(self) -> int:
        """Samples from which on the score hardly grows with their number."""
        return _ENOUGH

    def settings(self) -> dict[str, Any]:
        """See `FeatureMetric.settings`."""
        return {"splits": self.splits}

    def caution(self, real: int, samples: int) -> str | None:
        """Warn below 5,000 samples: the score grows with their number."""
        return None if samples >= _ENOUGH else f"{self.name} from {samples} samples: biased below some thousands"


def _score(log_p: Tensor) -> Tensor:
    """Exponential of the mean divergence of rows ``(n, classes)`` from their mean distribution."""
    marginal = log_p.exp().mean(0).log()
    return (log_p.exp() * (log_p - marginal)).nansum(1).mean().exp()  # 0 log 0 = 0
