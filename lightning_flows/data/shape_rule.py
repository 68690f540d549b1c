"""The exact rule that reads masks and labels from pictures of `Shapes`: it judges what a model draws from a mask.

Pixels of the background are nearly grey, those of shapes are saturated and have the hue of their class. The gap
between the two, and between the hues, is wider than jitter, shading, noise and rounding to 8 bits together
(`lightning_flows.data.shape_drawing` has the numbers), so that the rule makes no error on a true picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("circle", "square", "triangle", "cross", "ring")  # labels 0..4; mask classes 1..5
HUES = (2.0, 215.0, 48.0, 140.0, 285.0)  # of each kind, in degrees: red, blue, yellow, green, violet
CHROMA_BETWEEN = 0.3  # largest minus smallest channel in [0, 1]: background lies below, shapes above


def chroma_and_hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """Chroma (largest minus smallest channel, in [0, 1]) and hue (in degrees, [0, 360)) of every pixel.

    Args:
        images: RGB in [-1, 1], (B, 3, H, W); what lies outside is clipped.

    Returns:
        Two tensors, float32, (B, H, W); the hue of a grey pixel is 0.
    """
    red, green, blue = pixels = ((images.float().clamp(-1, 1) + 1) / 2).unbind(1)  # each (B, H, W)
    stacked = torch.stack(pixels)
    largest, at = stacked.max(0)
    chroma = largest - stacked.amin(0)
    between = torch.stack([green - blue, blue - red, red - green]).gather(0, at[None])[0]
    hue = 60 * (between / chroma.clamp_min(1e-6) + 2 * at)  # red at 0, green at 120, blue at 240 degrees
    return chroma, hue.remainder(360)


def shape_mask(images: Tensor) -> Tensor:
    """Class of every pixel: 0 where it is nearly grey, else 1 + the kind whose hue is nearest.

    Args:
        images: RGB in [-1, 1], (B, 3, H, W); what lies outside is clipped.

    Returns:
        Mask classes 0..5 (0 background, 1 + place in `KINDS`), int64, (B, H, W).

    Raises:
        ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    chroma, hue = chroma_and_hue(images)
    away = (hue[:, None] - hue.new_tensor(HUES)[:, None, None]).abs()  # (B, 5, H, W)
    nearest = torch.minimum(away, 360 - away).argmin(1)
    return torch.where(chroma < CHROMA_BETWEEN, 0, nearest + 1)


def shape_label(masks: Tensor) -> Tensor:
    """Label of a picture from its mask: the kind that covers most pixels.

    Args:
        masks: mask classes 0..5, int64, (B, H, W).

    Returns:
        Labels 0..4, int64, (B,); -1 where there is no shape at all.
    """
    counts = torch.stack([(masks == kind).sum((-2, -1)) for kind in range(1, len(KINDS) + 1)], 1)  # (B, 5)
    return torch.where(counts.amax(1) > 0, counts.argmax(1), -1)
