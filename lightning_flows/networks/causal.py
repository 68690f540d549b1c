"""Layers of a causal transformer that also runs token by token, with keys and values kept from the tokens before.

A sequence can be given whole (training), or in parts of any length with one `KeyValueCache` (sampling): both give the
same numbers. Keys are kept after their rotation, in storage that is allocated once, so a new token costs its own
arithmetic and one look at what is kept.

The names of the state dict are those of the official TARFlow and STARFlow files.

References:
    Attention Is All You Need (Vaswani et al., 2017).
    GLU Variants Improve Transformer (Shazeer, 2020), for the gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.networks.layers import RMSNorm, at_least_float32, attention
from lightning_flows.networks.rotary import Rotation

Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class LayerStyle:
    """What the layers of a causal transformer look like.

    Args:
        hidden_size: width W of the tokens.
        head_size: channels d of a head.
        num_heads: number of heads H; None for ``hidden_size / head_size``.
        num_kv_heads: heads of keys and values, divides the number of heads; None for as many.
        mlp_ratio: width of the MLP over W.
        norm: ``"layer"`` (with gain and bias) or ``"rms"`` (`OffsetRMSNorm`).
        gated_mlp: ``down(gelu(gate(x)) up(x))`` with the tanh approximation, else Linear, exact GELU, Linear.
        bias: of the Linears.
        qk_norm: normalise queries and keys of each head.
        post_norm: normalise what attention and MLP add.

    Raises:
        ValueError: sizes that do not divide each other, or an argument out of its range.
    """

    hidden_size: int
    head_size: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    mlp_ratio: float = 4.0
    norm: Norm = "layer"
    gated_mlp: bool = False
    bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False

    def __post_init__(self) -> None:
        if self.head_size < 1 or (self.num_heads is None and self.hidden_size % self.head_size):
            raise ValueError(f"head_size must divide hidden_size={self.hidden_size}, got {self.head_size}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide the {self.heads} heads, got {self.num_kv_heads}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.hidden_size // self.head_size if self.num_heads is None else self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        return round(self.hidden_size * self.mlp_ratio)

    def norm_of(self, size: int) -> nn.Module:
        """A fresh norm over ``size`` channels."""
        return nn.LayerNorm(size) if self.norm == "layer" else OffsetRMSNorm(size)


class OffsetRMSNorm(RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * (1 + weight)``: the gain is kept as its distance from 1."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., size); the dtype of ``x``."""
        y = at_least_float32(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)).to(x.dtype)


class LayerCache:
    """Keys and values of one layer.

    Args:
        length: most positions.

    Attributes:
        filled: positions that are known.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.keys = self.values = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values (B, G, N, d) of the next N positions; those of all so far, (B, G, filled, d)."""
        if self.keys.numel() == 0:  # rows, heads and dtype are known now
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.keys[:, :, start : self.filled] = k
        self.values[:, :, start : self.filled] = v
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


class KeyValueCache:
    """Keys and values of a stack of layers.

    Args:
        depth: number of layers.
        length: most positions.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.layers = [LayerCache(length) for _ in range(depth)]

    @property
    def filled(self) -> int:
        """Positions that are known."""
        return self.layers[0].filled if self.layers else 0

    def rewind(self, filled: int) -> None:
        """Forget all positions from ``filled`` on."""
        for layer in self.layers:
            layer.filled = filled

    def rows(self, index: Tensor) -> KeyValueCache:
        """A copy with some of the rows."""
        part = KeyValueCache(0, 0)
        for layer in self.layers:
            copy = LayerCache(layer.length)
            copy.keys, copy.values, copy.filled = layer.keys[index], layer.values[index], layer.filled
            part.layers.append(copy)
        return part

    def put(self, index: Tensor, part: KeyValueCache, start: int, stop: int) -> None:
        """Take over positions ``start`` to ``stop - 1`` of some rows from a copy with those rows."""
        for layer, other in zip(self.layers, part.layers, strict=True):
            layer.keys[index, :, start:stop] = other.keys[:, :, start:stop]
            layer.values[index, :, start:stop] = other.values[:, :, start:stop]


class CausalAttention(nn.Module):
    """Causal self-attention with one Linear for queries, keys and values (in this order of rows)."""

    def __init__(self, style: LayerStyle) -> None:
        super().__init__()
        inner = style.heads * style.head_size
        self.sizes = [inner, style.kv_heads * style.head_size, style.kv_heads * style.head_size]
        self.head_size = style.head_size
        self.norm = style.norm_of(style.hidden_size)
        self.qkv = nn.Linear(style.hidden_size, sum(self.sizes), bias=style.bias)
        self.query_norm = OffsetRMSNorm(style.head_size) if style.qk_norm else None
        self.key_norm = OffsetRMSNorm(style.head_size) if style.qk_norm else None
        self.proj = nn.Linear(inner, style.hidden_size, bias=style.bias)
        self.post_norm = style.norm_of(style.hidden_size) if style.post_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        sharpness: Tensor | None = None,
    ) -> Tensor:
        """What attention adds to the tokens; arguments as in `CausalLayer.forward`, shape (B, N, W)."""
        parts = self.qkv(self.norm(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts)  # (B, H, N, d)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        if sharpness is not None:
            q = q * sharpness[:, None, None, None].to(q.dtype)
        y = self.proj(self._attend(q, k, v, cache).transpose(1, 2).flatten(2))  # (B, N, W)
        return y if self.post_norm is None else self.post_norm(y)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        if cache is None or (cache.filled == 0 and q.shape[2] > 1):
            if cache is not None:
                cache.append(k, v)
            return attention(q, k, v, causal=True)
        known = cache.filled
        keys, values = cache.append(k, v)
        return attention(q, keys, values, None if q.shape[2] == 1 else _lower_right(q.shape[2], known, q.device))


def _lower_right(new: int, known: int, device: torch.device) -> Tensor:
    """Each of ``new`` queries sees the known positions, those before it and itself: bool (new, known + new)."""
    return torch.ones(new, known + new, dtype=torch.bool, device=device).tril(known)


class PlainMlp(nn.Module):
    """Norm, Linear, exact GELU, Linear."""

    def __init__(self, style: LayerStyle) -> None:
        super().__init__()
        self.norm = style.norm_of(style.hidden_size)
        self.main = nn.Sequential(
            nn.Linear(style.hidden_size, style.mlp_size, bias=style.bias),
            nn.GELU(),
            nn.Linear(style.mlp_size, style.hidden_size, bias=style.bias),
        )
        self.post_norm = style.norm_of(style.hidden_size) if style.post_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to tokens ``x``, shape (B, N, W)."""
        y = self.main(self.norm(x))
        return y if self.post_norm is None else self.post_norm(y)


class GatedMlp(nn.Module):
    """Norm, ``down(gelu(gate(x)) * up(x))`` with the tanh approximation of GELU."""

    def __init__(self, style: LayerStyle) -> None:
        super().__init__()
        self.norm = style.norm_of(style.hidden_size)
        self.gate_proj = nn.Linear(style.hidden_size, style.mlp_size, bias=style.bias)
        self.up_proj = nn.Linear(style.hidden_size, style.mlp_size, bias=style.bias)
        self.down_proj = nn.Linear(style.mlp_size, style.hidden_size, bias=style.bias)
        self.post_norm = style.norm_of(style.hidden_size) if style.post_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to tokens ``x``, shape (B, N, W)."""
        x = self.norm(x)
        y = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return y if self.post_norm is None else self.post_norm(y)


class CausalLayer(nn.Module):
    """``x += attention(x); x += mlp(x)``, each behind its norm.

    Args:
        style: widths and options.
    """

    def __init__(self, style: LayerStyle) -> None:
        super().__init__()
        self.attention = CausalAttention(style)
        self.mlp = GatedMlp(style) if style.gated_mlp else PlainMlp(style)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        sharpness: Tensor | None = None,
    ) -> Tensor:
        """The tokens after this layer.

        Args:
            x: tokens, or the next ones behind those of the cache, shape (B, N, W).
            rotation: of their positions; None for positions that are in ``x``.
            cache: of this layer; it is extended. None where ``x`` is the whole sequence.
            sharpness: factor on the logits of each row (1 / temperature), shape (B,); None for 1.

        Returns:
            Shape (B, N, W).
        """
        x = x + self.attention(x, rotation, cache, sharpness)
        return x + self.mlp(x)
