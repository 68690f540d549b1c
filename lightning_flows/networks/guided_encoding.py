"""Data to noise under guidance: the guided flow is a flow as well, with a density of its own.

Guidance combines two Gaussians of a token given the tokens before it. At sampling these become known one after the
other; of given data all are known, so that one pass tells the noise from which the guided flow draws them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flows.flow.affine import Affine, AffineGuidance
from lightning_flows.flow.condition import Condition
from lightning_flows.networks.flow_block import Context, FlowBlock
from lightning_flows.networks.flow_stack import Encoded, FlowStack, _Inverse
from lightning_flows.networks.inverse_methods import Automatic
from lightning_flows.networks.layers import at_least_float32, without_autocast
from lightning_flows.networks.rotary import Rotation


def encode_guided(
    network: FlowStack,
    x: Tensor,
    condition: Condition | None,
    guidance: AffineGuidance,
    null: Condition | None = None,
) -> Encoded:
    """The noise of data under guidance: `FlowStack.draw` with the same arguments gives the data back.

    Args:
        network: a flow.
        x: data, shape (B, C, H, W).
        condition: of the samples.
        guidance: not off.
        null: what "without the condition" is; `null` of the network by default.

    Raises:
        ValueError: guidance without a condition, unless a temperature makes its other branch.
    """
    how = _Inverse(guidance, null, Automatic(), None)
    network._check_guidance(condition, how)
    tokens = at_least_float32(network.patchify(x))
    log_det = tokens.new_zeros(len(x))
    both, alone = network._both_contexts(condition, how, len(x))
    rotations = network.rotations(*network.grid(x), x.device)
    for b, block in enumerate(network.stack):
        if len(block.attn_blocks) and network._guided(b, guidance, b == len(network.stack) - 1):
            tokens, part = _normalize(block, tokens, both[b], rotations[b], guidance)
        else:
            tokens, part = block(tokens, alone[b], rotations[b])
        log_det = log_det + part
    return Encoded(network.unpatchify(tokens, *network.grid(x)), log_det)


def _normalize(
    block: FlowBlock, x: Tensor, context: Context, rotation: Rotation | None, guidance: AffineGuidance
) -> tuple[Tensor, Tensor]:
    """Z of tokens (B, N, D) and log |det dz/dx| (B,); the context has 2 B rows, the conditional ones first."""
    inputs, size = block.inputs(block.scanned(at_least_float32(x))), len(x)
    steps = inputs.shape[1] - 1
    sharpness = None
    if guidance.null_temperature != 1:
        ones = inputs.new_ones(size)
        sharpness = torch.cat([ones, ones / guidance.null_temperature])
    pair = block.predict(inputs[:, :-1].repeat(2, 1, 1), context, rotation, sharpness=sharpness)  # (2 B, M, D)
    progress = torch.arange(1, steps + 1, device=x.device) / steps
    with without_autocast(x.device):
        gaussian = Affine(*guidance(pair.rows(slice(None, size)), pair.rows(slice(size, None)), progress))
        z = gaussian.normalize(inputs[:, 1:])
        if block.sos_embed is None:
            z = torch.cat([inputs[:, :1], z], 1)  # the first token is copied
        return block.scanned(z), -gaussian.log_scale.flatten(1).sum(1)
