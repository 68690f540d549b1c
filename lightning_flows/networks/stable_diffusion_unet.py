"""`StableDiffusionUNet`: the U-Net of Stable Diffusion 1.x and 2.x, for a velocity and for any number of channels.

Its published weights come in by `hub.convert` (``diffusers-unet``). SymmFlow starts from those of version 2.1: the
channels are doubled (`widen`), and the text is always the empty prompt. So the text lies in the network, as a buffer;
a network that reads texts (``reads_tokens=True``) takes it for the samples that have none.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
    Symmetrical Flow Matching (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition, Tokens
from lightning_flows.networks.conditioning import times_of
from lightning_flows.networks.layers import TimestepEmbedder, narrowed
from lightning_flows.networks.resize_rules import Rules
from lightning_flows.networks.text_blocks import LevelSizes, TextBlock, decoder_levels, encoder_levels
from lightning_flows.networks.unet_blocks import BlockOptions
from lightning_flows.networks.unet_levels import sides
from lightning_flows.networks.widening import channel_rules
from lightning_flows.store import Recorded

PERIOD = 10000.0


class StableDiffusionUNet(Recorded, nn.Module):
    """A U-Net with transformers that attend to a text; predicts a velocity (or noise, or data) of shape (C, H, W).

    The defaults are Stable Diffusion 2.1, with a time in [0, 1]; version 1 has ``num_heads=8, context_dim=768``.

    Args:
        input_size: side of a square input, or (height, width); divisible by 2 for each change of level.
        in_channels: channels C of a sample.
        channels: width of each level, fine to coarse; multiples of ``groups``.
        num_blocks: residual blocks of a level, or one number for each level (the decoder has one more).
        attention: for each level, whether it has transformers; the middle always has one.
        num_heads: attention heads, or one number for each level.
        depth: layers of a transformer, or one number for each level.
        context_dim: width D of the tokens of the text.
        context_length: tokens L of the text in the network: the empty prompt. A fresh one is drawn at random.
        reads_tokens: the text is ``condition.tokens``; else it is always that in the network.
        context_dropout: rate at which training drops the tokens.
        groups: groups of every normalisation.
        eps: of the normalisations of the residual blocks.
        dropout: rate inside the residual blocks.
        time_scale: factor on the time before the sinusoid. 1000 shows the network the times it was trained with, for
            a t in [0, 1]; 1 hands the time in raw, as official SymmFlow does.
        sines_first: the sinusoid is sines, then cosines; else cosines first.
        frequency_shift: lowers the lowest frequency of the sinusoid to ``10000^(-k / (half - frequency_shift))``.

    Attributes:
        shape: (C, H, W).
        streams: ``("tokens",)`` where the network reads them, else ``()``.
        context: the text in the network, buffer, shape (L, D).

    Raises:
        ValueError: sizes that do not divide each other, or an argument out of its range.
    """

    block_classes: ClassVar[tuple[type[nn.Module], ...]] = (TextBlock,)
    context: Tensor

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int] = 64,
        in_channels: int = 4,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        num_blocks: int | Sequence[int] = 2,
        attention: Sequence[bool] = (True, True, True, False),
        num_heads: int | Sequence[int] = (5, 10, 20, 20),
        depth: int | Sequence[int] = 1,
        context_dim: int = 1024,
        context_length: int = 77,
        reads_tokens: bool = False,
        context_dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        sines_first: bool = False,
        frequency_shift: float = 0.0,
    ) -> None:
        super().__init__()
        widths = _widths(channels, groups)
        height, width = sides(input_size)
        if height % (scale := 2 ** (len(widths) - 1)) or width % scale:
            raise ValueError(f"input_size must be divisible by {scale} ({len(widths)} levels), got {(height, width)}")
        _positive(in_channels=in_channels, context_dim=context_dim, context_length=context_length)
        if not 0 <= context_dropout < 1 or (context_dropout and not reads_tokens):
            raise ValueError(
                f"context_dropout must lie in [0, 1), and be 0 without reads_tokens, got {context_dropout}"
            )
        self.shape: tuple[int, int, int] = (in_channels, height, width)
        self.in_channels, self.reads_tokens, self.context_dropout = in_channels, reads_tokens, context_dropout
        if len(attention) != len(widths):
            raise ValueError(f"attention must have one entry for each of {len(widths)} levels, got {list(attention)}")
        heads = _each("num_heads", num_heads, len(widths))
        depths = _each("depth", depth, len(widths))
        blocks = _each("num_blocks", num_blocks, len(widths))
        sizes = zip(widths, blocks, depths, attention, strict=True)
        levels = [LevelSizes(width, n, layers if attends else 0) for width, n, layers, attends in sizes]
        options = [_options(4 * widths[0], groups, h, eps=eps, dropout=dropout, context_dim=context_dim) for h in heads]
        self.t_embedder = _TimeEmbedder(
            4 * widths[0], widths[0], time_scale, sines_first=sines_first, shift=frequency_shift
        )
        self.register_buffer("context", torch.randn(context_length, context_dim))
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.encoder, skips = encoder_levels(levels, options)
        self.middle = nn.ModuleList(
            TextBlock(widths[-1], widths[-1], options[-1], depth=depth) for depth in (depths[-1], 0)
        )
        self.decoder = decoder_levels(levels, options, skips)
        self.out_norm = options[0].norm(widths[0])
        self.out_conv = nn.Conv2d(widths[0], in_channels, 3, padding=1)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the last convolution."""
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after construction: also for a network that was built on the meta device.

        Uniform in ``1 / sqrt(fan_in)`` for convolutions and Linears, biases included; N(0, 1) for the text; zero for
        the last layer of every residual block, of every transformer and of the network.
        """
        inside = [module for module in self.modules() if module is not self]
        for step, modules in (("reset_parameters", inside), ("start_at_zero", [*inside, self])):
            for module in modules:
                if callable(draw := getattr(module, step, None)):
                    draw()
        nn.init.normal_(self.context)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the condition's streams that the network reads."""
        return ("tokens",) if self.reads_tokens else ()

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """``condition`` with its tokens absent (its rows are those of ``condition``): the text in the network."""
        if condition is None:
            return Condition()
        return condition.absent(*self.streams) if self.streams else condition

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with the tokens absent at the rate ``context_dropout``, drawn on the CPU."""
        if condition is None or condition.tokens is None or not self.context_dropout:
            return condition
        u = torch.rand(condition.batch_size or 0, generator=generator)
        return condition.absent("tokens", where=u < self.context_dropout)

    def text_of(self, condition: Condition | None, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """The text of every sample, (B, L', D), and where its tokens are real, (B, L') (None: everywhere).

        Samples without tokens, or with padding alone, have the text in the network.

        Raises:
            ValueError: tokens of another width or batch size.
        """
        own = self.context.expand(batch_size, -1, -1)  # (B, L, D)
        if not self.reads_tokens or condition is None or condition.tokens is None:
            return own, None
        values, mask = condition.tokens
        if values.dim() != 3 or values.shape[::2] != own.shape[::2]:
            wanted = f"({batch_size}, L, {own.shape[2]})"
            raise ValueError(f"condition.tokens must have shape {wanted}, got {tuple(values.shape)}")
        mask = mask.to(own.device)
        here = condition.presence("tokens", device=own.device) & mask.any(1)
        longest = max(own.shape[1], values.shape[1])
        given = _padded(Tokens(torch.where(mask[:, :, None], values.to(own), 0), mask), longest)
        kept = _padded(Tokens(own, torch.ones_like(own[:, :, 0], dtype=torch.bool)), longest)
        text = torch.where(here[:, None, None], given.values, kept.values)
        return text, torch.where(here[:, None], given.mask, kept.mask)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict at ``x``.

        Args:
            x: point, shape (B, C, H, W).
            t: time, shape () or (B,).
            condition: its ``tokens`` are read where the network reads them; see `check_condition`.

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: an input of another shape than (B, C, H, W); a wrong time or tokens.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}")
        embedding = F.silu(self.t_embedder(times_of(t, len(x))))  # (B, E)
        text, mask = self.text_of(condition, len(x))
        given = (embedding, narrowed(text, self.stem.weight), mask)
        h = self.stem(narrowed(x, self.stem.weight))
        skips = [h]
        for level in self.encoder:
            for block in level.blocks:  # type: ignore[union-attr]
                skips.append(h := block(h, *given))
            if level.resample is not None:
                skips.append(h := level.resample(h))  # type: ignore[operator]
        for block in self.middle:
            h = block(h, *given)
        for level in self.decoder:
            for block in level.blocks:  # type: ignore[union-attr]
                h = block(torch.cat([h, skips.pop()], dim=1), *given)
            h = h if level.resample is None else level.resample(h)  # type: ignore[operator]
        return self.out_conv(F.silu(self.out_norm(h)))

    def resize_rules(self, source: Mapping[str, Any]) -> Rules:
        """How the weights of such a U-Net with other channels become its own; see `widening.channel_rules`.

        Args:
            source: constructor arguments of that U-Net.
        """
        return channel_rules(source["in_channels"], self.in_channels)


class _TimeEmbedder(TimestepEmbedder):
    """As `TimestepEmbedder`, with another lowest frequency, and sines first where that is wanted."""

    def __init__(self, size: int, frequency_size: int, time_scale: float, *, sines_first: bool, shift: float) -> None:
        half = frequency_size / 2
        if not 0 <= shift < half:
            raise ValueError(f"frequency_shift must lie in [0, {half:g}), got {shift}")
        # period^(-k / half) with this period is 10000^(-k / (half - shift))
        period = PERIOD ** (half / (half - shift))
        super().__init__(size, frequency_size=frequency_size, max_period=period, time_scale=time_scale)
        self.sines_first = sines_first

    def sinusoid(self, t: Tensor) -> Tensor:
        """See `TimestepEmbedder.sinusoid`."""
        value = super().sinusoid(t)
        return value.roll(self.frequency_size // 2, dims=-1) if self.sines_first else value


def _options(embedding: int, groups: int, heads: int, *, eps: float, dropout: float, context_dim: int) -> BlockOptions:
    return BlockOptions(
        embedding_size=embedding,
        groups=lambda channels: groups,
        heads=lambda channels: heads,
        scale_shift=False,
        dropout=dropout,
        eps=eps,
        context_dim=context_dim,
    )


def _padded(tokens: Tokens, length: int) -> Tokens:
    missing = length - tokens.values.shape[1]
    return Tokens(F.pad(tokens.values, (0, 0, 0, missing)), F.pad(tokens.mask, (0, missing)))


def _widths(channels: Sequence[int], groups: int) -> list[int]:
    _positive(groups=groups)
    if not channels or any(width < 1 or width % groups for width in channels):
        raise ValueError(f"channels must be multiples of groups={groups}, got {list(channels)}")
    return list(channels)


def _each(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    """One positive number for each level."""
    each = [value] * levels if isinstance(value, int) else list(value)
    if len(each) != levels or min(each) < 1:
        raise ValueError(f"{name} must be one positive number, or one for each of {levels} levels, got {value}")
    return each


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
