"""`ADMUNet`: the U-Net of guided diffusion, used by LFM for CelebA-HQ, Church and its two image-to-image tasks.

32 groups in every norm; the time is embedded by sines and cosines, a class is a row of a table added to it.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021).
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from lightning_flows.networks.conditioning import LabelEmbedding
from lightning_flows.networks.unet import UNet
from lightning_flows.networks.unet_blocks import BlockOptions
from lightning_flows.networks.unet_levels import attend_where, level_widths

GROUPS = 32


class ADMUNet(UNet):
    """A U-Net that predicts a velocity (or noise, or data) of shape (C, H, W) at a time and a condition.

    Args:
        input_size: side of a square input, or (height, width); divisible by 2 for each change of level.
        in_channels: channels C of a sample, without those of a map.
        out_channels: channels that are computed, C by default; those beyond C (learned variances) are dropped.
        patch_size: side p of the patches whose pixels are the channels of the finest level; where it has fewer channels
            than p^2 C, samples may stay noisy (a warning).
        pooled_channels: number of last channels of the output that are the same at every place; read from the middle.
        hidden_size: channels W of the finest level at factor 1; the embedding is 4 W wide.
        channel_mult: channels of each level over W, fine to coarse; times W they are multiples of 32.
        num_blocks: residual blocks of a level (the decoder has one more).
        attention_factors: levels with attention, by their factor of downsampling (1, 2, 4, ...); the middle always
            has it.
        num_heads: attention heads, where ``head_channels`` is None.
        head_channels: channels of a head.
        scale_shift: the embedding scales and shifts after the second norm of a block; else it is added before.
        resblock_updown: levels are joined by residual blocks; else by what ``conv_resample`` says.
        conv_resample: levels are joined by 3x3 convolutions; else by 2x2 means and nearest neighbours.
        qkv_order: how q, k and v are written: ``"head"`` (head, q|k|v, channel), ``"kind"`` (q|k|v, head, channel).
        num_classes: number of classes; None for a network that reads no label.
        label_dropout: rate at which training drops the label; above 0 there is a null row, as guidance needs.
            At 0 an absent label is an error.
        spatial_channels: channels of a map (``condition.spatial``, (B, spatial_channels, H, W)) that is joined to
            the input; an absent map is zero.
        spatial_dropout: rate at which training drops the map.
        dropout: rate inside the residual blocks.
        time_scale: factor on the time before the sinusoid; 1 in LFM.

    Attributes:
        shape: (C, H, W).
        streams: ``"label"`` and ``"spatial"``, where the network reads them.

    Raises:
        ValueError: sizes that do not divide each other, or an argument out of its range.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: int = 1,
        pooled_channels: int = 0,
        hidden_size: int = 256,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_factors: Sequence[int] = (8,),
        num_heads: int = 4,
        head_channels: int | None = None,
        scale_shift: bool = True,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        qkv_order: Literal["head", "kind"] = "head",
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        spatial_channels: int = 0,
        spatial_dropout: float = 0.0,
        dropout: float = 0.0,
        time_scale: float = 1.0,
    ) -> None:
        if qkv_order not in ("head", "kind"):
            raise ValueError(f"qkv_order must be 'head' or 'kind', got {qkv_order!r}")
        if num_classes is None and label_dropout:
            raise ValueError(f"label_dropout must be 0 without num_classes, got {label_dropout}")
        widths = level_widths(hidden_size, channel_mult)
        if not scale_shift:
            _warn_of_invisible_time(widths)
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            pooled_channels=pooled_channels,
            hidden_size=hidden_size,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attend=attend_where("attention_factors", attention_factors, [2**i for i in range(len(widths))]),
            change="block" if resblock_updown else "conv" if conv_resample else "fixed",
            options=BlockOptions(
                embedding_size=4 * hidden_size,
                groups=lambda channels: GROUPS,
                heads=_heads(num_heads, head_channels),
                qkv_order=qkv_order,
                scale_shift=scale_shift,
                dropout=dropout,
            ),
            time_scale=time_scale,
            label=None if num_classes is None else LabelEmbedding(num_classes, 4 * hidden_size, dropout=label_dropout),
            context=None,
            spatial_channels=spatial_channels,
            drop_rates={"label": label_dropout, "spatial": spatial_dropout},
        )


def _heads(num_heads: int, head_channels: int | None) -> Callable[[int], int]:
    def heads(channels: int) -> int:
        if head_channels is None:
            return num_heads
        if head_channels < 1 or channels % head_channels:
            raise ValueError(f"head_channels must divide the {channels} channels of an attention, got {head_channels}")
        return channels // head_channels

    if head_channels is None and num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    return heads


def _warn_of_invisible_time(widths: Sequence[int]) -> None:
    """A constant added to a channel that is a group of its own is removed by the norm that follows."""
    if blind := [i for i, width in enumerate(widths) if width == GROUPS]:
        warnings.warn(
            f"scale_shift=False with {GROUPS} channels in {GROUPS} groups at level(s) {blind} of channel_mult: the "
            "norm removes the time (and the label) that is added before it, so these blocks cannot see them. Use "
            f"scale_shift=True, or more than {GROUPS} channels (hidden_size * channel_mult)",
            UserWarning,
            stacklevel=3,
        )
