r"""A stack of autoregressive flow blocks over patches: data to noise in one pass, noise to data token by token.

.. math:: \log p(x \mid c) = \log N(z; 0, I) + \sum_b \log \Big|\det \frac{\partial z_b}{\partial z_{b-1}}\Big|,
          \qquad z = z_B \circ \dots \circ z_1 (x).

Data go through the blocks from the first to the last; samples start at the last one, the deep one in STARFlow. The
blocks scan in turn from the first token to the last and back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flows.flow.affine import AffineGuidance
from lightning_flows.flow.condition import Condition
from lightning_flows.networks.block_run import BlockRun
from lightning_flows.networks.causal import CausalLayer
from lightning_flows.networks.flow_block import Context, FlowBlock
from lightning_flows.networks.inverse_methods import Automatic, InverseMethod
from lightning_flows.networks.layers import at_least_float32
from lightning_flows.networks.rotary import Rotation
from lightning_flows.store import Recorded


class Encoded(NamedTuple):
    """Data as noise.

    Attributes:
        z: shape of the data, float32.
        log_det: log |det dz/dx| in nats, float32, shape (B,).
        states: tokens before the first block and after each but the last, each (B, N, D); () unless asked for.
    """

    z: Tensor
    log_det: Tensor
    states: tuple[Tensor, ...] = ()


class Drawn(NamedTuple):
    """Noise as data.

    Attributes:
        x: shape of the noise, float32.
        log_det: log |det dx/dz| in nats of the map that was followed (the guided one under guidance), shape (B,).
        passes: calls of a block's layers.
    """

    x: Tensor
    log_det: Tensor
    passes: int


class Part(NamedTuple):
    """News of an inversion in progress.

    Attributes:
        block: index of the block that is being inverted; the last one is the first.
        settled: tokens of it that are known.
        tokens: number of its tokens.
        x: tokens after the block, shape (B, N, D), once all are known; else None.
    """

    block: int
    settled: int
    tokens: int
    x: Tensor | None = None


Watch = Callable[[Part], None]


class _Inverse(NamedTuple):
    guidance: AffineGuidance | None
    null: Condition | None
    method: InverseMethod
    watch: Watch | None


class FlowStack(Recorded, nn.Module):
    """Base of `TARFlow` and `STARFlow`: patches, blocks, and both directions.

    Attributes:
        shape: (C, H, W) of one sample.
        blocks: the flow blocks, in the order of data.
    """

    block_classes = (CausalLayer,)
    channels_last = True  # of the values inside a patch: (row, column, channel), else (channel, row, column)

    shape: tuple[int, int, int]
    patch_size: int
    blocks: nn.ModuleList

    # ------------------------------------------------------------------ what a family says

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """Names of the condition's streams that the network reads."""

    @abstractmethod
    def contexts(self, condition: Condition | None, batch_size: int) -> list[Context]:
        """What each block makes of a condition."""

    @abstractmethod
    def rotations(self, rows: int, columns: int, device: torch.device) -> Sequence[Rotation | None]:
        """The rotation of each block for a grid of tokens."""

    @abstractmethod
    def drop(self, condition: Condition | None, generator: torch.Generator) -> Condition | None:
        """``condition`` with streams absent at random, as training wants it."""

    def null(self, condition: Condition | None = None, batch_size: int | None = None) -> Condition:
        """``condition`` with every stream of the network absent."""
        return Condition() if condition is None else condition.absent(*self.streams)

    def prior_std(self) -> Tensor | None:
        """Deviation of z where it is not 1, broadcastable to tokens (B, N, D); None for 1."""
        return None

    @property
    def stack(self) -> list[FlowBlock]:
        """The blocks, as what they are."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.stack[0].proj_in.weight.device

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        for block in self.stack:
            block.reset_parameters()

    # ------------------------------------------------------------------ patches

    def patchify(self, x: Tensor) -> Tensor:
        """Patches of ``x`` (B, C, H, W) in raster order, shape (B, N, D).

        Raises:
            ValueError: sides that are no multiples of the patch, or another number of channels.
        """
        p = self.patch_size
        if x.dim() != 4 or x.shape[1] != self.shape[0] or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"x must have shape (B, {self.shape[0]}, H, W), H and W multiples of {p}, got {_of(x)}")
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, rows, p, columns, p)
        order = (0, 2, 4, 3, 5, 1) if self.channels_last else (0, 2, 4, 1, 3, 5)
        return x.permute(order).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `patchify` for a grid of patches."""
        p, c = self.patch_size, self.shape[0]
        x = tokens.unflatten(1, (rows, columns))
        if self.channels_last:
            x = x.unflatten(3, (p, p, c)).permute(0, 5, 1, 3, 2, 4)
        else:
            x = x.unflatten(3, (c, p, p)).permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, p, columns, p)
        return x.flatten(4).flatten(2, 3)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of ``x`` (B, C, H, W)."""
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    # ------------------------------------------------------------------ both directions

    def forward(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        states: bool = False,
        inverse: _Inverse | None = None,
    ) -> Any:
        """Data to noise.

        Args:
            x: data, shape (B, C, H, W).
            condition: of the samples; None for none.
            states: keep what is between the blocks.
            inverse: of `draw`, which goes through here so that parameters spread over devices are gathered.

        Returns:
            `Encoded`: ``z, log_det, states``; without ``states``, the pair ``(z, log_det)``.

        Raises:
            ValueError: data or a condition of another shape.
        """
        if inverse is not None:  # a network compiled as a whole would unroll the loop over all tokens
            draw = torch.compiler.disable(self._draw) if torch.compiler.is_compiling() else self._draw
            return draw(x, condition, inverse)
        tokens, seen = at_least_float32(self.patchify(x)), []
        log_det = tokens.new_zeros(len(x))
        rotations = self.rotations(*self.grid(x), x.device)
        for block, context, rotation in zip(self.blocks, self.contexts(condition, len(x)), rotations, strict=True):
            seen.append(tokens)
            tokens, part = block(tokens, context, rotation)
            log_det = log_det + part
        if self.training:
            self.track(tokens)
        z = self.unpatchify(tokens, *self.grid(x))
        return Encoded(z, log_det, tuple(seen)) if states else (z, log_det)

    def track(self, z: Tensor) -> None:
        """Called in training with the tokens of z (B, N, D)."""

    def inverse(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        guidance: AffineGuidance | None = None,
        null: Condition | None = None,
        method: InverseMethod | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Noise to data: the x of `draw`."""
        return self.draw(z, condition, guidance=guidance, null=null, method=method, watch=watch).x

    def draw(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        guidance: AffineGuidance | None = None,
        null: Condition | None = None,
        method: InverseMethod | None = None,
        watch: Watch | None = None,
    ) -> Drawn:
        """Noise to data, with the density of the map.

        Args:
            z: noise, shape (B, C, H, W).
            condition: of the samples; None for none.
            guidance: combines what is said with and without the condition.
            null: what "without the condition" is; `null` of the network by default.
            method: how blocks are inverted; `Automatic` by default.
            watch: called with every `Part` that is settled.

        Raises:
            ValueError: guidance without a condition, unless a temperature makes its other branch; shapes that do not
                fit.
        """
        guidance = None if guidance is None or guidance.off else guidance
        return self(z, condition, inverse=_Inverse(guidance, null, method or Automatic(), watch))

    def _draw(self, z: Tensor, condition: Condition | None, how: _Inverse) -> Drawn:
        self._check_guidance(condition, how)
        rows, columns = self.grid(z)
        tokens, passes = at_least_float32(self.patchify(z)), 0
        log_det = tokens.new_zeros(len(z))
        contexts, free = self._both_contexts(condition, how, len(z))
        rotations = self.rotations(rows, columns, z.device)
        for b in reversed(range(len(self.blocks))):
            block, deep = self.stack[b], b == len(self.blocks) - 1
            if len(block.attn_blocks):
                guidance = how.guidance if self._guided(b, how.guidance, deep) else None
                context = contexts[b] if guidance is not None or how.guidance is None else free[b]
                tokens, part, more = self._invert(b, tokens, context, rotations[b], guidance, how)
                log_det, passes = log_det + part, passes + more
            if how.watch is not None:
                how.watch(Part(b, tokens.shape[1], tokens.shape[1], tokens))
        return Drawn(self.unpatchify(tokens, rows, columns), log_det, passes)

    def _invert(
        self,
        b: int,
        tokens: Tensor,
        context: Context,
        rotation: Rotation | None,
        guidance: AffineGuidance | None,
        how: _Inverse,
    ) -> tuple[Tensor, Tensor, int]:
        run, watch = BlockRun(self.stack[b], tokens, context, rotation, guidance), how.watch

        def settled(count: int) -> None:
            if watch is not None:
                watch(Part(b, count, run.steps))

        how.method.of_block(b)(run, settled)
        return *run.result(), run.passes

    # ------------------------------------------------------------------ guidance

    def _check_guidance(self, condition: Condition | None, how: _Inverse) -> None:
        if how.guidance is None or how.guidance.null_temperature != 1:
            return
        rule = type(how.guidance).__name__
        if not self.streams:
            raise ValueError(f"{rule}(scale={how.guidance.scale}) needs a network with a condition, or a temperature")
        if condition is None or not set(condition.streams) & set(self.streams):
            given = () if condition is None else condition.streams
            raise ValueError(
                f"{rule}(scale={how.guidance.scale}) needs a condition with one of {self.streams}, got {given}"
            )

    def _both_contexts(
        self, condition: Condition | None, how: _Inverse, size: int
    ) -> tuple[list[Context], list[Context]]:
        """Contexts of the guided blocks, of twice the rows, and of the others."""
        free = self.contexts(condition, size)
        if how.guidance is None:
            return free, free
        null = self.contexts(self.null(condition, size) if how.null is None else how.null, size)
        return [_joined(a, b) for a, b in zip(free, null, strict=True)], free

    def _guided(self, b: int, guidance: AffineGuidance | None, deep: bool) -> bool:
        """Whether both branches differ in block ``b``, and the rule wants it."""
        if guidance is None or not guidance.guides(deep):
            return False
        block = self.stack[b]
        conditional = block.class_embed is not None or block.proj_txt is not None
        return conditional or guidance.null_temperature != 1


def _joined(a: Context, b: Context) -> Context:
    return Context(*(None if x is None or y is None else torch.cat([x, y]) for x, y in zip(a, b, strict=True)))


def _of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
