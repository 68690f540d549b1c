"""The frame that both ADM U-Nets share: levels of blocks, skips, time and condition.

Every map that the encoder makes (stem, blocks, changes of resolution) is kept; the decoder has one block more per
level than the encoder and takes one of these maps into each, last in, first out. The middle is two blocks, the
first with attention. A fresh network returns 0.

With ``patch_size`` p the finest level holds patches of p x p pixels as channels, which spares the dearest level of
small pictures; it needs at least as many channels as a patch gives numbers.

The last ``pooled_channels`` of the output (ours) are one number each, the same at every place: a Linear reads them from
the middle. They are for what an image is as a whole, such as the planes of a label in SymmFlow. Read from the last
layers, it would have to pass norms that take away the mean of every group of channels.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021).
    Improving Diffusion Model Efficiency Through Patching (Luhman and Luhman, 2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.conditioning import LabelEmbedding, times_of
from lightning_flows.networks.layers import TimestepEmbedder, narrowed
from lightning_flows.networks.resize_rules import Rules
from lightning_flows.networks.resizing import resize_input_channels, resize_output_channels
from lightning_flows.networks.unet_blocks import BlockOptions, Direction, Pooled, Resample, UNetBlock
from lightning_flows.networks.unet_levels import check_positive, level_widths, sides
from lightning_flows.store import Recorded

Change = Literal["block", "conv", "fixed"]


class Level(nn.Module):
    """Blocks of one resolution and the step to the next one (None at the end)."""

    def __init__(self, blocks: Sequence[nn.Module], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(Recorded, nn.Module):
    """Base of `ADMUNet` and `EDMUNet`, which say what their arguments mean.

    Attributes:
        shape: (C, H, W) of a sample.
        in_channels: C.
        streams: names of the condition's streams that the network reads.
        block_classes: see `networks.blocks_of`.
    """

    block_classes: ClassVar[tuple[type[nn.Module], ...]] = (UNetBlock,)

    def __init__(
        self,
        *,
        input_size: int | Sequence[int],
        in_channels: int,
        out_channels: int | None,
        patch_size: int,
        pooled_channels: int,
        hidden_size: int,
        channel_mult: Sequence[float],
        num_blocks: int,
        attend: Sequence[bool],
        change: Change,
        options: BlockOptions,
        time_scale: float,
        label: LabelEmbedding | None,
        context: nn.Module | None,
        spatial_channels: int,
        drop_rates: Mapping[str, float],
    ) -> None:
        super().__init__()
        widths = level_widths(hidden_size, channel_mult)
        height, width = sides(input_size)
        check_positive(in_channels=in_channels, num_blocks=num_blocks, patch_size=patch_size)
        scale = patch_size * 2 ** (len(widths) - 1)
        if height % scale or width % scale:
            why = f"{len(widths)} levels" + (f" of patches of {patch_size}" if patch_size > 1 else "")
            raise ValueError(f"input_size must be divisible by {scale} ({why}), got {(height, width)}")
        outputs = in_channels if out_channels is None else out_channels
        if not 0 <= pooled_channels < in_channels or (pooled_channels and outputs > in_channels):
            raise ValueError(
                f"pooled_channels must be fewer than in_channels={in_channels}, with out_channels=None, "
                f"got {pooled_channels}"
            )
        if outputs < in_channels:
            raise ValueError(f"out_channels must be at least in_channels={in_channels}, got {out_channels}")
        if spatial_channels < 0:
            raise ValueError(f"spatial_channels must not be negative, got {spatial_channels}")
        for name, rate in drop_rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name}_dropout must lie in [0, 1), got {rate}")
        self.shape: tuple[int, int, int] = (in_channels, height, width)
        self.in_channels, self.spatial_channels, self.drop_rates = in_channels, spatial_channels, dict(drop_rates)
        self.patch_size, self.pooled_channels = patch_size, pooled_channels
        self.t_embedder = TimestepEmbedder(options.embedding_size, frequency_size=hidden_size, time_scale=time_scale)
        self.y_embedder, self.context = label, context
        self.stem = nn.Conv2d(self.pixels * (in_channels + spatial_channels), widths[0], 3, padding=1)
        self.encoder, skips = _encoder(widths, num_blocks, attend, change, options)
        self.middle = nn.ModuleList(UNetBlock(widths[-1], widths[-1], options, attention=a) for a in (True, False))
        self.decoder = _decoder(widths, num_blocks, attend, change, options, skips)
        self.out_norm = options.norm(widths[0])
        self.out_conv = nn.Conv2d(widths[0], self.pixels * (outputs - pooled_channels), 3, padding=1)
        self.pooled = Pooled(widths[-1], pooled_channels) if pooled_channels else None
        _warn_of_narrow_patches(patch_size, self.out_conv.out_channels, widths[0])
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Zero the last convolution."""
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw fresh weights, as after construction: also for a network that was built on the meta device.

        Uniform in ``1 / sqrt(fan_in)`` for convolutions and Linears, biases included; N(0, 1) for the rows of a
        label table; zero for the last layer of every block, of every attention and of the network.
        """
        inside = [module for module in self.modules() if module is not self]
        for step, modules in (("reset_parameters", inside), ("start_at_zero", [*inside, self])):
            for module in modules:
                if callable(draw := getattr(module, step, None)):
                    draw()

    @property
    def pixels(self) -> int:
        """Pixels of a patch."""
        return self.patch_size**2

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the condition's streams that the network reads."""
        reads = {
            "label": self.y_embedder is not None,
            "tokens": self.context is not None,
            "spatial": bool(self.spatial_channels),
        }
        return tuple(name for name, here in reads.items() if here)

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """``condition`` with the network's streams absent (its rows are those of ``condition``)."""
        if condition is None:
            return Condition()
        return condition.absent(*self.streams) if self.streams else condition

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with streams absent at random, each at its rate, drawn on the CPU.

        One number is drawn for a sample and all its streams: at equal rates they go together, as guidance needs.
        """
        given = () if condition is None else condition.streams
        rates = {name: rate for name, rate in self.drop_rates.items() if rate > 0 and name in given}
        if condition is None or not rates:
            return condition
        u = torch.rand(condition.batch_size or 0, generator=generator)
        for name, rate in rates.items():
            condition = condition.absent(name, where=u < rate)
        return condition

    def embed_condition(self, t: Tensor, condition: Condition | None, batch_size: int) -> Tensor:
        """``time(t) + class(y)``, shape (B, E), float32 also under autocast, before the SiLU.

        Raises:
            ValueError: see `LabelEmbedding.rows` and `times_of`.
        """
        e = self.t_embedder(times_of(t, batch_size))  # (B, E)
        if self.y_embedder is None:
            return e
        return e + self.y_embedder(Condition() if condition is None else condition, batch_size)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Predict at ``x``.

        Args:
            x: point, shape (B, C, H, W).
            t: time, shape () or (B,).
            condition: the network's `streams` of it are read, others are ignored (see `check_condition`).

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: an input of another shape than (B, C, H, W); a wrong time, label, map or tokens.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}")
        embedding = F.silu(self.embed_condition(t, condition, len(x)))
        given = (embedding, None if self.context is None else self.context(condition, len(x)))
        h = self.stem(F.pixel_unshuffle(narrowed(self._with_map(x, condition), self.stem.weight), self.patch_size))
        skips = [h]
        for level in self.encoder:
            for step in _steps(level):
                h = step(h, *given)
                skips.append(h)
        for block in self.middle:
            h = block(h, *given)
        pooled = None if self.pooled is None else self.pooled(h)  # (B, P)
        for level in self.decoder:
            for block in level.blocks:  # type: ignore[union-attr]
                h = block(torch.cat([h, skips.pop()], dim=1), *given)
            h = h if level.resample is None else level.resample(h, *given)  # type: ignore[operator]
        out = F.pixel_shuffle(self.out_conv(F.silu(self.out_norm(h))), self.patch_size)  # (B, outputs, H, W)
        if pooled is None:
            return out[:, : self.in_channels]
        everywhere = pooled[:, :, None, None].expand(-1, -1, *out.shape[2:])  # (B, P, H, W)
        return torch.cat([out.to(pooled.dtype), everywhere], dim=1)

    def resize_rules(self, source: Mapping[str, Any]) -> Rules:
        """How the weights of a U-Net with other channels and classes become its own; see `networks.resize_rules`.

        Args:
            source: constructor arguments of that U-Net.
        """
        channels, fewer = source["in_channels"], source["pooled_channels"]
        pixels = (source["patch_size"] ** 2, self.pixels)
        read, reads = (channels, source["spatial_channels"]), (self.in_channels, self.spatial_channels)
        gave = (channels - fewer, (source["out_channels"] or channels) - fewer)
        gives = (self.in_channels - self.pooled_channels, self.out_conv.out_channels // self.pixels)
        rules: Rules = {
            "stem.weight": partial(resize_input_channels, old=read, new=reads, pixels=pixels),
            "out_conv.weight": partial(resize_output_channels, old=gave, new=gives, pixels=pixels),
            "out_conv.bias": partial(resize_output_channels, old=gave, new=gives, pixels=pixels),
        }
        if self.y_embedder is not None and source["num_classes"] is not None:
            rules["y_embedder.embedding_table.weight"] = self.y_embedder.resize_rule(source)
        return rules

    def _with_map(self, x: Tensor, condition: Condition | None) -> Tensor:
        """``x`` and the map of the condition, zero where it is absent, (B, C + spatial_channels, H, W)."""
        if not self.spatial_channels:
            return x
        wanted = (len(x), self.spatial_channels, *self.shape[1:])
        if condition is None or condition.spatial is None:
            return torch.cat([x, x.new_zeros(wanted)], dim=1)
        if tuple(condition.spatial.shape) != wanted:
            raise ValueError(f"condition.spatial must have shape {wanted}, got {tuple(condition.spatial.shape)}")
        here = condition.presence("spatial", device=x.device)[:, None, None, None]
        # where, not a product: what an absent map holds must not matter, were it NaN
        return torch.cat([x, torch.where(here, condition.spatial.to(x), 0)], dim=1)


def _warn_of_narrow_patches(patch_size: int, numbers: int, width: int) -> None:
    """A velocity holds the noise of every pixel: the finest level needs a channel for each number of a patch."""
    if patch_size > 1 and numbers > width:
        warnings.warn(
            f"a patch of {patch_size} x {patch_size} pixels gives {numbers} numbers, more than the {width} channels of "
            "the finest level: samples may stay noisy. Raise hidden_size, or lower patch_size",
            UserWarning,
            stacklevel=4,
        )


def _steps(level: Any) -> list[nn.Module]:
    return [*level.blocks, *([] if level.resample is None else [level.resample])]


def _encoder(
    widths: Sequence[int], num_blocks: int, attend: Sequence[bool], change: Change, options: BlockOptions
) -> tuple[nn.ModuleList, list[int]]:
    """Levels from fine to coarse, and the channels of every map that they leave for the decoder."""
    levels, skips = nn.ModuleList(), [widths[0]]
    for i, width in enumerate(widths):
        inputs = [skips[-1]] + [width] * (num_blocks - 1)
        blocks = [UNetBlock(channels, width, options, attention=attend[i]) for channels in inputs]
        last = i == len(widths) - 1
        levels.append(Level(blocks, None if last else _changed(width, "down", change, options)))
        skips += [width] * (num_blocks if last else num_blocks + 1)
    return levels, skips


def _decoder(
    widths: Sequence[int],
    num_blocks: int,
    attend: Sequence[bool],
    change: Change,
    options: BlockOptions,
    skips: list[int],
) -> nn.ModuleList:
    """Levels from coarse to fine."""
    levels, channels = nn.ModuleList(), widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        blocks = []
        for _ in range(num_blocks + 1):
            blocks.append(UNetBlock(channels + skips.pop(), width, options, attention=attend[i]))
            channels = width
        levels.append(Level(blocks, _changed(width, "up", change, options) if i else None))
    return levels


def _changed(channels: int, direction: Direction, change: Change, options: BlockOptions) -> nn.Module:
    if change == "block":
        return UNetBlock(channels, channels, options, resample=direction)
    return Resample(channels, direction, conv=change == "conv")
