r"""STARFlow: an autoregressive flow on latents, one deep block and several shallow ones.

Rotary positions on rows, columns and words, a learned start token, :math:`\sigma = \operatorname{softplus}(a + 0.5413)`
with softly clipped outputs, and the condition as tokens before those of the image, in the deep block alone. The deep
block is the last one for data and the first one for samples.

References:
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu, Chen, Berthelot, Zheng, Wang,
    Zhang, Dinh, Bautista, Susskind, Zhai, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flows.flow.condition import Condition
from lightning_flows.networks.causal import LayerStyle, Norm
from lightning_flows.networks.flow_block import Context, FlowBlock, ScaleMap
from lightning_flows.networks.flow_condition import (
    check_label_dropout,
    check_rate,
    class_rows,
    drop_streams,
    sides,
    text_of,
)
from lightning_flows.networks.flow_stack import FlowStack
from lightning_flows.networks.rotary import Rotation, grid_positions, rotation, text_positions


class STARFlow(FlowStack):
    """Deep-shallow autoregressive flow, with the state-dict names of the official files.

    Any height and width are allowed that are multiples of the patch: positions are relative to the area.

    Args:
        input_size: side of a square input, or (height, width).
        patch_size: side of a patch.
        in_channels: channels C.
        hidden_size: width of the layers.
        depth: layers of each block, the deep one last; 0 is the identity.
        deep_hidden_size: width of the deep block, where it is another.
        head_size: channels of an attention head, more than 16 with a condition.
        num_heads: see `LayerStyle`.
        num_kv_heads: see `LayerStyle`.
        mlp_ratio: width of the MLPs over the width of the layers.
        num_classes: number of classes, as one token of a one-hot code with a last row for "no class"; or None.
        label_dropout: rate at which training drops the label.
        text_length: most tokens of a text; 0 for a network that reads none.
        text_size: channels of a text's tokens.
        text_dropout: rate at which training drops the text.
        deep_condition_only: the shallow blocks do not see the condition.
        reverse_first: the first block scans backwards; the others in turn.
        start_token: see `FlowBlock`.
        scale: see `FlowBlock`.
        soft_clip: see `FlowBlock`.
        final_norm: see `FlowBlock`.
        reference_length: side of the square to which positions are scaled; by default that of ``input_size``.
        theta: base of the rotary frequencies.
        half_split: rotary pairs are channels (k, k + d/2).
        norm: see `LayerStyle`.
        gated_mlp: see `LayerStyle`.
        bias: see `LayerStyle`.
        qk_norm: see `LayerStyle`.
        post_norm: see `LayerStyle`.

    Raises:
        ValueError: sizes that do not divide each other, both classes and texts, or an argument out of its range.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        *,
        patch_size: int = 1,
        in_channels: int = 4,
        hidden_size: int = 2048,
        depth: Sequence[int] = (2, 2, 2, 2, 2, 18),
        deep_hidden_size: int | None = None,
        head_size: int = 64,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        text_length: int = 0,
        text_size: int | None = None,
        text_dropout: float = 0.0,
        deep_condition_only: bool = True,
        reverse_first: bool = True,
        start_token: bool = True,
        scale: ScaleMap = "softplus",
        soft_clip: float = 4.0,
        final_norm: bool = True,
        reference_length: float | None = None,
        theta: float = 10000.0,
        half_split: bool = False,
        norm: Norm = "layer",
        gated_mlp: bool = False,
        bias: bool = True,
        qk_norm: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        height, width = sides(input_size, patch_size)
        check_label_dropout(num_classes, label_dropout)
        check_rate("text_dropout", text_dropout)
        _check_text(num_classes, text_length, text_size, text_dropout)
        if not depth:
            raise ValueError("depth must have one number for each block, got none")
        self.shape, self.patch_size, self.head_size = (in_channels, height, width), patch_size, head_size
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.text_length, self.text_dropout = (1 if num_classes else text_length), text_dropout
        self.text_size = num_classes + 1 if num_classes else text_size
        self.reference = reference_length or ((height // patch_size) * (width // patch_size)) ** 0.5
        self.theta, self.half_split = theta, half_split
        self.conditional = [i == len(depth) - 1 or not deep_condition_only for i in range(len(depth))]
        options = {"mlp_ratio": mlp_ratio, "norm": norm, "gated_mlp": gated_mlp, "bias": bias}
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "qk_norm": qk_norm, "post_norm": post_norm}
        self.blocks = nn.ModuleList(
            FlowBlock(
                in_channels * patch_size**2,
                layers,
                LayerStyle(
                    deep_hidden_size or hidden_size if i == len(depth) - 1 else hidden_size,
                    head_size,
                    **options,  # type: ignore[arg-type]
                    **heads,  # type: ignore[arg-type]
                ),
                reverse=(i % 2 == 0) == reverse_first,
                text_size=self.text_size if self.text_length and self.conditional[i] else None,
                start_token=start_token,
                scale=scale,
                soft_clip=soft_clip,
                final_norm=final_norm,
            )
            for i, layers in enumerate(depth)
        )
        self.rotations(height // patch_size, width // patch_size, torch.device("cpu"))  # an unfit head_size says so

    @property
    def streams(self) -> tuple[str, ...]:
        """See `FlowStack.streams`."""
        return ("label",) if self.num_classes else ("tokens",) if self.text_length else ()

    def contexts(self, condition: Condition | None, batch_size: int) -> list[Context]:
        """See `FlowStack.contexts`."""
        if not self.text_length:
            return [Context()] * len(self.blocks)
        text = self._text(condition, batch_size)
        return [block.context(text=text) for block in self.stack]

    def _text(self, condition: Condition | None, batch_size: int) -> Tensor:
        """Tokens of the prefix, shape (B, L, text size)."""
        assert self.text_size is not None
        if not self.num_classes:
            return text_of(condition, batch_size, self.text_length, self.text_size, self.device)
        rows = class_rows(condition, batch_size, self.num_classes)
        rows = torch.where(rows < 0, self.num_classes, rows).to(self.device)
        return F.one_hot(rows, self.text_size).float()[:, None]  # (B, 1, K + 1)

    def rotations(self, rows: int, columns: int, device: torch.device) -> Sequence[Rotation | None]:
        """See `FlowStack.rotations`: by place in the sequence, whatever the scan order of a block is."""
        places = grid_positions(rows, columns, self.reference, device)  # (N, 2)
        if not self.text_length:
            return [self._rotation(places)] * len(self.blocks)
        places = F.pad(places, (0, 1))  # (N, 3)
        text = text_positions(self.text_length, self.reference, device)
        alone, behind = self._rotation(places), self._rotation(torch.cat([text, places]))
        return [behind if conditional else alone for conditional in self.conditional]

    def _rotation(self, places: Tensor) -> Rotation:
        return rotation(places, self.head_size, theta=self.theta, half_split=self.half_split)

    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """See `FlowStack.drop`."""
        return drop_streams(condition, {"label": self.label_dropout, "tokens": self.text_dropout}, generator)


def _check_text(num_classes: int | None, text_length: int, text_size: int | None, text_dropout: float) -> None:
    if num_classes and text_length:
        raise ValueError(f"num_classes={num_classes} and text_length={text_length} exclude each other")
    if text_length < 0:
        raise ValueError(f"text_length must not be negative, got {text_length}")
    if text_length and not text_size:
        raise ValueError(f"text_size must be positive with text_length={text_length}, got {text_size}")
    if text_dropout and not text_length:
        raise ValueError(f"text_dropout must be 0 without text_length, got {text_dropout}")
