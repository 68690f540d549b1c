"""TARFlow in the published way, from its description: what `flow_sampling` and `flow_step` measure ours against.

That the published loop keeps a list for each layer and concatenates all of it at every token (``kept="list"``) is from
memory: our description of it only says that the cache is concatenated. Read both figures.

LayerNorm in float32, one Linear for queries, keys and values, attention with an explicit lower-triangular mask, the
scan order by a flip, log-determinants as means. Samples come token by token; the keys and values of every token are
kept in lists, which are concatenated at every token (``kept="list"``), or once with the new one (``kept="running"``,
a kinder reading). Guided samples run the two branches one after the other, each with lists of its own.

Names of parameters are those of `networks.TARFlow`, so that both take the same weights.

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.networks import TARFlow

Kept = Literal["list", "running"]
Memory = dict[int, list[list[Tensor]]]  # layer -> keys of all tokens, values of all tokens


class FloatNorm(nn.LayerNorm):
    """LayerNorm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class Attention(nn.Module):
    """Causal attention; with a memory, of one token more."""

    def __init__(self, size: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm, self.qkv, self.proj = FloatNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None, kept: list[list[Tensor]] | None, how: Kept) -> Tensor:
        b, n, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3 * w // self.head, self.head).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)  # each (B, H, N, d)
        if kept is not None:
            k, v = (self.remembered(old, new, how) for old, new in zip(kept, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, n, w))

    @staticmethod
    def remembered(old: list[Tensor], new: Tensor, how: Kept) -> Tensor:
        """Keys or values of all tokens."""
        old.append(new)
        every = torch.cat(old, dim=2)
        if how == "running":
            old[:] = [every]
        return every


class Mlp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = FloatNorm(size)
        self.main = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x))


class Layer(nn.Module):
    def __init__(self, size: int, head: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(size, head), Mlp(size)

    def forward(self, x: Tensor, mask: Tensor | None, kept: list[list[Tensor]] | None, how: Kept) -> Tensor:
        x = x + self.attention(x, mask, kept, how)
        return x + self.mlp(x)


class Block(nn.Module):
    """One flow block; the even ones scan forwards."""

    mask: Tensor

    def __init__(self, like: TARFlow, index: int) -> None:
        super().__init__()
        theirs, self.backwards = like.stack[index], index % 2 == 1
        (tokens, width), classes = theirs.pos_embed.shape, theirs.class_embed
        self.proj_in, self.proj_out = nn.Linear(theirs.token_size, width), nn.Linear(width, 2 * theirs.token_size)
        self.pos_embed = nn.Parameter(torch.empty(tokens, width))
        self.class_embed = None if classes is None else nn.Parameter(torch.empty_like(classes))
        head = theirs.attn_blocks[0].attention.head_size
        self.attn_blocks = nn.ModuleList(Layer(width, head) for _ in theirs.attn_blocks)
        self.register_buffer("mask", torch.ones(tokens, tokens).tril().bool(), persistent=False)

    def flipped(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dim) if self.backwards else x

    def of_class(self, label: Tensor | None) -> Tensor | float:
        if self.class_embed is None:
            return 0.0
        return self.class_embed.mean(0) if label is None else self.class_embed[label]

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Z and the log-determinant of each sample over the dimensions."""
        x = self.flipped(x)
        h = self.proj_in(x) + self.flipped(self.pos_embed, 0) + self.of_class(label)
        for layer in self.attn_blocks:
            h = layer(h, self.mask, None, "list")
        out = self.proj_out(h)
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)  # of the token before
        a, b = out.chunk(2, dim=-1)
        z = (x - b) * (-a.float()).exp().type(a.dtype)
        return self.flipped(z), -a.mean(dim=[1, 2])

    def step(self, token: Tensor, i: int, label: Tensor | None, memory: Memory, how: Kept) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the token after token ``i`` (B, 1, D), in scan order."""
        h = self.proj_in(token) + self.flipped(self.pos_embed, 0)[i : i + 1] + self.of_class(label)
        for index, layer in enumerate(self.attn_blocks):
            h = layer(h, None, memory.setdefault(index, [[], []]), how)
        return self.proj_out(h).float().chunk(2, dim=-1)

    def inverse(self, z: Tensor, label: Tensor | None, weight: float, how: Kept) -> Tensor:
        x, memories = self.flipped(z).clone(), ({}, {})
        for i in range(x.shape[1] - 1):
            a, b = self.step(x[:, i : i + 1], i, label, memories[0], how)
            if weight:
                free_a, free_b = self.step(x[:, i : i + 1], i, None, memories[1], how)
                a, b = a + weight * (a - free_a), b + weight * (b - free_b)
            x[:, i + 1] = x[:, i + 1] * a[:, 0].exp() + b[:, 0]
        return self.flipped(x)


class PublishedTARFlow(nn.Module):
    """The published network with the sizes and weights of ours.

    Args:
        like: ours.
    """

    def __init__(self, like: TARFlow) -> None:
        super().__init__()
        self.patch, self.side = like.patch_size, like.shape[1] // like.patch_size
        self.blocks = nn.ModuleList(Block(like, i) for i in range(len(like.blocks)))
        self.load_state_dict(like.state_dict())

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of z (B, N, D), and the sum of the blocks' log-determinants over the dimensions, (B,)."""
        tokens = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        log_det = tokens.new_zeros(len(x))
        for block in self.blocks:
            tokens, part = block(tokens, label)
            log_det = log_det + part
        return tokens, log_det

    @torch.no_grad()
    def sample(self, z: Tensor, label: Tensor | None = None, weight: float = 0.0, how: Kept = "list") -> Tensor:
        """Images of noise z (B, C, H, W); ``weight`` of the guidance, 0 for none."""
        tokens = F.unfold(z, self.patch, stride=self.patch).transpose(1, 2)
        for block in reversed(self.blocks):
            tokens = block.inverse(tokens, label, weight, how)
        return F.fold(tokens.transpose(1, 2), z.shape[2:], self.patch, stride=self.patch)


def published_loss(network: PublishedTARFlow, x: Tensor, label: Tensor | None) -> Tensor:
    """Negative log-likelihood over the dimensions, without constants."""
    z, log_det = network(x, label)
    return 0.5 * z.pow(2).mean() - log_det.mean()
