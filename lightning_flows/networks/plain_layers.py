"""The layers of a causal transformer as bare tensors, for the many small passes of sampling.

A pass over one token of a few samples is bound by what surrounds its arithmetic: calls of modules, copies of biases,
casts of weights. `PlainLayer` does what a `CausalLayer` does without them, in place, and gives the same numbers up to
rounding. `plain_layers` makes them where layers are what they were built as: without gradients, and nothing hooked,
wrapped, adapted, compiled or spread over devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.networks.causal import (
    CausalAttention,
    CausalLayer,
    LayerCache,
    PlainMlp,
    kept_dtype,
    lower_right,
)
from lightning_flows.networks.layers import attention
from lightning_flows.networks.rotary import Rotation

PLAIN = (CausalLayer, CausalAttention, PlainMlp, nn.Sequential, nn.Linear, nn.LayerNorm, nn.GELU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Product(NamedTuple):
    """A Linear in the dtype of the products.

    Attributes:
        weight: shape (in, out).
        bias: shape (out,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype | None) -> Product:
        """That of a module, cast once; None keeps its dtype."""
        dtype = dtype or linear.weight.dtype
        return cls(linear.weight.to(dtype).t(), linear.bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Of rows ``x`` (R, in), shape (R, out)."""
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, h: Tensor, x: Tensor) -> None:
        """Add to rows ``h`` (R, out) in place."""
        if h.dtype == self.bias.dtype:
            h.add_(self.bias).addmm_(x, self.weight)
        else:
            h.add_(self(x))


class PlainLayer:
    """A `CausalLayer` of LayerNorms and a plain MLP.

    Args:
        layer: whose weights it uses, as they are now.
        dtype: of the products, where it is not that of the weights (autocast).
    """

    def __init__(self, layer: CausalLayer, dtype: torch.dtype | None) -> None:
        self.heads, self.head_size = layer.attention.heads, layer.attention.head_size
        norms: tuple[Any, ...] = (layer.attention.norm, layer.mlp.norm)
        self.norms = [(norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in norms]
        main: Any = layer.mlp.main
        parts = (layer.attention.qkv, layer.attention.proj, main[0], main[2])
        self.qkv, self.proj, self.up, self.down = (Product.of(part, dtype) for part in parts)

    def __call__(
        self,
        h: Tensor,
        rotation: Rotation | None,
        cache: LayerCache,
        sharpness: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Move tokens through the layer, in place.

        Args:
            h: shape (B, N, W).
            rotation: see `CausalLayer.forward`.
            cache: see `CausalLayer.forward`.
            sharpness: see `CausalLayer.forward`.
            mask: what each of several tokens sees, where some are known; None for all before it.
        """
        rows, dtype = h.flatten(0, 1), self.qkv.bias.dtype
        heads = self.qkv(torch.layer_norm(rows, *self.norms[0]).to(dtype)).view(*h.shape[:2], -1, self.head_size)
        q, k, v = self._cached(heads.to(kept_dtype(heads)), rotation, cache)
        if sharpness is not None:
            q = q * sharpness[:, None, None, None].to(q.dtype)
        y = attention(q, k, v, mask, causal=mask is None and q.shape[2] == k.shape[2])  # (B, H, N, d)
        self.proj.add_to(rows, y.transpose(1, 2).reshape(len(rows), -1).to(dtype))
        y = F.gelu(self.up(torch.layer_norm(rows, *self.norms[1]).to(dtype)))
        self.down.add_to(rows, y)

    def _cached(self, heads: Tensor, rotation: Rotation | None, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of these tokens (B, H, N, d); keys and values of all, (B, G, known + N, d)."""
        queries, groups, _ = self.heads
        if rotation is None:
            q, pairs = heads.split([queries, 2 * groups], dim=2)
            return q.transpose(1, 2), *cache.extend(pairs.unflatten(2, (2, groups)))
        turned, v = (part.transpose(1, 2) for part in heads.split([queries + groups, groups], dim=2))
        q, k = rotation(turned).split([queries, groups], dim=1)
        return q, *cache.append(k, v)


class PlainLayers:
    """A stack of `PlainLayer`.

    Args:
        layers: in order.
    """

    def __init__(self, layers: list[PlainLayer]) -> None:
        self.layers = layers

    def __call__(
        self, h: Tensor, rotation: Rotation | None, caches: list[LayerCache], sharpness: Tensor | None
    ) -> Tensor:
        """Tokens ``h`` (B, N, W) after all layers; ``h`` is overwritten."""
        new, known = h.shape[1], caches[0].filled
        mask = lower_right(new, known, h.device) if known and new > 1 else None
        for layer, cache in zip(self.layers, caches, strict=True):
            layer(h, rotation, cache, sharpness, mask)
        return h


def plain_layers(layers: Iterable[nn.Module], device: torch.device) -> PlainLayers | None:
    """Layers as bare tensors, with weights as they are now; None where that would not be the same."""
    every = list(layers)
    if torch.is_grad_enabled() or not all(_is_plain(part) for layer in every for part in layer.modules()):
        return None
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return PlainLayers([PlainLayer(layer, dtype) for layer in every])  # type: ignore[arg-type]


def _is_plain(part: nn.Module) -> bool:
    changed = "forward" in vars(part) or any(getattr(part, name) for name in HOOKS)
    optional = isinstance(part, CausalAttention) and (part.query_norm or part.post_norm)
    blank = isinstance(part, (nn.Linear, nn.LayerNorm)) and part.bias is None
    return type(part) in PLAIN and not (changed or optional or blank)
