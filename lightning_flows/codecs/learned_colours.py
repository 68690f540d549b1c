r"""Colours of classes that are learned with the model: nearby for classes that look alike, if that helps the flow.

Row k is :math:`c_k = \sqrt S\, a_k / \lVert a_k \rVert` with trained anchors a. With the network's estimate
:math:`\hat y` of the planes and the class k of a pixel, the extra loss is

.. math:: -\log p(k \mid \hat y) = -\log \operatorname{softmax}_k(-\lVert \hat y - c_k \rVert^2 / \tau).

Reference: Continuous diffusion for categorical data (Dieleman, Sartran, Roshannai, Savinov, Ganin, Richemond, Doucet,
Strudel, Dyer, Durkan, Hawthorne, Leblond, Grathwohl, Adler, 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flows.codecs.code_table import CodeTable, Per, sharp
from lightning_flows.flow.noise import generator_of
from lightning_flows.networks.layers import without_autocast

_STEPS = 100  # of repulsion, after which the spread hardly changes


class LearnedColours(CodeTable):
    r"""S planes, in which each class has a trained point on the sphere of radius sqrt(S) (each plane about 1 in size).

    How gradients flow: `encode` cuts them. The squared error of the flow would be least if all anchors were the same
    point, so it never sees them as anything but given numbers. Anchors learn from `extra_loss` alone, which reads the
    network's estimate against them, and which sends its gradient to the network as well.

    Why nothing collapses: equal anchors are no better than a guess (cross entropy log K), and the fixed norm leaves no
    way to grow or shrink instead. Classes that are taken for each other do come nearer, until the scores say how often
    that happens: if the estimate is the mean code of two classes that are right at the rates 1 - p and p, the cross
    entropy is least where their squared distance is :math:`\tau \log\frac{1 - p}{p} / (1 - 2p) \ge 2\tau`. At the
    default temperature, that is at least half of the least distance at the start.

    Args:
        num_classes: number K of classes.
        channels: number S of planes.
        weight: factor on the cross entropy.
        per: ``"pixel"`` for masks, ``"image"`` for labels.
        temperature: tau; None: an eighth of the least squared distance of two anchors at the start.

    Raises:
        ValueError: fewer than two channels, a negative weight; see `CodeTable`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        weight: float = 0.1,
        per: Per = "pixel",
        temperature: float | None = None,
    ) -> None:
        if channels < 2:
            raise ValueError(f"channels must be at least 2, got {channels}: a line has room for two points of one norm")
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        super().__init__(num_classes, channels, per=per)
        self.weight = weight
        start = spread_points(num_classes, channels)
        self.temperature = sharp(start) if temperature is None else temperature
        self.anchors = nn.Parameter(torch.empty(num_classes, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Anchors as at the start: the same on every machine, up to round-off."""
        with torch.no_grad():
            self.anchors.copy_(spread_points(*self.anchors.shape))

    def table(self) -> Tensor:
        """See `CodeTable.table`; differentiable in the anchors."""
        return math.sqrt(self.channels) * F.normalize(self.anchors.float(), dim=1)

    def extra_loss(self, y: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """``weight`` times the cross entropy of the estimate, float32, (B,): the mean over labelled pixels.

        Where a pixel of the planes covers several of the mask, the target is the share of each class among them. A
        sample without a labelled pixel has loss 0.

        Args:
            y: see `SemanticCodec.extra_loss`.
            fields: see `SemanticCodec.encode`.

        Raises:
            ValueError: see `SemanticCodec.encode` and `SemanticCodec.decode`.
        """
        self.check_planes(y)
        with without_autocast(y.device):
            return self.weight * self.entropy(self.logits(self.reading(y)).log_softmax(1), fields, y)


def spread_points(count: int, dims: int) -> Tensor:
    """Points far from each other on the sphere of radius sqrt(dims): float32, (count, dims), on the CPU.

    Keyed random directions repel each other with a force of the inverse cube of their distance.

    Args:
        count: number of points.
        dims: number of coordinates, at least 2.
    """
    drawn = torch.randn(count, dims, dtype=torch.float64, device="cpu", generator=generator_of("anchors", count, dims))
    points = F.normalize(drawn, dim=1)
    for step in range(_STEPS):
        apart = (2 - 2 * points @ points.T).clamp(min=1e-6)  # squared distances
        force = apart.pow(-2).fill_diagonal_(0)
        pull = force / force.sum(1, keepdim=True)
        points = F.normalize(points - (1 - step / _STEPS) * pull @ points, dim=1)
    return (math.sqrt(dims) * points).float()
