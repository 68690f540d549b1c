r"""Distance of images in the feature maps of a frozen network.

With the maps :math:`f_l(x)` of L layers, every position scaled to a unit vector over the channels,

.. math:: d(x, y) = \frac 1 L \sum_l \operatorname{mean}_{h,w} \lVert \hat f_l(x) - \hat f_l(y) \rVert^2 .

Reference: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang, Isola, Efros, Shechtman,
Wang, 2018), with equal weights instead of learned ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.store import Recorded


class TimmFeatures(Recorded):
    """Feature maps of a timm network, built when first used and never part of a module that trains.

    Args:
        model: name of a timm model, such as ``vgg16.tv_in1k``.
        layers: indices of its stages; all by default.
        pretrained: take the published weights (downloaded by timm).
        checkpoint: or weights from this file.

    Raises:
        ValueError: a checkpoint file that does not exist.
    """

    def __init__(
        self,
        model: str,
        *,
        layers: Sequence[int] | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint {checkpoint} does not exist")
        self.model, self.layers, self.checkpoint = model, layers, checkpoint
        self.pretrained = pretrained or checkpoint is not None

    def build(self) -> nn.Module:
        """The network: images (B, C, H, W) in [-1, 1] -> list of maps."""
        import timm  # here: slow to import, and needed by few

        options: dict[str, Any] = {} if self.layers is None else {"out_indices": tuple(self.layers)}
        if self.checkpoint is not None:
            options["pretrained_cfg_overlay"] = {"file": self.checkpoint}
        network = timm.create_model(self.model, pretrained=self.pretrained, features_only=True, **options)
        return _Normalised(network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])


class _Normalised(nn.Module):
    """Images in [-1, 1], grey or RGB, as a network of photographs expects them."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.expand(-1, len(self.mean), -1, -1) if x.shape[1] == 1 else x
        return self.network(((x + 1) / 2 - self.mean) / self.std)


class Perceptual(Recorded):
    """Distance in the feature maps of any frozen network.

    The network stays outside of the module tree (it is not trained, averaged, synchronised or saved), follows the
    device of the images and runs in float32 and in eval mode.

    Args:
        features: `TimmFeatures`, or a module ``(B, C, H, W) -> map or list of maps (B, C', H', W')``.
        weight: of the distance in the loss of an autoencoder.
        unit: scale every position to a unit vector; without it, the mean squared difference of the maps as they are.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(self, features: TimmFeatures | nn.Module, *, weight: float = 1.0, unit: bool = True) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.features, self.weight, self.unit = features, weight, unit
        self._network: nn.Module | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) of images ``x`` and ``y``, both (B, C, H, W) in [-1, 1]; gradients flow to both."""
        with torch.autocast(x.device.type, enabled=False):
            network = self.network(x.device)
            pairs = zip(_maps(network(x.float())), _maps(network(y.float())), strict=True)
            distance = _distance if self.unit else _squared
            return torch.stack([distance(a, b) for a, b in pairs]).mean(0)  # (B,)

    def network(self, device: torch.device | str = "cpu") -> nn.Module:
        """The frozen network on ``device``."""
        if self._network is None:
            built = self.features.build() if isinstance(self.features, TimmFeatures) else self.features
            self._network = built.float().eval().requires_grad_(False)
        return self._network.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Perceptual:
        """A distance that shares the frozen network."""
        shared = copy.copy(self)
        memo[id(self)] = shared
        return shared


def _maps(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over positions of the squared distance of unit vectors, (B,), of maps (B, C, H, W)."""
    difference = nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)
    return difference.square().sum(1).flatten(1).mean(1)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference, (B,), of maps (B, C, H, W)."""
    return (a - b).square().flatten(1).mean(1)
