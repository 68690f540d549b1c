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
        if self.heads < 1:
            raise ValueError(f"num_heads must be positive, got {self.num_heads}")
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
        store: keys and values beside each other, shape (B, length, 2, G, d); empty before the first ones come.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.store = torch.empty(0)

    @property
    def keys(self) -> Tensor:
        """Keys of all positions, known or not, shape (B, G, length, d)."""
        return self.store[:, :, 0].transpose(1, 2)

    @property
    def values(self) -> Tensor:
        """Values of all positions, known or not, shape (B, G, length, d)."""
        return self.store[:, :, 1].transpose(1, 2)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values (B, G, N, d) of the next N positions; those of all so far, (B, G, filled, d)."""
        return self.extend(torch.stack([k, v], dim=2).permute(0, 3, 2, 1, 4))

    def extend(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, for keys and values beside each other, (B, N, 2, G, d)."""
        if self.store.numel() == 0:  # rows, heads and dtype are known now
            self.store = pairs.new_empty(pairs.shape[0], self.length, *pairs.shape[2:])
        start, self.filled = self.filled, self.filled + pairs.shape[1]
        self.store.narrow(1, start, pairs.shape[1]).copy_(pairs)
        keys, values = self.store.narrow(1, 0, self.filled).transpose(1, 3).unbind(2)
        return keys, values


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
            copy.store, copy.filled = layer.store[index], layer.filled
            part.layers.append(copy)
        return part

    def put(self, index: Tensor, part: KeyValueCache, start: int, stop: int) -> None:
        """Take over positions ``start`` to ``stop - 1`` of some rows from a copy with those rows."""
        for layer, other in zip(self.layers, part.layers, strict=True):
            layer.store[index, start:stop] = other.store[:, start:stop]


class CausalAttention(nn.Module):
    """Causal self-attention with one Linear for queries, keys and values (in this order of rows)."""

    def __init__(self, style: LayerStyle) -> None:
        super().__init__()
        inner = style.heads * style.head_size
        self.head_size, self.heads = style.head_size, [style.heads, style.kv_heads, style.kv_heads]
        self.norm = style.norm_of(style.hidden_size)
        self.qkv = nn.Linear(style.hidden_size, sum(self.heads) * style.head_size, bias=style.bias)
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
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_size))  # (B, N, H + 2 G, d)
        q, k, v = (part.transpose(1, 2) for part in heads.split(self.heads, dim=2))  # each (B, H or G, N, d)
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
        if cache is None:
            return attention(q, k, v, causal=True)
        known, new, dtype = cache.filled, q.shape[2], kept_dtype(k)
        k, v = cache.append(k.to(dtype), v.to(dtype))
        mask = lower_right(new, known, q.device) if known and new > 1 else None
        return attention(q.to(dtype), k, v, mask, causal=not known).to(q.dtype)


def kept_dtype(x: Tensor) -> torch.dtype:
    """In which dtype keys and values are kept: on a CPU, attention to them is slow in 16 bits, unless compiled."""
    slow = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return torch.promote_types(x.dtype, torch.float32) if slow else x.dtype


def lower_right(new: int, known: int, device: torch.device) -> Tensor:
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
