"""The inversion of one flow block in progress: what is known, what is guessed, and the keys and values behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flows.flow.affine import Affine, AffineGuidance
from lightning_flows.networks.causal import KeyValueCache
from lightning_flows.networks.flow_block import Context, FlowBlock
from lightning_flows.networks.layers import at_least_float32
from lightning_flows.networks.plain_layers import plain_layers
from lightning_flows.networks.rotary import Rotation


class BlockRun:
    """From the z of one block back to its x, in scan order.

    The network reads ``inputs[:, i]`` and tells the Gaussian of ``inputs[:, i + 1]``, whose noise is ``noise[:, i]``.
    ``inputs[:, 0]`` is known from the beginning (the start token, or the copied first token); the others hold a first
    guess until they are settled, which is their noise.

    Args:
        block: a block with layers.
        z: shape (B, N, D), in raster order.
        context: of the block; with guidance that of 2 B rows, the conditional ones first.
        rotation: see `FlowBlock.forward`.
        guidance: combines the two halves of 2 B rows; None for B rows.

    Attributes:
        inputs: shape (B, M + 1, D).
        noise: shape (B, M, D).
        log_scales: log sigma of the tokens that are settled, shape (B, M).
        passes: calls of the block's layers.
    """

    def __init__(
        self,
        block: FlowBlock,
        z: Tensor,
        context: Context,
        rotation: Rotation | None = None,
        guidance: AffineGuidance | None = None,
    ) -> None:
        self.block, self.context, self.rotation, self.guidance = block, context, rotation, guidance
        self.inputs = block.inputs(block.scanned(at_least_float32(z))).clone()
        self.noise = self.inputs[:, 1:].clone()
        self.log_scales = self.noise.new_zeros(self.noise.shape[:2])
        self.prefix = 0 if context.prefix is None else context.prefix.shape[1]
        self.cache = KeyValueCache(len(block.attn_blocks), self.prefix + self.steps)
        self.progress = torch.arange(1, self.steps + 1, device=z.device) / self.steps
        self.sharpness = self._sharpness(len(z))
        self.plain = plain_layers(block.attn_blocks, z.device)
        self.passes = 0
        if self.prefix:
            block.prime(context, rotation, self.cache, self.sharpness, self.plain)

    def _sharpness(self, size: int) -> Tensor | None:
        if self.guidance is None or self.guidance.null_temperature == 1:
            return None
        ones = self.inputs.new_ones(size)
        return torch.cat([ones, ones / self.guidance.null_temperature])

    @property
    def steps(self) -> int:
        """Number M of tokens to be found."""
        return self.noise.shape[1]

    def evaluate(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens after the inputs ``start`` to ``stop - 1``, as the inputs are now.

        The cache must be filled up to ``start``.

        Returns:
            Shape (B, n, D), and their log sigma, summed over the channels, (B, n).
        """
        inputs = self.inputs[:, start:stop]
        if self.guidance is not None:
            inputs = torch.cat([inputs, inputs])
        gaussian = self.block.predict(
            inputs, self.context, self.rotation, self.cache, self.sharpness, start, self.plain
        )
        if self.guidance is not None:
            half = len(inputs) // 2
            pair = gaussian.rows(slice(None, half)), gaussian.rows(slice(half, None))
            gaussian = Affine(*self.guidance(*pair, self.progress[start:stop]))
        self.passes += 1
        return gaussian.apply(self.noise[:, start:stop]), gaussian.log_scale.sum(-1)

    def settle(self, start: int, tokens: Tensor, log_scales: Tensor) -> None:
        """Write the tokens (B, n, D) after the inputs from ``start`` on."""
        stop = start + tokens.shape[1]
        self.inputs[:, start + 1 : stop + 1] = tokens
        self.log_scales[:, start:stop] = log_scales

    def rewind(self, start: int) -> None:
        """Forget the keys and values of the inputs from ``start`` on."""
        self.cache.rewind(self.prefix + start)

    def result(self) -> tuple[Tensor, Tensor]:
        """X in raster order, shape (B, N, D); and log |det dx/dz|, shape (B,)."""
        x = self.inputs if self.block.sos_embed is None else self.inputs[:, 1:]
        return self.block.scanned(x), self.log_scales.sum(1)

    # ------------------------------------------------------------------ some of the samples

    def rows(self, index: Tensor) -> BlockRun:
        """A copy with the samples ``index`` (n,)."""
        part = object.__new__(BlockRun)
        part.__dict__.update(self.__dict__)
        every = self._rows_of(index, len(self.inputs))
        part.inputs, part.noise, part.log_scales = self.inputs[index], self.noise[index], self.log_scales[index]
        part.cache = self.cache.rows(every)
        added = self.context.added
        part.context = Context(None if added is None else added[every], self.context.prefix)
        part.sharpness = None if self.sharpness is None else self.sharpness[every]
        return part

    def put(self, index: Tensor, part: BlockRun, start: int, stop: int) -> None:
        """Take over what a copy with the samples ``index`` found for the inputs ``start`` to ``stop - 1``."""
        self.inputs[index, start + 1 : stop + 1] = part.inputs[:, start + 1 : stop + 1]
        self.log_scales[index, start:stop] = part.log_scales[:, start:stop]
        every = self._rows_of(index, len(self.inputs))
        self.cache.put(every, part.cache, self.prefix + start, self.prefix + stop)

    def _rows_of(self, index: Tensor, size: int) -> Tensor:
        return index if self.guidance is None else torch.cat([index, index + size])
