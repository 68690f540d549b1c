"""Maps as conditions: a semantic map in the size and channels of a latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.store import Recorded


class SemanticRescaler(Recorded, nn.Module):
    """A map of class indices at the resolution of the image, as a few channels at that of the latent.

    The one-hot map is shrunk by bilinear interpolation in stages and projected by a 1x1 convolution; its result is
    the ``spatial`` stream of a condition. It is an ordinary trainable module: train it with the network that reads
    it. (The official LFM code ran it without gradients, so that there it stayed the random projection it began as.)

    Projection and interpolation are both linear in the map and act on different axes, so the projection comes
    first here, as a table of the classes: the same numbers without K channels at full resolution.

    Args:
        num_classes: number K of classes: 19 for CelebAMask-HQ, 151 for ADE20k, 182 for COCO-Stuff.
        out_channels: channels of the result.
        stages: how often the map is shrunk.
        factor: of each stage.
        bias: of the convolution.

    Raises:
        ValueError: a number out of its range.

    References:
        High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022).
        Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
    """

    def __init__(
        self,
        num_classes: int,
        out_channels: int = 4,
        *,
        stages: int = 3,
        factor: float = 0.5,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if stages < 0:
            raise ValueError(f"stages must not be negative, got {stages}")
        if not 0 < factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {factor}")
        self.num_classes, self.stages, self.factor = num_classes, stages, factor
        self.channel_mapper = nn.Conv2d(num_classes, out_channels, 1, bias=bias)

    def forward(self, labels: Tensor) -> Tensor:
        """The condition of a map.

        Args:
            labels: class of every pixel, integer, shape (B, H, W).

        Returns:
            Shape (B, out_channels, H factor^stages, W factor^stages).

        Raises:
            ValueError: no integer map (B, H, W), or a class outside [0, K) (checked on the CPU).
        """
        if labels.dim() != 3 or labels.is_floating_point():
            raise ValueError(f"labels must be integers of shape (B, H, W), got {labels.dtype} {tuple(labels.shape)}")
        self._check_range(labels)
        table = self.channel_mapper.weight.flatten(1).t()  # (K, C)
        x = F.embedding(labels.long(), table).permute(0, 3, 1, 2)  # (B, C, H, W)
        if self.channel_mapper.bias is not None:
            x = x + self.channel_mapper.bias[:, None, None]
        for _ in range(self.stages):
            x = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)
        return x

    def _check_range(self, labels: Tensor) -> None:
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must lie in [0, {self.num_classes}), got values from {low} to {high}")
