"""`EDMUNet`: the ADM U-Net as EDM rewrote it, used by LFM for FFHQ, Bedroom and ImageNet.

Beside `ADMUNet`: groups of at least four channels, levels joined by residual blocks with 2x2 means and nearest
neighbours, attention chosen by the size of the map, heads of 64 channels (none where a block has fewer), a label
that is a bias-free Linear on its one-hot vector, so that "no label" is the zero vector and needs no row.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022).
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition, Tokens
from lightning_flows.networks.conditioning import AbsentLabel, LabelEmbedding
from lightning_flows.networks.unet import UNet
from lightning_flows.networks.unet_blocks import BlockOptions, QkvOrder
from lightning_flows.networks.unet_levels import attend_where, level_widths, sides


class EDMUNet(UNet):
    """A U-Net that predicts a velocity (or noise, or data) of shape (C, H, W) at a time and a condition.

    Args:
        input_size: side of a square input, or (height, width); divisible by 2 for each change of level.
        in_channels: channels C of a sample, without those of a map.
        out_channels: channels that are computed, C by default; those beyond C are dropped.
        patch_size: side p of the patches whose pixels are the channels of the finest level; where it has fewer channels
            than p^2 C, samples may stay noisy (a warning).
        pooled_channels: number of last channels of the output that are the same at every place; read from the middle.
        hidden_size: channels W of the finest level at factor 1.
        channel_mult: channels of each level over W, fine to coarse.
        num_blocks: residual blocks of a level (the decoder has one more).
        attention_sizes: levels with attention, by the (longer) side of their map; the middle always has it.
        head_channels: channels of a head, at least; blocks with fewer channels have no attention (a warning).
        num_heads: attention heads of every block, instead of ``head_channels``.
        embedding_mult: width of the embedding over W.
        num_classes: number of classes; None for a network that reads no label.
        label_dropout: rate at which training drops the label.
        context_dim: width of the tokens (``condition.tokens``) to which every attention block attends as well;
            None for a network that reads none. Absent tokens leave one learned null token.
        context_dropout: rate at which training drops the tokens.
        spatial_channels: channels of a map (``condition.spatial``, (B, spatial_channels, H, W)) that is joined to
            the input; an absent map is zero.
        spatial_dropout: rate at which training drops the map.
        dropout: rate inside the residual blocks.
        time_scale: factor on the time before the sinusoid; 1 in LFM.

    Attributes:
        shape: (C, H, W).
        streams: ``"label"``, ``"tokens"`` and ``"spatial"``, where the network reads them.

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
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_blocks: int = 2,
        attention_sizes: Sequence[int] = (16, 8, 4),
        head_channels: int = 64,
        num_heads: int | None = None,
        embedding_mult: int = 4,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        context_dim: int | None = None,
        context_dropout: float = 0.0,
        spatial_channels: int = 0,
        spatial_dropout: float = 0.0,
        dropout: float = 0.0,
        time_scale: float = 1.0,
    ) -> None:
        if num_classes is None and label_dropout:
            raise ValueError(f"label_dropout must be 0 without num_classes, got {label_dropout}")
        if context_dim is None and context_dropout:
            raise ValueError(f"context_dropout must be 0 without context_dim, got {context_dropout}")
        widths = level_widths(hidden_size, channel_mult)
        levels = [max(sides(input_size)) // (max(patch_size, 1) * 2**i) for i in range(len(widths))]
        attend = attend_where("attention_sizes", attention_sizes, levels)
        heads = _heads(num_heads, head_channels)
        _warn_of_missing_attention(widths, attend, heads, head_channels)
        embedding_size = embedding_mult * hidden_size
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            pooled_channels=pooled_channels,
            hidden_size=hidden_size,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attend=attend,
            change="block",
            options=edm_options(embedding_size, heads, dropout=dropout, context_dim=context_dim),
            time_scale=time_scale,
            label=None if num_classes is None else OneHotLabel(num_classes, embedding_size, dropout=label_dropout),
            context=None if context_dim is None else Context(context_dim),
            spatial_channels=spatial_channels,
            drop_rates={"label": label_dropout, "tokens": context_dropout, "spatial": spatial_dropout},
        )


def edm_options(
    embedding_size: int,
    heads: Callable[[int], int],
    *,
    scale_shift: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-5,
    skip_scale: float = 1.0,
    project_skip: bool = False,
    context_dim: int | None = None,
) -> BlockOptions:
    """Options of a `UNetBlock` as EDM has it; see `BlockOptions`."""
    order: QkvOrder = "channel"
    return BlockOptions(
        embedding_size=embedding_size,
        groups=lambda channels: min(32, channels // 4),
        heads=heads,
        qkv_order=order,
        scale_shift=scale_shift,
        dropout=dropout,
        eps=eps,
        skip_scale=skip_scale,
        project_skip=project_skip,
        context_dim=context_dim,
    )


class OneHotLabel(LabelEmbedding):
    """A bias-free Linear on the one-hot vector of the class, which is zero where the label is absent.

    Its table holds the columns of that Linear: shape (num_classes, hidden_size), entries N(0, 1).

    Args:
        num_classes: number K of classes.
        hidden_size: width D of the embedding.
        dropout: rate at which training drops a label, in [0, 1).
    """

    def __init__(self, num_classes: int, hidden_size: int, *, dropout: float = 0.0) -> None:
        super().__init__(num_classes, hidden_size, dropout=dropout, absent="last")
        self.embedding_table = nn.Embedding(num_classes, hidden_size)  # no null row

    @staticmethod
    def rows_mean(num_classes: int, dropout: float, absent: AbsentLabel) -> tuple[int, bool]:
        """See `LabelEmbedding.rows_mean`: all rows are classes."""
        return num_classes, False

    def forward(self, condition: Condition, batch_size: int) -> Tensor:
        """Embedding of the labels of ``condition``, shape (B, D)."""
        rows = super().forward(condition, batch_size)
        return rows * condition.presence("label", batch_size, rows.device)[:, None]


class Context(nn.Module):
    """The tokens of a condition behind one learned null token, which is all that is left where they are absent.

    Args:
        size: width D of a token.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"context_dim must be positive, got {size}")
        self.null = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the null token, N(0, 0.02^2)."""
        nn.init.normal_(self.null, std=0.02)

    def forward(self, condition: Condition | None, batch_size: int) -> Tokens:
        """Tokens (B, 1 + L, D) and their mask (B, 1 + L).

        Raises:
            ValueError: tokens of another width.
        """
        null = self.null.expand(batch_size, 1, -1)
        here = torch.ones(batch_size, 1, dtype=torch.bool, device=null.device)
        if condition is None or condition.tokens is None:
            return Tokens(null, here)
        values, mask = condition.tokens
        if values.dim() != 3 or values.shape[::2] != null.shape[::2]:
            raise ValueError(
                f"condition.tokens must have shape ({batch_size}, L, {null.shape[2]}), got {tuple(values.shape)}"
            )
        mask = mask & condition.presence("tokens", device=mask.device)[:, None]
        values = torch.where(mask[:, :, None], values, 0).to(null)  # padding may hold anything
        return Tokens(torch.cat([null, values], dim=1), torch.cat([here, mask.to(here)], dim=1))


def _heads(num_heads: int | None, head_channels: int) -> Callable[[int], int]:
    if num_heads is not None and num_heads < 1:
        raise ValueError(f"num_heads must be positive (or None), got {num_heads}")
    if head_channels < 1:
        raise ValueError(f"head_channels must be positive, got {head_channels}")
    return lambda channels: channels // head_channels if num_heads is None else num_heads


def _warn_of_missing_attention(
    widths: Sequence[int], attend: Sequence[bool], heads: Callable[[int], int], head_channels: int
) -> None:
    asked = [*attend[:-1], True]  # the middle has the width of the last level
    missing = [i for i, (width, here) in enumerate(zip(widths, asked, strict=True)) if here and not heads(width)]
    if missing:
        warnings.warn(
            f"level(s) {missing} of channel_mult have fewer than head_channels={head_channels} channels and therefore "
            "no attention, as in the official network. Lower head_channels, or give num_heads",
            UserWarning,
            stacklevel=3,
        )
