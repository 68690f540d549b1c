r"""Parts of the "ADM" U-Nets: one residual block, attention over places and over tokens, changes of resolution.

With the embedding ``e`` of time and condition (SiLU already applied) a block computes

    h = conv1(resample(SiLU(norm1(x))))
    h = norm2(h) (1 + scale(e)) + shift(e)        or, additive,  norm2(h + shift(e))
    x = skip(resample(x)) + conv2(dropout(SiLU(h)))
    x = x + proj(attention(qkv(norm(x))))         where attention is asked for

Two published families are made of it. The guided-diffusion code has 32 groups and writes q, k, v either head by
head or kind by kind; the EDM code has groups of four channels or more and writes q, k, v channel by channel.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021).
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.flow.condition import Tokens
from lightning_flows.networks.layers import at_least_float32, attention, without_autocast

Direction = Literal["down", "up"]
QkvOrder = Literal["head", "kind", "channel"]
QKV_ORDERS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    # sizes of the three axes in which 3 C channels are written (-1: the rest), and where kind, head, channel lie
    "head": ((0, 3, -1), (1, 0, 2)),  # (head, q|k|v, channel)
    "kind": ((3, 0, -1), (0, 1, 2)),  # (q|k|v, head, channel)
    "channel": ((0, -1, 3), (2, 0, 1)),  # (head, channel, q|k|v)
}


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network share.

    Attributes:
        embedding_size: width E of the embedding.
        groups: number of groups of a normalisation over this many channels.
        heads: number of attention heads over this many channels; 0 is no attention.
        qkv_order: how the 3 C channels of q, k and v are written, see `QKV_ORDERS`.
        scale_shift: the embedding scales and shifts after the second norm; else it is added before it.
        dropout: rate before the second convolution.
        eps: of the normalisations.
        skip_scale: factor on every sum with a skip, 1 or sqrt(1/2).
        project_skip: a block that changes the resolution has a 1x1 convolution on its skip.
        context_dim: width of the tokens of a cross-attention after each self-attention; None for none.
    """

    embedding_size: int
    groups: Callable[[int], int]
    heads: Callable[[int], int]
    qkv_order: QkvOrder = "head"
    scale_shift: bool = True
    dropout: float = 0.0
    eps: float = 1e-5
    skip_scale: float = 1.0
    project_skip: bool = False
    context_dim: int | None = None

    def norm(self, channels: int) -> Norm:
        """The normalisation of this family over ``channels``.

        Raises:
            ValueError: channels that do not fall into groups.
        """
        groups = self.groups(channels)
        if groups < 1 or channels % groups:
            raise ValueError(
                f"hidden_size * channel_mult gives a normalisation of {channels} channels, which do not divide into "
                f"{groups} groups: choose hidden_size as a multiple of 32"
            )
        return Norm(groups, channels, eps=self.eps)


class Norm(nn.GroupNorm):
    """Group normalisation in float32 (or float64), handed back in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W)."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.group_norm(at_least_float32(x), self.num_groups, weight, bias, self.eps).to(x.dtype)


def resampled(x: Tensor, direction: Direction | None) -> Tensor:
    """``x`` (B, C, H, W) at half the size (2x2 means), at twice the size (nearest), or as it is."""
    if direction == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else x


class UNetBlock(nn.Module):
    """A residual block under an embedding, with attention where it is asked for.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of the result.
        options: what the blocks of the network share.
        attention: self-attention over places, and cross-attention where the options have a context.
        resample: the block halves or doubles the resolution.

    Raises:
        ValueError: channels that do not divide into groups or heads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        *,
        attention: bool = False,
        resample: Direction | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.resample, self.scale_shift, self.skip_scale = resample, options.scale_shift, options.skip_scale
        self.norm1 = options.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(options.embedding_size, out_channels * (2 if options.scale_shift else 1))
        self.norm2 = options.norm(out_channels)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        projected = in_channels != out_channels or (resample is not None and options.project_skip)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if projected else nn.Identity()
        heads = options.heads(out_channels) if attention else 0
        self.attention = PlaneAttention(out_channels, heads, options) if heads else None
        self.cross = CrossAttention(out_channels, heads, options) if heads and options.context_dim else None
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the second convolution: a fresh block is its skip."""
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor, context: Tokens | None = None) -> Tensor:
        """The block at ``x``.

        Args:
            x: shape (B, in_channels, H, W).
            embedding: of time and condition, SiLU applied, shape (B, E).
            context: tokens for the cross-attention.

        Returns:
            Shape (B, C, H', W').
        """
        with without_autocast(embedding.device):
            embedded = self.embed(embedding)[:, :, None, None]  # (B, 2C or C, 1, 1)
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))  # (B, C, H', W')
        h = self._modulated(h, embedded).to(h.dtype)
        h = self.conv2(self.dropout(F.silu(h)))
        x = (self.skip(resampled(x, self.resample)) + h) * self.skip_scale
        if self.attention is not None:
            x = (x + self.attention(x)) * self.skip_scale
        if self.cross is not None:
            x = (x + self.cross(x, context)) * self.skip_scale
        return x

    def _modulated(self, h: Tensor, embedded: Tensor) -> Tensor:
        if not self.scale_shift:
            return self.norm2(h + embedded)
        scale, shift = embedded.chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift


class PlaneAttention(nn.Module):
    """Multi-head self-attention over the places of a map (without its residual sum).

    Args:
        channels: C.
        num_heads: heads, divides C.
        options: order of the channels of q, k and v; groups of the norm.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        _check_heads(channels, num_heads)
        self.num_heads, self.qkv_order = num_heads, options.qkv_order
        self.norm = options.norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the output."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the places of ``x`` (B, C, H, W); the same shape."""
        q, k, v = self._heads(self.qkv(self.norm(x)).flatten(2))  # each (B, heads, N, D)
        y = attention(q, k, v).transpose(2, 3).flatten(1, 2)  # (B, C, N)
        return self.proj(y.unflatten(2, x.shape[2:]))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        sizes, (kind, head, channel) = QKV_ORDERS[self.qkv_order]
        split = qkv.unflatten(1, [self.num_heads if size == 0 else size for size in sizes])  # three axes, N
        return split.permute(1 + kind, 0, 1 + head, 4, 1 + channel).unbind(0)


class CrossAttention(nn.Module):
    """Multi-head attention of the places of a map to tokens (without its residual sum).

    Args:
        channels: C.
        num_heads: heads, divides C.
        options: width of the tokens; groups of the norm.
    """

    def __init__(self, channels: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        if options.context_dim is None:
            raise ValueError("context_dim must be a width for a cross-attention, got None")
        _check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.norm = options.norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(options.context_dim, 2 * channels)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the output."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tokens | None) -> Tensor:
        """Attend from ``x`` (B, C, H, W) to ``context`` (B, L, context_dim); the shape of ``x``.

        Raises:
            ValueError: no context.
        """
        if context is None:
            raise ValueError("context must be given to a block with cross-attention, got None")
        q = self.query(self.norm(x)).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)  # (B, h, N, D)
        k, v = self.key_value(context.values).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, context.mask[:, None, None]).transpose(2, 3).flatten(1, 2)  # (B, C, N)
        return self.proj(y.unflatten(2, x.shape[2:]))


class Pooled(nn.Module):
    """Numbers of a sample as a whole: a Linear on the mean of a map over its places.

    Args:
        channels: channels C of the map.
        count: numbers P.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, count)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the output."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The numbers of ``x`` (B, C, H, W), at least float32, (B, P); its weights may have 16 bits."""
        norm, linear = self.norm, self.linear
        with without_autocast(x.device):
            h = F.silu(at_least_float32(x)).mean((2, 3))  # (B, C)
            scale, shift = at_least_float32(norm.weight), at_least_float32(norm.bias)
            h = F.layer_norm(h, norm.normalized_shape, scale, shift, norm.eps)
            return F.linear(h, at_least_float32(linear.weight), at_least_float32(linear.bias))


class Resample(nn.Module):
    """Half or twice the resolution without a residual block.

    With a convolution: 3x3 of stride 2 down, nearest and 3x3 up; without: 2x2 means, nearest.

    Args:
        channels: channels C.
        direction: ``"down"`` or ``"up"``.
        conv: learn it.
    """

    def __init__(self, channels: int, direction: Direction, *, conv: bool) -> None:
        super().__init__()
        self.direction = direction
        stride = 2 if direction == "down" else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1) if conv else None

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tokens | None = None) -> Tensor:
        """``x`` (B, C, H, W) at the other resolution; the rest is not read."""
        if self.conv is None:
            return resampled(x, self.direction)
        return self.conv(x if self.direction == "down" else resampled(x, "up"))


def _check_heads(channels: int, num_heads: int) -> None:
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels of an attention, got {num_heads}")
