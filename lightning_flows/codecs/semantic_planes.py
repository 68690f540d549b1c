r"""Fixed planes: a plane for each class, a plane for each bit, and the plane of SymmFlow's classifiers.

What a flow returns in one step is about the mean :math:`E[y \mid x]`. Between two classes that are both likely it is
the mean of their codes: with one plane for each class no third one is nearest to that, with an ordinal plane one is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flows.codecs.code_table import CodeTable, Per
from lightning_flows.networks.layers import without_autocast

_RARE = 1e-6  # least frequency of a class in the scores
_SHARP = 10.0  # of the smoothed maximum of the log score: it bends within about a tenth of a frequency


class OneHot(CodeTable):
    r"""K planes: plane k is 1 where the class is k, else -1; read by argmax.

    .. math:: c_{kj} = 2 \cdot 1[j = k] - 1, \qquad p(k \mid y) \propto \max(\tfrac12 (y_k + 1), \varepsilon).

    The planes of a mean say how often each class occurs in it, and these are the scores: what a flow reads in one step
    is the mean of the code given the image, so that they are the probabilities of the classes. A class that never
    occurs is never read. Unlabelled pixels are 0 in all planes.

    The squared error of the flow learns classes slowly. `extra_loss` adds the log score of the same frequencies,
    :math:`-\log p(k)`, which is least at the same mean but for this: :math:`\max` is smoothed, so that a class at
    frequency 0 has a slope, and rare classes come out somewhat below their rates.

    Args:
        num_classes: number K of classes.
        per: ``"pixel"`` for masks, ``"image"`` for labels.
        weight: factor on the log score; 0 leaves the squared error alone.
        temperature: tau of scores that fall with the distance instead, :math:`p(k \mid y) \propto \exp(4 y_k / \tau)`.

    Raises:
        ValueError: a negative ``weight``; see `CodeTable`.
    """

    def __init__(
        self, num_classes: int, *, per: Per = "pixel", weight: float = 1.0, temperature: float | None = None
    ) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        super().__init__(num_classes, num_classes, per=per, temperature=1.0 if temperature is None else temperature)
        self.weight, self.frequencies = weight, temperature is None

    def table(self) -> Tensor:
        """See `CodeTable.table`."""
        return 2 * torch.eye(self.channels, device="cpu") - 1

    def logits(self, y: Tensor) -> Tensor:
        """See `CodeTable.logits`; without products, of which there would be K for each class."""
        return ((y + 1) / 2).clamp_min(_RARE).log() if self.frequencies else 4 * y / self.temperature

    def decide(self, y: Tensor, logits: Tensor) -> Tensor:
        """See `CodeTable.decide`."""
        return y.argmax(1)

    def extra_loss(self, y: Tensor, fields: Mapping[str, Tensor]) -> Tensor | None:
        """``weight`` times the log score of the estimate, float32, (B,): the mean over labelled pixels.

        Args:
            y: see `SemanticCodec.extra_loss`.
            fields: see `SemanticCodec.encode`.

        Raises:
            ValueError: see `SemanticCodec.encode` and `SemanticCodec.decode`.
        """
        if not self.weight:
            return None
        self.check_planes(y)
        with without_autocast(y.device):
            frequencies = F.softplus(_SHARP * (self.reading(y) + 1) / 2)  # (B, K, ...)
            log_scores = frequencies.log() - frequencies.sum(1, keepdim=True).log()
            return self.weight * self.entropy(log_scores, fields, y)


class AnalogBits(CodeTable):
    r"""ceil(log2 K) planes: the bits of the class, the highest first, as -1 and 1; read by sign.

    Where K is no power of 2, some patterns of signs are no class: then the nearest class is read. Unlike with one plane
    for each class, the mean of two codes that differ in several bits may be as near to a third.

    Args:
        num_classes: number K of classes.
        per: ``"pixel"`` for masks, ``"image"`` for labels.
        temperature: tau of the scores.

    Raises:
        ValueError: see `CodeTable`.

    References:
        Analog Bits: Generating Discrete Data using Diffusion Models with Self-Conditioning (Chen, Zhang, Hinton, 2022).
    """

    def __init__(self, num_classes: int, *, per: Per = "pixel", temperature: float = 0.5) -> None:
        super().__init__(num_classes, max(1, (num_classes - 1).bit_length()), per=per, temperature=temperature)

    def table(self) -> Tensor:
        """See `CodeTable.table`."""
        ids = torch.arange(self.num_classes[self.key], device="cpu")
        place = torch.arange(self.channels - 1, -1, -1, device="cpu")
        return 2.0 * (ids[:, None] >> place & 1) - 1  # (K, S)


class ClassPlane(CodeTable):
    r"""SymmFlow's code of image-level labels: one constant plane, whose height is the class.

    .. math:: y = \tfrac{\beta}{2} \left(\frac{2k}{K - 1} - 1\right) + \frac{\beta}{2 (K - 1)} (u - \tfrac12),
              \qquad \hat k = \operatorname{clamp}(\operatorname{round}((K - 1)(\bar y / \beta + \tfrac12)), 0, K - 1).

    It is ordinal: an image that may be a 2 or an 8 is read as a 5. `OneHot` is not. The scores are ours.

    Args:
        num_classes: number K of classes.
        beta: distance of the first and the last class. The noise spans half the gap between neighbours.
        temperature: tau of the scores; None: an eighth of the squared gap between neighbours.

    Raises:
        ValueError: see `CodeTable`; a ``beta`` that is not positive.

    References:
        Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based
        Generative Models (Caetano, Viviers, de With, van der Sommen, 2025).
    """

    def __init__(self, num_classes: int, *, beta: float = 4.0, temperature: float | None = None) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        gap = beta / max(num_classes - 1, 1)
        tau = gap**2 / 8 if temperature is None else temperature
        super().__init__(num_classes, 1, per="image", temperature=tau, width=gap / 2)
        self.beta = beta

    def table(self) -> Tensor:
        """See `CodeTable.table`."""
        last = self.num_classes["label"] - 1
        return (self.beta / 2 * (2 * torch.arange(last + 1.0, device="cpu") / last - 1))[:, None]  # (K, 1)

    def heights(self, y: Tensor) -> Tensor:
        """Mean of the planes (B, 1, h, w) in units of classes, before rounding; float32, (B,)."""
        self.check_planes(y)
        return self._height(self.reading(y))

    def decide(self, y: Tensor, logits: Tensor) -> Tensor:
        """See `CodeTable.decide`: rounds, as SymmFlow does."""
        return self._height(y).round().nan_to_num().clamp(0, self.num_classes["label"] - 1).long()

    def _height(self, mean: Tensor) -> Tensor:
        return (mean[:, 0] / self.beta + 0.5) * (self.num_classes["label"] - 1)
