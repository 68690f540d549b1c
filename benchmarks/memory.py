"""What a recipe costs before it is run: operations, memory and communication of a step, counted without a device.

    python -m benchmarks.memory                                     # every large recipe
    python -m benchmarks.memory configs/sit/imagenet256_xl2.yaml --devices 8 --json memory.json

The network of a recipe is run with fake tensors, which have shapes and no numbers, under the recipe's precision. All
that autograd keeps for the backward pass is summed, each storage once, parameters left out: eager, and with
`ActivationCheckpointing` of all blocks. The codec, whose activations are not kept, and what the allocator wastes are
not counted. Columns are explained in docs/scaling.md, whose formulas stand beside them for DiT:

    state       bytes on a device for weights, gradients, two moments of AdamW and the average (EMA), all in float32
    batch       samples of one device in the recipe
    activations bytes that the backward pass needs for that batch
    traffic     bytes that a device sends in a step: DDP 8 P (n - 1) / n, FSDP2 12 P (n - 1) / n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import finish, parser, show, table
from lightning_flows.cli.runs import blocks_of as blocks_of_recipe
from lightning_flows.flow import Condition
from lightning_flows.networks import DiT, FlowStack, attention_backend, blocks_of, checkpoint_blocks, restore_blocks
from lightning_flows.store import build

CONFIGS = Path(__file__).parents[1] / "configs"
STATE = 20  # bytes of a parameter: weight, gradient, two moments, average, 4 each
TRAFFIC = {"ddp": 8, "fsdp2": 12}  # bytes of a parameter, times (n - 1) / n


class Cost(NamedTuple):
    """What one step of a recipe needs.

    Attributes:
        recipe: its path.
        parameters: P.
        forward_flops: operations of a forward pass of one sample.
        batch: samples of a device.
        activations: bytes of one sample that the backward pass needs.
        checkpointed: the same with every block computed again.
        predicted: by the formulas of docs/scaling.md, for a DiT: operations, activations, checkpointed.
    """

    recipe: str
    parameters: int
    forward_flops: int
    batch: int
    activations: int
    checkpointed: int
    predicted: tuple[int, int, int] | None


def cost(recipe: Path) -> Cost:
    """Counts of one recipe."""
    found = blocks_of_recipe(recipe, ["model.init_args.network", "data.init_args.batch_size", "trainer.precision"])
    entry, batch, precision = found.values()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(entry).parameters())
    with FakeTensorMode():
        network = build(entry)
        plain = [kept(network, n, precision) for n in (1, 2)]
        checkpoint_blocks(network)
        again = [kept(network, n, precision) for n in (1, 2)]
        restore_blocks(network)
        flops = operations(network, precision)
        predicted = formulas(network) if isinstance(network, DiT) else None
    # what grows from one sample to two; the rest (casts of the weights, kept once) belongs to the state
    return Cost(str(recipe.relative_to(CONFIGS.parent)), parameters, flops, batch, plain[1] - plain[0],
                again[1] - again[0], predicted)  # fmt: skip


def inputs(network: nn.Module, n: int) -> tuple[Any, ...]:
    """Arguments of a call with ``n`` samples; a flow has no time, and costs as much without a condition."""
    if isinstance(network, FlowStack):
        return (torch.empty(n, *network.shape),)
    label = torch.zeros(n, dtype=torch.long) if "label" in network.streams else None
    return torch.empty(n, *network.shape), torch.empty(n), Condition(label=label)


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def operations(network: nn.Module, precision: str) -> int:
    """Operations of one forward pass of one sample, a product and a sum counted as two."""
    plain = attention_backend("math")  # some fused kernels are not counted
    with FlopCounterMode(display=False) as counter, autocast(precision), torch.no_grad(), known_labels(), plain:
        network(*inputs(network, 1))
    return counter.get_total_flops()


def kept(network: nn.Module, n: int, precision: str) -> int:
    """Bytes that autograd keeps for the backward pass of ``n`` samples, parameters left out."""
    own = {storage(p) for p in network.parameters()}
    found: dict[Any, int] = {}

    def note(value: Tensor) -> Tensor:
        if storage(value) not in own:
            found[storage(value)] = value.untyped_storage().nbytes()
        return value

    keeping = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    fused = attention_backend("flash")  # as on an accelerator: a CPU's own way keeps float32
    with keeping, autocast(precision), known_labels(), fused:
        output = network(*inputs(network, n))  # noqa: F841  (alive: storages of freed tensors would be met again)
    return sum(found.values())


def storage(value: Tensor) -> Any:
    return value.untyped_storage()._cdata


@contextmanager
def known_labels() -> Iterator[None]:
    """Labels of fake tensors have no values that could be checked."""
    from lightning_flows.networks.conditioning import LabelEmbedding

    original: Callable[..., Any] = LabelEmbedding.rows
    LabelEmbedding.rows = lambda self, condition, *_: condition.label  # type: ignore[method-assign]
    try:
        yield
    finally:
        LabelEmbedding.rows = original  # type: ignore[method-assign]


def formulas(network: DiT) -> tuple[int, int, int]:
    """Operations, activations and checkpointed activations of a sample, by docs/scaling.md."""
    tokens, size = network.grid[0] * network.grid[1], network.pos_embed.shape[-1]
    depth = len(blocks_of(network))
    flops = depth * (24 * tokens * size**2 + 4 * tokens**2 * size + 12 * size**2)
    return flops, depth * tokens * 50 * size, depth * tokens * 4 * size


def row(found: Cost, devices: int) -> list[str]:
    share, p, b = (devices - 1) / devices, found.parameters, found.batch
    return [
        found.recipe.removeprefix("configs/"), f"{p / 1e6:.0f} M", f"{found.forward_flops / 1e9:.1f}", str(b),
        f"{STATE * p / 1e9:.1f}", f"{STATE * p / devices / 1e9:.1f}", f"{b * found.activations / 1e9:.1f}",
        f"{b * found.checkpointed / 1e9:.1f}", *(f"{bytes_ * p * share / 1e9:.1f}" for bytes_ in TRAFFIC.values()),
    ]  # fmt: skip


def compared(found: Cost) -> list[str]:
    measured = (found.forward_flops, found.activations, found.checkpointed)
    pairs = [f"{m / u:.1f} / {p / u:.1f}" for m, p, u in zip(measured, found.predicted, (1e9, 1e6, 1e6), strict=True)]
    return [found.recipe.removeprefix("configs/"), *pairs]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", type=Path)
    options.add_argument("--devices", type=int, default=8, help="over which FSDP2 spreads the state")
    given = options.parse_args()
    sizes, models = ("256", "512", "1024"), CONFIGS.glob("[!a]*/*.yaml")  # no autoencoders
    every = sorted(path for path in models if any(size in path.stem for size in sizes))
    found = [cost(recipe.resolve()) for recipe in given.recipes or every]
    n = given.devices
    head = ("recipe", "parameters", "forward GFLOP", "batch", "state, DDP (GB)", f"state, FSDP2 on {n} (GB)",
            "activations (GB)", "checkpointed (GB)", "traffic, DDP (GB)", "traffic, FSDP2 (GB)")  # fmt: skip
    show(table(head, [row(cost_, n) for cost_ in found]))
    if dits := [cost_ for cost_ in found if cost_.predicted]:
        show("\nDiT, one sample, counted / by formula:\n")
        heads = ("recipe", "forward GFLOP", "activations (MB)", "checkpointed (MB)")
        show(table(heads, [compared(cost_) for cost_ in dits]))
    finish({"devices": n, "costs": [cost_._asdict() for cost_ in found]}, [], given.json)


if __name__ == "__main__":
    main()
