r"""Parts of the U-Net of Stable Diffusion: residual blocks, and transformers over places that attend to a text.

With the embedding ``e`` of the time and the text ``c`` (L tokens), over the places of a map,

    x = skip(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time(e))))          residual
    h = enter(norm(x))                                                         then, for each layer of a transformer,
    h = h + self-attention(LN(h));  h = h + attention(LN(h), c);  h = h + MLP(LN(h))
    x = x + leave(h)

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
    GLU Variants Improve Transformer (Shazeer, 2020): the gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.networks.layers import attention
from lightning_flows.networks.unet import Level
from lightning_flows.networks.unet_blocks import BlockOptions, Norm, Resample, UNetBlock

NORM_EPS = 1e-6  # of the group normalisation before a transformer, whatever that of the residual blocks is
MLP_RATIO = 4


class TextBlock(nn.Module):
    """A residual block under the embedding of the time, then a transformer where it is asked for.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of the result.
        options: what the residual blocks of the network share; ``context_dim`` is the width D of the text's tokens.
        depth: layers of the transformer; 0 for none.
    """

    def __init__(self, in_channels: int, out_channels: int, options: BlockOptions, *, depth: int = 0) -> None:
        super().__init__()
        self.residual = UNetBlock(in_channels, out_channels, options)
        self.transformer = PlaneTransformer(out_channels, options, depth=depth) if depth else None

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """The block at ``x``.

        Args:
            x: shape (B, in_channels, H, W).
            embedding: of the time, SiLU applied, shape (B, E).
            text: tokens, shape (B, L, D).
            mask: True where a token is real, shape (B, L); None where all are.

        Returns:
            Shape (B, C, H, W).
        """
        x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, text, mask)


class PlaneTransformer(nn.Module):
    """A transformer over the places of a map, with its residual sum; a fresh one changes nothing.

    Args:
        channels: C.
        options: heads and groups for these channels, and width of the text's tokens.
        depth: layers.

    Raises:
        ValueError: heads that do not divide the channels, or a text without a width.
    """

    def __init__(self, channels: int, options: BlockOptions, *, depth: int) -> None:
        super().__init__()
        heads = options.heads(channels)
        if options.context_dim is None:
            raise ValueError("context_dim must be a width for attention to a text, got None")
        if heads < 1 or channels % heads:
            raise ValueError(f"num_heads must divide the {channels} channels of an attention, got {heads}")
        self.norm = Norm(options.groups(channels), channels, eps=NORM_EPS)
        self.enter = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(TransformerLayer(channels, heads, options.context_dim) for _ in range(depth))
        self.leave = nn.Linear(channels, channels)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the output."""
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the places of ``x`` (B, C, H, W) with each other and with the text; the same shape."""
        h = self.enter(self.norm(x).flatten(2).transpose(1, 2))  # (B, N, C)
        for layer in self.layers:
            h = layer(h, text, mask)
        return x + self.leave(h).transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerLayer(nn.Module):
    """Self-attention, attention to a text and a gated MLP, each behind a norm and with a residual sum."""

    def __init__(self, channels: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = TokenAttention(channels, num_heads, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.cross = TokenAttention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.mlp = GatedMlp(channels, MLP_RATIO * channels)

    def forward(self, h: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update the tokens ``h`` (B, N, C) under the text (B, L, D) and its mask (B, L)."""
        normal = self.norm1(h)
        h = h + self.attention(normal, normal)
        h = h + self.cross(self.norm2(h), text, mask)
        return h + self.mlp(self.norm3(h))


class TokenAttention(nn.Module):
    """Multi-head attention of tokens to others (or to themselves).

    Args:
        channels: width C of the tokens that ask.
        num_heads: heads, divides C.
        context_dim: width D of the tokens that are asked.
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(context_dim, channels, bias=False)
        self.value = nn.Linear(context_dim, channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` (B, N, C) to ``context`` (B, L, D), where its ``mask`` (B, L) is True; (B, N, C)."""
        q, k, v = (self._heads(part) for part in (self.query(x), self.key(context), self.value(context)))
        y = attention(q, k, v, None if mask is None else mask[:, None, None])  # (B, heads, N, C / heads)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)


class GatedMlp(nn.Module):
    """``down(a * GELU(b))`` with ``a, b`` the halves of ``up(x)``.

    Args:
        channels: width of input and output.
        mlp_size: width in between.
    """

    def __init__(self, channels: int, mlp_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * mlp_size)
        self.down = nn.Linear(mlp_size, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token of ``x`` (..., channels)."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


@dataclass(frozen=True)
class LevelSizes:
    """One level: its channels, its residual blocks in the encoder, and the layers of its transformers (0: none)."""

    width: int
    blocks: int
    depth: int


def encoder_levels(levels: Sequence[LevelSizes], options: Sequence[BlockOptions]) -> tuple[nn.ModuleList, list[int]]:
    """Levels from fine to coarse, and the channels of every map that they leave for the decoder."""
    made, skips = nn.ModuleList(), [levels[0].width]
    for i, level in enumerate(levels):
        inputs = [skips[-1]] + [level.width] * (level.blocks - 1)
        blocks = [TextBlock(channels, level.width, options[i], depth=level.depth) for channels in inputs]
        last = i == len(levels) - 1
        made.append(Level(blocks, None if last else Resample(level.width, "down", conv=True)))
        skips += [level.width] * (level.blocks if last else level.blocks + 1)
    return made, skips


def decoder_levels(levels: Sequence[LevelSizes], options: Sequence[BlockOptions], skips: list[int]) -> nn.ModuleList:
    """Levels from coarse to fine, which use up the maps that the encoder leaves."""
    made, channels = nn.ModuleList(), levels[-1].width
    for i, level in reversed(list(enumerate(levels))):
        blocks = []
        for _ in range(level.blocks + 1):
            blocks.append(TextBlock(channels + skips.pop(), level.width, options[i], depth=level.depth))
            channels = level.width
        made.append(Level(blocks, Resample(level.width, "up", conv=True) if i else None))
    return made
