"""The diffusion transformer: patches, blocks modulated by time and class (adaLN-Zero), patches back.

With ``c = time(t) + class(y)`` every block computes

    shift, scale, gate, shift', scale', gate' = Linear(SiLU(c))
    x = x + gate  * Attention(LN(x) (1 + scale)  + shift)
    x = x + gate' * MLP(LN(x) (1 + scale') + shift')

The gates, the last modulation and the last Linear start at zero, so that a fresh network returns 0. The names
of the state dict are those of the official DiT, LFM and SiT files; the position table is computed, not saved.

References:
    Scalable Diffusion Models with Transformers (Peebles and Xie, 2023).
    Flow Matching in Latent Space (Dao et al., 2023).
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.conditioning import AbsentLabel, LabelEmbedding, times_of
from lightning_flows.networks.layers import (
    Attention,
    Mlp,
    TimestepEmbedder,
    gated,
    modulate,
    narrowed,
    position_table,
    without_autocast,
)
from lightning_flows.networks.resize_rules import Rules
from lightning_flows.networks.resizing import Patch, resize_patch_kernel, resize_patch_rows
from lightning_flows.store import Recorded

DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


class DiT(Recorded, nn.Module):
    """A transformer that predicts a velocity (or noise, or data) of shape (C, H, W) at a time and a class.

    Args:
        input_size: side of a square input, or (height, width).
        patch_size: side of a patch; divides both sides of the input.
        in_channels: channels C.
        hidden_size: width D of the tokens, divisible by 4 and by ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        num_classes: number of classes; None for a network that reads no label.
        label_dropout: rate at which training drops the label; above 0 there is a null row, as guidance needs.
        absent_label: what an absent label means without a null row and with several classes: ``"error"``, or
            ``"last"`` for the last class, as in official LFM and SiT networks.
        learn_sigma: the network has a second head of C channels, which is dropped from the result.
        qk_norm: normalise queries and keys (RMS).
        time_scale: factor on the time before the sinusoid; 1 in LFM and SiT.
        frequency_size: width of the sinusoid of the time.
        max_period: lowest frequency of that sinusoid is about ``1 / max_period``.

    Attributes:
        shape: (C, H, W).
        streams: ``("label",)``, or ``()`` without classes.

    Raises:
        ValueError: sizes that do not divide each other, or an argument out of its range.
    """

    pos_embed: Tensor  # (1, N, D), computed: a buffer that no file holds

    def __init__(
        self,
        input_size: int | tuple[int, int],
        *,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        absent_label: AbsentLabel = "error",
        learn_sigma: bool = False,
        qk_norm: bool = False,
        time_scale: float = 1.0,
        frequency_size: int = 256,
        max_period: float = 10000.0,
    ) -> None:
        super().__init__()
        height, width = _pair(input_size)
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"patch_size must divide input_size={(height, width)}, got {patch_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be divisible by 4 (position table), got {hidden_size}")
        if num_classes is None and label_dropout:
            raise ValueError(f"label_dropout must be 0 without num_classes, got {label_dropout}")
        self.in_channels, self.patch_size = in_channels, patch_size
        self.shape: tuple[int, int, int] = (in_channels, height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.heads = 2 if learn_sigma else 1
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", self._position_table(hidden_size), persistent=False)
        self.t_embedder = TimestepEmbedder(
            hidden_size, frequency_size=frequency_size, max_period=max_period, time_scale=time_scale
        )
        self.y_embedder = (
            None
            if num_classes is None
            else LabelEmbedding(num_classes, hidden_size, dropout=label_dropout, absent=absent_label)
        )
        mlp_size = round(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_size, qk_norm=qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * self.heads)
        self.reset_parameters()

    @classmethod
    def of_size(cls, size: str, /, **arguments: Any) -> DiT:
        """A DiT of a published size, ``DiT.of_size("S", input_size=32, patch_size=2)``.

        Args:
            size: a name of `DIT_SIZES`: S, B, L or XL.
            **arguments: further arguments of `DiT`.

        Raises:
            ValueError: an unknown size.
        """
        if size not in DIT_SIZES:
            raise ValueError(f"size must be one of {list(DIT_SIZES)}, got {size!r}")
        return cls(**{**DIT_SIZES[size], **arguments})

    def reset_parameters(self) -> None:
        """Draw fresh weights: Xavier-uniform, small normal embeddings, zero gates and zero output."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
            elif "t_embedder" in name or "y_embedder" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:  # Linears, and the patch convolution seen as one
                nn.init.xavier_uniform_(parameter.flatten(1))
            else:  # scales of the query and key norms
                nn.init.ones_(parameter)

    def _position_table(self, hidden_size: int) -> Tensor:
        return position_table(*self.grid, hidden_size)[None]  # (1, N, D)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiT:
        # A network built on the meta device becomes real by `to_empty`; no file holds the table, so it is made here.
        on_meta = self.pos_embed.is_meta
        super()._apply(fn, recurse)
        if on_meta and not self.pos_embed.is_meta:
            with torch.device("cpu"):
                self.pos_embed.copy_(self._position_table(self.pos_embed.shape[-1]))
        return self

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the condition's streams that the network reads."""
        return () if self.y_embedder is None else ("label",)

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """``condition`` with its label absent (its rows are those of ``condition``, not ``batch_size``)."""
        if condition is None:
            return Condition()
        return condition.absent(*self.streams) if self.streams else condition

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with each label absent at the rate ``label_dropout``, drawn on the CPU."""
        return condition if self.y_embedder is None else self.y_embedder.drop(condition, generator)

    def embed_condition(self, t: Tensor, condition: Condition | None, batch_size: int) -> Tensor:
        """``c = time(t) + class(y)``, shape (B, D), float32 also under autocast.

        Raises:
            ValueError: see `LabelEmbedding.rows` and `times_of`.
        """
        c = self.t_embedder(times_of(t, batch_size))  # (B, D)
        if self.y_embedder is None:
            return c
        return c + self.y_embedder(Condition() if condition is None else condition, batch_size)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict at ``x``.

        Args:
            x: point, shape (B, C, H, W).
            t: time, shape () or (B,).
            condition: its ``label``, shape (B,), is read; other streams are ignored (see `check_condition`).

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: an input of another shape than (B, C, H, W), a wrong time or label.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}")
        c = self.embed_condition(t, condition, len(x))
        tokens = self.x_embedder(narrowed(x, self.x_embedder.proj.weight)) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, c)
        x = self.unpatchify(self.final_layer(tokens, c))  # (B, heads C, H, W)
        return x if self.heads == 1 else x[:, : self.in_channels]

    def resize_rules(self, source: Mapping[str, Any]) -> Rules:
        """How the weights of a DiT with other sizes become weights of this one; see `networks.resize_rules`.

        The table of places is computed, so that another ``input_size`` needs no rule.

        Args:
            source: constructor arguments of that DiT.
        """
        old = Patch(source["patch_size"], source["in_channels"], 2 if source["learn_sigma"] else 1)
        new = Patch(self.patch_size, self.in_channels, self.heads)
        rules: Rules = {
            "x_embedder.proj.weight": partial(resize_patch_kernel, old=old, new=new),
            "final_layer.linear.weight": partial(resize_patch_rows, old=old, new=new),
            "final_layer.linear.bias": partial(resize_patch_rows, old=old, new=new),
        }
        if self.y_embedder is not None and source["num_classes"] is not None:
            rules["y_embedder.embedding_table.weight"] = self.y_embedder.resize_rule(source)
        return rules

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, p p K), each of (row in patch, column in patch, channel), as (B, K, H, W)."""
        p, (rows, columns) = self.patch_size, self.grid
        x = tokens.unflatten(-1, (p, p, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, K)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)


class PatchEmbedding(nn.Module):
    """One token for each patch: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of ``x`` (B, C, H, W), row by row; shape (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class DiTBlock(nn.Module):
    """Attention and MLP with shift, scale and gate from the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Update the tokens ``x`` (B, N, D) under the condition ``c`` (B, D)."""
        with without_autocast(c.device):
            chunks = self.adaLN_modulation(c).chunk(6, dim=-1)  # six of (B, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks
        x = gated(x, gate_attn, self.attn(modulate(self.norm1(x), shift_attn, scale_attn)))
        return gated(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and a Linear from tokens to patches."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Patches of the tokens ``x`` (B, N, D) under the condition ``c`` (B, D); shape (B, N, out_size)."""
        with without_autocast(c.device):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _pair(input_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"input_size must be one positive number or (height, width), got {input_size!r}")
    return sides[0], sides[1]
