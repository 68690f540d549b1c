"""Parts that transformers share: attention with a switchable backend, time and place embeddings, norm, MLP.

Every attention of this package goes through `attention`, so that forward-mode and second derivatives work
where somebody needs them: ``with attention_backend("math"): ...``. Time and modulation are float32 even under
autocast (`without_autocast`): a time in [0, 1] has too few distinct values in 16 bits.

References:
    Attention Is All You Need (Vaswani et al., 2017).
    Scalable Diffusion Models with Transformers (Peebles and Xie, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionBackend = Literal["auto", "flash", "math"]
BACKENDS = ("auto", "flash", "math")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
SHORT = 128  # keys up to which attention in 16 bits takes a CPU more time than in float32, most of all backward

# A plain module variable, not a ContextVar: checkpointed blocks are recomputed in autograd's own threads.
_backend: AttentionBackend = "auto"


@contextmanager
def attention_backend(backend: AttentionBackend) -> Iterator[None]:
    """Choose how `attention` computes, inside a ``with`` block (backward passes of it included).

    Args:
        backend: ``"auto"``: PyTorch's choice, usually fused; ``"flash"``: a fused kernel or an error;
            ``"math"``: plain operations, which have forward-mode derivatives and derivatives of any order.

    Raises:
        ValueError: an unknown backend.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    previous, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = previous


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, ``softmax(q k^T / sqrt(D)) v``.

    Args:
        q: queries, shape (B, H, N, D).
        k: keys, shape (B, G, M, D); G divides H, and every H / G heads share keys and values.
        v: values, shape (B, G, M, D).
        mask: True where a query may look, bool, two axes or more, broadcastable to (B, H, N, M).
        causal: query i looks at the keys 0..i alone; instead of a mask.

    Returns:
        Shape (B, H, N, D).

    References:
        GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (Ainslie et al., 2023).
    """
    if k.shape[1] != q.shape[1]:
        if q.shape[2] == 1 and mask is None and not causal:  # heads that share keys are queries of one head
            return attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v).reshape(q.shape)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if q.shape[2] == 1 and mask is None and not causal and q.device.type == "cpu" and torch.compiler.is_compiling():
        return _weighted_sum(q, k, v).to(v.dtype)
    if _backend == "auto" and q.device.type == "cpu" and k.shape[2] <= SHORT:
        q, k, v, dtype = at_least_float32(q), at_least_float32(k), at_least_float32(v), v.dtype
        with without_autocast(q.device):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).to(dtype)
    if _backend == "math":
        return _plain_attention(q, k, v, _triangle(q, k) if causal else mask)
    if _backend == "flash":
        with sdpa_kernel(FUSED):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _triangle(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = at_least_float32(q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # (B, H, N, M)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1).to(v.dtype) @ v


def _weighted_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query (B, H, 1, D), as sums that a compiler fuses: each key and value is read once."""
    q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
    weights = (q * q.shape[-1] ** -0.5 * k).sum(-1).softmax(-1)  # (B, H, M)
    return (weights[..., None] * v).sum(2, keepdim=True)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region whose float32 operations stay float32, also inside ``torch.autocast``."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # the meta device has none
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it comes so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def narrowed(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the dtype of ``weight`` where that has 16 bits, else as it is.

    At the door of a network: a state that is solved in float32 also enters weights of 16 bits (``bf16-true``).
    """
    return x.to(weight.dtype) if weight.dtype in (torch.bfloat16, torch.float16) else x


def sinusoid(t: Tensor, size: int, *, max_period: float = 10000.0, time_scale: float = 1.0) -> Tensor:
    """Sines and cosines of a time, cosines first.

    ``[cos(a w_0), cos(a w_1), ..., sin(a w_0), ...]`` with ``a = time_scale t`` and
    ``w_k = max_period^(-k / (size / 2))``.

    Args:
        t: time, shape (B,).
        size: width of the embedding, even.
        max_period: controls the lowest frequency.
        time_scale: factor on the time; 1 for LFM and SiT, about 1000 for networks that count diffusion steps.

    Returns:
        float32 (float64 for a time in float64), shape (B, size).
    """
    half = size // 2
    time = at_least_float32(t)[:, None] * time_scale
    k = torch.arange(half, dtype=time.dtype, device=t.device)
    angles = time * torch.exp(-math.log(max_period) * k / half)  # (B, size / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(height: int, width: int, size: int) -> Tensor:
    """The fixed sine-cosine table of a grid of any shape.

    The first half of the channels tells the column, the second half the row; each half is a block of sines
    and a block of cosines with frequencies ``10000^(-k / (size / 4))``.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        size: channels, divisible by 4.

    Returns:
        float32, shape (height * width, size), rows first.

    Raises:
        ValueError: ``size`` not divisible by 4.
    """
    if size % 4:
        raise ValueError(f"size must be divisible by 4, got {size}")
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    table = [_wave(columns.flatten(), size // 2), _wave(rows.flatten(), size // 2)]
    return torch.cat(table, dim=1).float()  # (H W, size)


def _wave(coordinate: Tensor, size: int) -> Tensor:
    k = torch.arange(size // 2, dtype=torch.float64, device=coordinate.device)
    angles = coordinate.double()[:, None] * 10000.0 ** (-k / (size // 2))  # (N, size / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` with one shift and scale (B, D) for all tokens of x (B, N, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])  # one pass over x


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate update`` with one gate (B, D) for all tokens of x and update (B, N, D)."""
    return torch.addcmul(x, gate[:, None], update)


class TimestepEmbedder(nn.Module):
    """A time as a vector: `sinusoid`, Linear, SiLU, Linear, in float32 also under autocast.

    Args:
        hidden_size: width of the result.
        frequency_size: width of the sinusoid, even.
        max_period: see `sinusoid`.
        time_scale: see `sinusoid`.

    Raises:
        ValueError: an odd or non-positive ``frequency_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        frequency_size: int = 256,
        max_period: float = 10000.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if frequency_size < 2 or frequency_size % 2:
            raise ValueError(f"frequency_size must be even and positive, got {frequency_size}")
        self.frequency_size, self.max_period, self.time_scale = frequency_size, max_period, time_scale
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def sinusoid(self, t: Tensor) -> Tensor:
        """The sinusoid of ``t`` (B,), float32, shape (B, frequency_size)."""
        return sinusoid(t, self.frequency_size, max_period=self.max_period, time_scale=self.time_scale)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` (B,); shape (B, hidden_size)."""
        with without_autocast(t.device):
            return self.mlp(self.sinusoid(t).to(next(self.mlp.parameters()).dtype))


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in float32.

    Written out because fused kernels have no forward-mode derivative.

    References:
        Root Mean Square Layer Normalization (Zhang and Sennrich, 2019).
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., size); the dtype of ``x``."""
        y = at_least_float32(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one Linear for q, k and v.

    Args:
        hidden_size: width D of the tokens.
        num_heads: number of heads, divides D.
        qk_norm: normalise queries and keys of each head by `RMSNorm`.

    Raises:
        ValueError: ``hidden_size`` not divisible by ``num_heads``.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens ``x`` (B, N, D); ``mask`` as in `attention`; shape (B, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D / H)
        # Taken apart where the axis lies: backward, the three gradients are put together without another copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, N, D / H)
        y = attention(self.q_norm(q), self.k_norm(k), v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, D)


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear.

    Args:
        hidden_size: width of input and output.
        mlp_size: width in between.
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token of ``x`` (..., hidden_size)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
