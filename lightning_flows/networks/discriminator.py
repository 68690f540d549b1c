"""A critic of patches: it says of every overlapping patch of an image how real it looks.

Reference: Image-to-Image Translation with Conditional Adversarial Networks (Isola, Zhu, Zhou, Efros, 2017).
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_flows.store import Recorded


class PatchDiscriminator(Recorded, nn.Module):
    """4x4 convolutions of stride 2, then two of stride 1; each output sees one patch of the image.

    Group normalisation stands where the paper has batch normalisation: a verdict does not depend on the batch.

    Args:
        in_channels: channels C of an image.
        hidden_size: width after the first convolution; doubled by each further one, up to eight times.
        depth: convolutions of stride 2; 3 sees patches of 70x70 pixels.
        norm_groups: groups of the normalisations; divides ``hidden_size``.

    Raises:
        ValueError: a number that is not positive, or groups that do not divide the width.
    """

    def __init__(self, *, in_channels: int = 3, hidden_size: int = 64, depth: int = 3, norm_groups: int = 8) -> None:
        super().__init__()
        if min(in_channels, hidden_size, depth, norm_groups) < 1:
            raise ValueError("in_channels, hidden_size, depth and norm_groups must be at least 1")
        if hidden_size % norm_groups:
            raise ValueError(f"norm_groups must divide hidden_size={hidden_size}, got {norm_groups}")
        widths = [hidden_size * min(2**level, 8) for level in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden_size, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, depth + 1):
            stride = 2 if level < depth else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_groups, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest = 2**depth * 3  # side below which nothing is left for the last convolutions

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, 1, h, w), large for real, of images (B, C, H, W).

        Raises:
            ValueError: images too small for this depth.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(f"images must have sides of at least {self.smallest}, got {tuple(x.shape[-2:])}")
        return self.layers(x)
