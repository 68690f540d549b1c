"""Does the drawn image show the mask that was asked for? A rule or a frozen segmenter reads the image again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.metrics.segmentation import Confusion, class_iou


class AskedMask(Confusion):
    """Intersection over union of the mask that was asked for and the one that is read from the drawn image.

    The value is only as good as the reader: put its own score on real images (`MeanIoU`) beside it.

    Args:
        num_classes: K.
        rule: the reader, a function or a module of images (B, C, H, W) in [-1, 1]; it gives masks, integers
            (B, H, W), or scores (B, K, H, W), of which the best is taken. A module is frozen and put in evaluation
            mode.
        name: of the value.

    Raises:
        ValueError: ``num_classes`` outside 1 .. 255, or ``rule`` cannot be called.
    """

    family = "asked_miou"
    logged = ("mean",)

    def __init__(self, num_classes: int, rule: nn.Module | Callable[..., Any], *, name: str | None = None) -> None:
        super().__init__(num_classes, reads="sample", name=name)
        if not callable(rule):
            raise ValueError(f"rule must be an nn.Module or a function, got {type(rule).__name__}")
        self.rule = rule.requires_grad_(False).eval() if isinstance(rule, nn.Module) else rule

    def update(self, sample: Tensor, mask: Tensor) -> None:
        """Take in drawn images (B, C, H, W) in [-1, 1] and the masks that were asked for, integers (B, H, W).

        Raises:
            ValueError: the rule gives no masks of this shape, or ids that are no class.
        """
        super().update(self.read(sample.to(self.device)), mask)

    @torch.no_grad()
    def read(self, sample: Tensor) -> Tensor:
        """What the rule sees in images (B, C, H, W): integers (B, H, W).

        Raises:
            ValueError: the rule gives something else.
        """
        with torch.autocast(sample.device.type, enabled=False):
            found = self.rule(sample.float().clamp(-1, 1))
        if found.is_floating_point():
            if found.ndim != 4 or found.shape[1] != self.num_classes:
                wanted = f"(B, {self.num_classes}, H, W)"
                raise ValueError(f"rule must give masks (B, H, W) or scores {wanted}, got {tuple(found.shape)}")
            return found.argmax(1)
        return found

    def compute(self) -> dict[str, Tensor]:
        """``{"mean" (), "per_class" (K,)}``, float64; a class that was neither asked for nor read is NaN.

        Raises:
            ValueError: no labelled pixel was asked for.
        """
        per_class = class_iou(self.counts())
        return {"mean": per_class.nanmean(), "per_class": per_class}

    def settings(self) -> dict[str, Any]:
        """Number of classes and the reader, for the result."""
        named = self.rule if hasattr(self.rule, "__qualname__") else type(self.rule)
        return {**super().settings(), "rule": f"{named.__module__}.{named.__qualname__}"}
