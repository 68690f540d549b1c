r"""TARFlow: an autoregressive flow on patches of pixels.

Blocks of one size with a learned table of positions, the class added to every token, and :math:`\sigma = e^a`. The
first token of a block is copied; the blocks scan in turn from the first token to the last and back.

References:
    Normalizing Flows are Capable Generative Models (Zhai, Zhang, Nakkiran, Berthelot, Gu, Zheng, Chen, Bautista,
    Jaitly, Susskind, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.causal import LayerStyle
from lightning_flows.networks.flow_block import Context, FlowBlock
from lightning_flows.networks.flow_condition import check_label_dropout, class_rows, drop_streams, sides
from lightning_flows.networks.flow_stack import FlowStack
from lightning_flows.networks.rotary import Rotation


class TARFlow(FlowStack):
    """Autoregressive flow on patches, with the state-dict names of the official files.

    Args:
        input_size: side of a square input, or (height, width).
        patch_size: side of a patch; divides both sides.
        in_channels: channels C.
        hidden_size: width of the layers.
        num_blocks: number of flow blocks.
        depth: layers in a block, or one number for each block.
        head_size: channels of an attention head; divides ``hidden_size``.
        mlp_ratio: width of the MLPs over ``hidden_size``.
        num_classes: number of classes; None for a network that reads no label.
        label_dropout: rate at which training drops the label. An absent label is the mean of all class vectors.
        soft_clip: see `FlowBlock`: bounds log-scales and shifts, which the published models do not; 0 for no bound.
        volume_preserving: no scales; then the variance of z is tracked in training and samples start from it.

    Attributes:
        prior_variance: running variance of z, buffer, shape (N, D); only with ``volume_preserving``.

    Raises:
        ValueError: sizes that do not divide each other, or an argument out of its range.
    """

    channels_last = False
    prior_variance: Tensor

    def __init__(
        self,
        input_size: int | tuple[int, int],
        *,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden_size: int = 768,
        num_blocks: int = 8,
        depth: int | Sequence[int] = 8,
        head_size: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        soft_clip: float = 0.0,
        volume_preserving: bool = False,
    ) -> None:
        super().__init__()
        height, width = sides(input_size, patch_size)
        check_label_dropout(num_classes, label_dropout)
        self.shape, self.patch_size = (in_channels, height, width), patch_size
        self.num_classes, self.label_dropout, self.volume_preserving = num_classes, label_dropout, volume_preserving
        tokens, channels = (height // patch_size) * (width // patch_size), in_channels * patch_size**2
        style = LayerStyle(hidden_size, head_size, mlp_ratio=mlp_ratio)
        self.blocks = nn.ModuleList(
            FlowBlock(
                channels,
                layers,
                style,
                reverse=i % 2 == 1,
                num_tokens=tokens,
                num_classes=num_classes,
                scale="none" if volume_preserving else "exp",
                soft_clip=soft_clip,
            )
            for i, layers in enumerate(depths(depth, num_blocks))
        )
        if volume_preserving:
            self.register_buffer("prior_variance", torch.ones(tokens, channels))

    def reset_parameters(self) -> None:
        """See `FlowStack.reset_parameters`; a tracked variance begins at 1."""
        super().reset_parameters()
        if self.volume_preserving:
            self.prior_variance.fill_(1)

    @property
    def streams(self) -> tuple[str, ...]:
        """See `FlowStack.streams`."""
        return () if self.num_classes is None else ("label",)

    def contexts(self, condition: Condition | None, batch_size: int) -> list[Context]:
        """See `FlowStack.contexts`."""
        if self.num_classes is None:
            return [Context()] * len(self.blocks)
        rows = class_rows(condition, batch_size, self.num_classes).to(self.device)
        return [block.context(rows) for block in self.stack]

    def rotations(self, rows: int, columns: int, device: torch.device) -> Sequence[Rotation | None]:
        """None: positions are learned.

        Raises:
            ValueError: a grid of another size than that of the table.
        """
        grid = tuple(side // self.patch_size for side in self.shape[1:])
        if (rows, columns) != grid:
            raise ValueError(f"x must have {grid} patches, those of the table of positions, got {(rows, columns)}")
        return [None] * len(self.blocks)

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """See `FlowStack.drop`."""
        return drop_streams(condition, {"label": self.label_dropout}, generator)

    def prior_std(self) -> Tensor | None:
        """See `FlowStack.prior_std`: of the tracked variance where volume is preserved."""
        return self.prior_variance.sqrt() if self.volume_preserving else None

    @torch.no_grad()
    def track(self, z: Tensor) -> None:
        """Move the running variance a tenth of the way to that of a batch of tokens (B, N, D)."""
        if self.volume_preserving:
            self.prior_variance.copy_(tracked(self.prior_variance, z))


def tracked(variance: Tensor, z: Tensor, rate: float = 0.1) -> Tensor:
    """``(1 - rate) variance + rate mean(z^2)`` over the batch of z (B, N, D), shape (N, D)."""
    return torch.lerp(variance, z.detach().square().mean(0).to(variance), rate)


def depths(depth: int | Sequence[int], num_blocks: int) -> list[int]:
    """Layers of every block.

    Raises:
        ValueError: another number of entries than blocks, or no block.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    every = [depth] * num_blocks if isinstance(depth, int) else list(depth)
    if len(every) != num_blocks:
        raise ValueError(f"depth must be one number or one for each of the {num_blocks} blocks, got {every}")
    return every
