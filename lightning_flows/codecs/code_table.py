r"""What semantic codes have in common: class k is row :math:`c_k` of a table, and a reading is the nearest row.

.. math:: y = c_k + w\,(u - \tfrac12), \quad u \sim U[0, 1)^S, \qquad
          p(k \mid y) \propto \exp(-\lVert y - c_k \rVert^2 / \tau), \qquad \hat k = \arg\max_k p(k \mid y).

The square of y cancels in p, so that the exponent is linear in y: :math:`(2 c_k \cdot y - \lVert c_k \rVert^2) / \tau`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_flows.codecs.semantic import IGNORE, Decoded, SemanticCodec, field_of, planes_of, upsampled
from lightning_flows.flow.noise import Noise
from lightning_flows.networks.layers import without_autocast

Per = Literal["pixel", "image"]
_RIVAL = 8.0  # at its own colour, a class outweighs the nearest other one by e^8


class CodeTable(SemanticCodec):
    """A table of K rows of S numbers. Of a label, every pixel holds the same row, and their mean is read.

    Everything is float32, also under autocast, and fixed tables stay float32 where a model is cast to 16 bits: they are
    neither parameters nor buffers.

    Args:
        num_classes: number K of classes; at most 255 for masks, where 255 means unlabelled.
        channels: number S of planes.
        per: ``"pixel"`` for masks (field ``mask``), ``"image"`` for labels (field ``label``).
        temperature: tau of the scores, in squared units of the code; labels do not depend on it.
        width: w, full width of the dequantisation noise in units of the code. It is added at the size of the planes.

    Raises:
        ValueError: fewer than two classes or more than a mask can hold, no channel, an unknown ``per``, a temperature
            that is not positive, or a negative width.
    """

    def __init__(
        self, num_classes: int, channels: int, *, per: Per = "pixel", temperature: float = 1.0, width: float = 0.0
    ) -> None:
        if per not in ("pixel", "image"):
            raise ValueError(f"per must be 'pixel' or 'image', got {per!r}")
        if num_classes < 2 or (per == "pixel" and num_classes > IGNORE):
            most = f", for masks at most {IGNORE}" if per == "pixel" else ""
            raise ValueError(f"num_classes must be at least 2{most}, got {num_classes}")
        if channels < 1 or not temperature > 0 or not width >= 0:
            given = f"channels={channels}, temperature={temperature}, dequantisation width={width}"
            raise ValueError(f"channels and temperature must be positive, and the width not negative, got {given}")
        super().__init__()
        self.key = "mask" if per == "pixel" else "label"
        self.keys = (self.key,)
        self.num_classes = {self.key: num_classes}
        self.channels, self.temperature, self.width = channels, temperature, width

    @property
    def constant(self) -> int:
        """See `SemanticCodec.constant`."""
        return self.channels if self.key == "label" and self.width == 0 else 0

    @abstractmethod
    def table(self) -> Tensor:
        """Rows of the classes, float32, (K, S)."""

    def unlabelled(self) -> Tensor:
        """Row of a pixel that nobody labelled, (S,)."""
        return torch.zeros(self.channels, device="cpu")

    def encode(self, fields: Mapping[str, Tensor], size: tuple[int, int], noise: Noise | None = None) -> Tensor:
        """See `SemanticCodec.encode`; no gradient flows to the table."""
        ids = field_of(fields, self.key, self.num_classes[self.key])
        with without_autocast(ids.device):
            table = self.table().detach().to(ids.device)
            code = planes_of(ids, by_id(table, self.unlabelled()) if self.key == "mask" else table, size)
            return code if noise is None or self.width == 0 else code + self.width * self._spread(code, noise)

    def decode(self, y: Tensor, size: tuple[int, int] | None = None) -> dict[str, Decoded]:
        """See `SemanticCodec.decode`; of labels, ``size`` changes nothing."""
        self.check_planes(y)
        with without_autocast(y.device):
            y = self.reading(y, size)
            logits = self.logits(y)
            return {self.key: Decoded(self.decide(y, logits), logits.softmax(1))}

    def reading(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """What is compared with the table, float32: masks (B, S, H, W) at ``size``, of labels the mean (B, S)."""
        return upsampled(y.float(), size) if self.key == "mask" else y.float().mean((2, 3))

    def logits(self, y: Tensor) -> Tensor:
        """Logarithms of the scores up to a constant, (B, K, ...), of a reading (B, S, ...)."""
        table = self.table().to(y.device)
        one = (-1, *(1,) * (y.dim() - 2))
        logits = -table.square().sum(1).view(one)  # (K, 1, 1)
        # Sums of products, not a matrix product: that may run with 10 bits of precision on an accelerator.
        for s, row in enumerate(table.T):
            logits = torch.addcmul(logits, y[:, None, s], row.view(one), value=2)  # (B, K, ...)
        return logits / self.temperature

    def decide(self, y: Tensor, logits: Tensor) -> Tensor:
        """Class ids, int64, (B, ...), of a reading (B, S, ...) and its logits (B, K, ...)."""
        return logits.argmax(1)

    def entropy(self, log_scores: Tensor, fields: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """Cross entropy of log-scores (B, K, ...) of a reading of the planes ``y``, (B,): mean over labelled pixels.

        The target is the share of each class in each pixel of the planes; unlabelled pixels belong to none.
        """
        count = self.num_classes[self.key]
        ids = field_of(fields, self.key, count).to(y.device)
        rows = torch.eye(count, device=y.device)
        if self.key == "label":
            share = planes_of(ids, rows, (1, 1))  # (B, K, 1, 1)
        else:
            share = planes_of(ids, by_id(rows, rows.new_zeros(count)), tuple(y.shape[2:]))  # (B, K, h, w)
        entropy = -(share * log_scores.reshape(share.shape)).sum((1, 2, 3))
        return entropy / share.sum((1, 2, 3)).clamp(min=torch.finfo(share.dtype).tiny)

    def _spread(self, like: Tensor, noise: Noise) -> Tensor:
        """Uniform numbers in [-1/2, 1/2) of the shape of ``like``."""
        drawn = noise.draw(
            f"dequantize_{self.key}", like.shape, lambda n, generator: torch.rand(n, generator=generator)
        )
        return drawn.to(like) - 0.5


def by_id(table: Tensor, unlabelled: Tensor) -> Tensor:
    """Rows (256, S) of the ids of a mask: those of the classes, NaN for ids without a class, and that of 255.

    Args:
        table: (K, S).
        unlabelled: (S,).
    """
    rows = table.new_full((IGNORE + 1, table.shape[1]), torch.nan)
    rows[: len(table)] = table
    rows[IGNORE] = unlabelled.to(rows)
    return rows


def sharp(table: Tensor) -> float:
    """A temperature at which every class is read with confidence: an eighth of the least squared distance of two rows.

    Args:
        table: (K, S), on the CPU.

    Raises:
        ValueError: two rows are the same.
    """
    least = torch.pdist(table.double()).min().item()
    if least == 0:
        raise ValueError("two classes have the same code, and none could be told from the other")
    return least**2 / _RIVAL
