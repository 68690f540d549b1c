r"""One block of an autoregressive flow: a causal transformer that normalises every token given those before it.

.. math:: z_i = (x_i - \mu_i) / \sigma_i, \qquad
          (\mu_i, \sigma_i) = f(x_{<i}, \text{condition}), \qquad
          \log |\det| = -\sum_i \log \sigma_i .

The first token has nothing before it. Either it is copied, and the network's output at token i - 1 belongs to token i
(``start_token=False``, TARFlow), or the network reads a learned token before it (``start_token=True``, STARFlow).

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.flow.affine import Affine
from lightning_flows.networks.causal import CausalLayer, KeyValueCache, LayerStyle, OffsetRMSNorm
from lightning_flows.networks.layers import at_least_float32, narrowed, without_autocast
from lightning_flows.networks.plain_layers import PlainLayers
from lightning_flows.networks.rotary import Rotation

ScaleMap = Literal["exp", "softplus", "none"]
SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of it is 1


class Context(NamedTuple):
    """What one block makes of a condition.

    Attributes:
        added: a vector for all tokens of a sample, shape (B, 1, W), or None.
        prefix: tokens before those of the data, shape (B, L, W), or None.
    """

    added: Tensor | None = None
    prefix: Tensor | None = None


class FlowBlock(nn.Module):
    """An autoregressive affine transform of tokens (B, N, D), in one scan order.

    Args:
        token_size: channels D of a token.
        depth: number of layers; 0 for the identity.
        style: of the layers.
        reverse: scan the tokens from the last to the first.
        num_tokens: number N of rows of a learned table of positions; None for positions by rotation.
        num_classes: rows of a table of class vectors that are added to every token; None for none.
        text_size: channels of the tokens of a prefix; None for no prefix.
        start_token: learn a token before the first one; else the first one is copied.
        scale: sigma of the network's output a: ``"exp"`` of it, ``"softplus"`` of a + 0.5413 (1 at 0), or ``"none"``:
            1, so that the block preserves volume.
        soft_clip: bound c of the outputs, ``c tanh(a / c)``; 0 for none.
        final_norm: normalise (`OffsetRMSNorm`) before the output.

    Raises:
        ValueError: an unknown scale, or a negative number.
    """

    def __init__(
        self,
        token_size: int,
        depth: int,
        style: LayerStyle,
        *,
        reverse: bool = False,
        num_tokens: int | None = None,
        num_classes: int | None = None,
        text_size: int | None = None,
        start_token: bool = False,
        scale: ScaleMap = "exp",
        soft_clip: float = 0.0,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if scale not in get_args(ScaleMap):
            raise ValueError(f"scale must be one of {get_args(ScaleMap)}, got {scale!r}")
        for name, value in (("depth", depth), ("soft_clip", soft_clip)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.token_size, self.reverse, self.scale, self.soft_clip = token_size, reverse, scale, soft_clip
        width, outputs = style.hidden_size, token_size if scale == "none" else 2 * token_size
        self.proj_in = nn.Linear(token_size, width)
        self.pos_embed = None if num_tokens is None else nn.Parameter(torch.empty(num_tokens, width))
        self.class_embed = None if num_classes is None else nn.Parameter(torch.empty(num_classes, 1, width))
        self.proj_txt = None if text_size is None else nn.Linear(text_size, width)
        self.sos_embed = nn.Parameter(torch.empty(1, 1, token_size)) if start_token else None
        self.attn_blocks = nn.ModuleList(CausalLayer(style) for _ in range(depth))
        self.final_norm = OffsetRMSNorm(width) if final_norm else None
        self.proj_out = nn.Linear(width, outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: those of `torch.nn`, small tables, an output that does not depend on its input."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.LayerNorm)):
                part.reset_parameters()
            elif isinstance(part, OffsetRMSNorm):
                nn.init.zeros_(part.weight)
        for table in (self.pos_embed, self.class_embed):
            if table is not None:
                nn.init.normal_(table, std=0.01)
        if self.sos_embed is not None:
            nn.init.normal_(self.sos_embed)
        nn.init.zeros_(self.proj_out.weight)

    # ------------------------------------------------------------------ the condition

    def context(self, rows: Tensor | None = None, text: Tensor | None = None) -> Context:
        """What this block makes of a condition.

        Args:
            rows: class of each sample, int64, shape (B,); -1 is no class: the mean of all.
            text: tokens of a prefix, shape (B, L, text size).
        """
        added = None
        if self.class_embed is not None and rows is not None:
            table = torch.cat([self.class_embed, self.class_embed.mean(0, keepdim=True)])  # (K + 1, 1, W)
            added = table[rows]  # (B, 1, W); row -1 is the last one
        if self.proj_txt is None or text is None:
            return Context(added)
        return Context(added, self.proj_txt(text.to(self.proj_txt.weight.dtype)))

    # ------------------------------------------------------------------ all tokens at once

    def forward(
        self, x: Tensor, context: Context | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise all tokens.

        Args:
            x: tokens in raster order, shape (B, N, D).
            context: see `context`.
            rotation: of the prefix and the tokens in scan order, or None.

        Returns:
            z, float32, in raster order, shape (B, N, D); and log |det dz/dx|, float32, shape (B,).
        """
        if not self.attn_blocks:
            x = at_least_float32(x)
            return x, x.new_zeros(len(x))
        x = at_least_float32(self.scanned(x))
        gaussian = self.affine(x, context or Context(), rotation)
        with without_autocast(x.device):
            z = gaussian.normalize(x)
            return self.scanned(z), -gaussian.log_scale.flatten(1).sum(1)

    def scanned(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) from raster order to scan order, or back."""
        return x.flip(1) if self.reverse else x

    def affine(self, x: Tensor, context: Context, rotation: Rotation | None = None) -> Affine:
        """The Gaussian of every token given those before it, tokens in scan order, each (B, N, D)."""
        inputs = self.inputs(x)  # (B, M, D), M of them have a token after them
        gaussian = self.predict(inputs[:, :-1], context, rotation)
        if self.sos_embed is not None:
            return gaussian
        copied = x.new_zeros(len(x), 1, self.token_size)  # mean 0 and scale 1
        return Affine(torch.cat([copied, gaussian.mean], 1), torch.cat([copied, gaussian.log_scale], 1))

    def inputs(self, x: Tensor) -> Tensor:
        """What the network reads: the tokens (B, N, D), behind the start token if there is one; (B, N or N + 1, D)."""
        return x if self.sos_embed is None else torch.cat([self.sos_embed.to(x).expand(len(x), -1, -1), x], dim=1)

    # ------------------------------------------------------------------ the network

    def predict(
        self,
        inputs: Tensor,
        context: Context,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        sharpness: Tensor | None = None,
        start: int = 0,
        plain: PlainLayers | None = None,
    ) -> Affine:
        """The Gaussian of the token after each input.

        Args:
            inputs: some of `inputs`, without gaps, shape (B, n, D).
            context: see `context`; with a cache, the prefix has been seen (`prime`).
            rotation: of the prefix and all tokens.
            cache: what was computed from the inputs before these; it is extended.
            sharpness: see `CausalLayer.forward`.
            start: place of the first of these inputs.
            plain: the layers as bare tensors, for passes with a cache; None for the modules.

        Returns:
            Shape (B, n, D), float32.
        """
        h = self.proj_in(narrowed(inputs, self.proj_in.weight))  # (B, n, W)
        if self.pos_embed is not None:
            h = h + self._positions(start, inputs.shape[1]).to(h)
        if context.added is not None:
            h = h + context.added.to(h)
        prefix = 0 if context.prefix is None else context.prefix.shape[1]
        if prefix and cache is None:
            h = torch.cat([context.prefix.to(h), h], dim=1)  # type: ignore[union-attr]
        first = 0 if cache is None else prefix + start
        turned = None if rotation is None else rotation.between(first, first + h.shape[1])
        h = self._layers(h, turned, cache, sharpness, plain)
        return self._gaussian(h[:, -inputs.shape[1] :])

    def prime(
        self,
        context: Context,
        rotation: Rotation | None,
        cache: KeyValueCache,
        sharpness: Tensor | None = None,
        plain: PlainLayers | None = None,
    ) -> None:
        """Let an empty cache see the prefix."""
        if context.prefix is not None:
            turned = None if rotation is None else rotation.between(0, context.prefix.shape[1])
            self._layers(context.prefix.clone(memory_format=torch.contiguous_format), turned, cache, sharpness, plain)

    def _layers(
        self,
        h: Tensor,
        rotation: Rotation | None,
        cache: KeyValueCache | None,
        sharpness: Tensor | None,
        plain: PlainLayers | None = None,
    ) -> Tensor:
        if plain is not None and cache is not None:
            return plain(h, rotation, cache.layers, sharpness)
        for i, layer in enumerate(self.attn_blocks):
            h = layer(h, rotation, None if cache is None else cache.layers[i], sharpness)
        return h

    def _positions(self, start: int, count: int) -> Tensor:
        """Rows of the table in scan order, shape (n, W)."""
        assert self.pos_embed is not None
        if not self.reverse:
            return self.pos_embed[start : start + count]
        end = len(self.pos_embed) - start
        return self.pos_embed[end - count : end].flip(0)

    def _gaussian(self, h: Tensor) -> Affine:
        out = self.proj_out(h if self.final_norm is None else self.final_norm(h))
        with without_autocast(out.device):
            out = at_least_float32(out)
            if self.soft_clip:
                out = self.soft_clip * torch.tanh(out / self.soft_clip)
            if self.scale == "none":
                return Affine(out, torch.zeros_like(out))
            raw, mean = out.chunk(2, dim=-1)
            return Affine(mean, raw if self.scale == "exp" else F.softplus(raw + SOFTPLUS_ONE).log())
