"""Autoregressive flows of a few numbers with every option, their conditions, and what the tests ask of them."""

import torch

from lightning_flows.flow import Condition, Tokens
from lightning_flows.networks import LayerStyle, STARFlow, TARFlow
from lightning_flows.networks.block_run import BlockRun
from lightning_flows.networks.flow_block import FlowBlock
from lightning_flows.networks.rotary import grid_positions, rotation, text_positions

SIZE = (4, 6)  # 2 x 3 patches of side 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def redrawn(module, seed=0, std=0.15):
    """The module in eval mode with every parameter drawn afresh, those that start at zero too."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=source))
    return module.eval()


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def tarflow(**options):
    sizes = {"patch_size": 2, "in_channels": 2, "hidden_size": 8, "num_blocks": 3, "depth": 1, "head_size": 4}
    return redrawn(TARFlow(**{"input_size": SIZE, **sizes, **options}))


def starflow(**options):
    sizes = {"patch_size": 2, "in_channels": 2, "hidden_size": 20, "depth": (1, 1, 2), "head_size": 20, "mlp_ratio": 2}
    return redrawn(STARFlow(**{"input_size": SIZE, **sizes, **options}))


TEXT = {"text_length": 3, "text_size": 5}

FLOWS = {
    "tarflow": lambda: tarflow(),
    "class vectors": lambda: tarflow(num_classes=3),
    "two heads, other depths": lambda: tarflow(depth=(2, 1), num_blocks=2, num_classes=3),
    "volume preserving": lambda: tarflow(volume_preserving=True, num_classes=3),
    "identity block": lambda: tarflow(depth=(1, 0, 1)),
    "patch 1": lambda: tarflow(patch_size=1, input_size=(3, 2), hidden_size=4),
    "starflow": lambda: starflow(),
    "class token": lambda: starflow(num_classes=3),
    "text": lambda: starflow(**TEXT),
    "text in all blocks": lambda: starflow(**TEXT, deep_condition_only=False),
    "first block forwards": lambda: starflow(num_classes=3, reverse_first=False),
    "copied first token": lambda: starflow(num_classes=3, start_token=False),
    "exp": lambda: starflow(scale="exp"),
    "no scale": lambda: starflow(scale="none", **TEXT),
    "no clip, no norm": lambda: starflow(soft_clip=0.0, final_norm=False),
    "deep width": lambda: starflow(num_classes=3, deep_hidden_size=40),
    "shared keys": lambda: starflow(head_size=4, num_heads=4, num_kv_heads=2),
    "one key, any width": lambda: starflow(**TEXT, hidden_size=12, num_heads=2, num_kv_heads=1),
    "all norms": lambda: starflow(qk_norm=True, post_norm=True, norm="rms"),
    "gated, no bias, halves": lambda: starflow(**TEXT, gated_mlp=True, bias=False, half_split=True),
    "gemma": lambda: starflow(
        **TEXT, gated_mlp=True, bias=False, half_split=True, qk_norm=True, post_norm=True, norm="rms", num_heads=2,
        num_kv_heads=1, deep_hidden_size=24, deep_condition_only=False,
    ),
    "identity first": lambda: starflow(num_classes=3, depth=(0, 1, 1)),
    "other reference": lambda: starflow(**TEXT, reference_length=32.0, theta=100.0),
}  # fmt: skip


def condition_of(network, n=2, dtype=torch.float32):
    """Labels or texts of n samples, different ones; None where the network reads none."""
    if "label" in network.streams:
        return Condition(label=torch.arange(n) % network.num_classes)
    if "tokens" in network.streams:
        mask = torch.arange(network.text_length) < torch.arange(n)[:, None] % network.text_length + 1
        return Condition(tokens=Tokens(normal(n, network.text_length, network.text_size, seed=7, dtype=dtype), mask))
    return None


def jacobian(function, x):
    """Of one sample x (1, ...): the rows of the Jacobian of ``function(x)`` (D, D), by one backward pass for all."""
    dims = x.numel()
    leaf = x.expand(dims, *x.shape[1:]).clone().requires_grad_()
    (rows,) = torch.autograd.grad(function(leaf).flatten(1).diagonal().sum(), leaf)
    return rows.flatten(1)


# ---------------------------------------------------------------------- one block

GRID = (2, 3)
WIDTH, TOKEN, HEAD = 20, 3, 20


def block(*, table=False, classes=False, text=False, layers=1, **options):
    """A block of 2 x 3 tokens of three channels."""
    given = {
        "num_tokens": 6 if table else None,
        "num_classes": 3 if classes else None,
        "text_size": 5 if text else None,
    }
    return redrawn(FlowBlock(TOKEN, layers, LayerStyle(WIDTH, HEAD, mlp_ratio=2), **given, **options)).double()


def turns_of(block):
    """The rotation of a prefix of two tokens, where the block reads one, and of the 6 tokens; None for a table."""
    if block.pos_embed is not None:
        return None
    places = torch.nn.functional.pad(grid_positions(*GRID, 2.4), (0, 1))
    prefix = [] if block.proj_txt is None else [text_positions(2, 2.4)]
    return rotation(torch.cat([*prefix, places]), HEAD)


def context_of(block, n=2):
    rows = None if block.class_embed is None else torch.arange(n) % 4 - 1
    text = None if block.proj_txt is None else normal(n, 2, 5, seed=8, dtype=torch.float64)
    return block.context(rows, text)


def inverted(block, z, method, context=None, turns=None, guidance=None):
    """X of a block's z, log |det dx/dz|, and the run."""
    run = BlockRun(block, z, context or block.context(), turns, guidance)
    method(run, lambda settled: None)
    return *run.result(), run
