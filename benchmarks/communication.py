"""What two processes exchange and hold in a training step of a DiT, under DDP and under FSDP2, beside the formulas.

    python -m benchmarks.communication --size S --json communication.json

Two gloo processes on the CPU take a few steps (forward, backward, AdamW) with the same network, which
`networks.shard_blocks` spreads for FSDP2. The tensors of every collective operation are counted, and what a process
holds for weights, gradients and optimizer. With n processes, P parameters of 4 bytes and a ring, a process sends

    DDP    gradients summed (all-reduce)                                            8 P (n - 1) / n bytes
    FSDP2  weights gathered twice, gradients summed and dealt (reduce-scatter)     12 P (n - 1) / n bytes

and holds 16 P, or 16 P / n and the largest gathered group. The figures are of the network's own collectives; no
bandwidth is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parser, show, table

RANKS, STEPS = 2, 3
# What FSDP2 calls; the names have changed with torch.
COLLECTIVES = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


class Traffic:
    """Bytes that a ring sends from one process, summed over the collectives of a step."""

    def __init__(self) -> None:
        self.bytes = 0.0

    def reduce(self, size: int) -> None:
        self.bytes += 2 * size * (RANKS - 1) / RANKS

    def gather_or_scatter(self, size: int) -> None:
        self.bytes += size * (RANKS - 1) / RANKS


def size_of(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def ddp(network: Any, traffic: Traffic) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    def hook(group, bucket):  # torch reads annotations here, and refuses those that are strings
        traffic.reduce(size_of(bucket.buffer()))
        return allreduce_hook(group, bucket)

    wrapped = DistributedDataParallel(network)
    wrapped.register_comm_hook(None, hook)
    return wrapped


def fsdp2(network: Any, traffic: Traffic) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_flows.networks import shard_blocks

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name), traffic))
    shard_blocks(network, init_device_mesh("cpu", (RANKS,)))
    return network


def counted(collective: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    """``collective`` that adds the bytes of its undivided tensor, the larger one of input and output."""

    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = [size_of(value) for value in (*args, *kwargs.values()) if hasattr(value, "element_size")]
        traffic.gather_or_scatter(max(sizes))
        return collective(*args, **kwargs)

    return call


def measure(rank: int, folder: str, size: str) -> None:
    """What one process sees under both; the first one writes it down."""
    import json

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {name: one(make, size) for name, make in (("ddp", ddp), ("fsdp2", fsdp2))}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def one(make: Callable[[Any, Traffic], Any], size: str) -> dict[str, float]:
    """Bytes sent in the last step, bytes held after it, and the number of parameters."""
    import torch

    from lightning_flows.flow import Condition
    from lightning_flows.networks import DiT

    torch.manual_seed(0)
    network = DiT.of_size(size, input_size=8, num_classes=10)
    parameters, traffic = sum(p.numel() for p in network.parameters()), Traffic()
    wrapped = make(network, traffic)
    optimizer = torch.optim.AdamW(network.parameters())
    x, t, condition = torch.randn(1, 4, 8, 8), torch.rand(1), Condition(label=torch.tensor([3]))
    for _ in range(STEPS):
        traffic.bytes = 0.0
        optimizer.zero_grad()
        wrapped(x, t, condition).square().mean().backward()
        optimizer.step()
    tensors = [v for p in network.parameters() for v in (p, p.grad, *optimizer.state[p].values())]
    held = sum(size_of(local(v)) for v in tensors if v is not None and v.dim() > 0)
    return {"parameters": parameters, "sent": traffic.bytes, "held": held}


def local(tensor: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def formulas(parameters: int) -> dict[str, tuple[float, float]]:
    """Bytes sent and held, by name."""
    share = (RANKS - 1) / RANKS
    return {
        "ddp": (8 * parameters * share, 16.0 * parameters),
        "fsdp2": (12 * parameters * share, 16 * parameters / RANKS),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", default="S", help="of the DiT: S, B, L, XL")
    given = options.parse_args()
    import json

    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, given.size), nprocs=RANKS)
        found = json.loads((Path(folder) / "found.json").read_text())
    expected = formulas(int(found["ddp"]["parameters"]))
    rows = [
        [name, f"{f['sent'] / 1e6:.1f}", f"{expected[name][0] / 1e6:.1f}", f"{f['held'] / 1e6:.1f}",
         f"{expected[name][1] / 1e6:.1f}"]
        for name, f in found.items()
    ]  # fmt: skip
    show(table(("strategy", "sent (MB)", "by formula", "held (MB)", "by formula"), rows))
    far = [
        n for n, f in found.items() for v, e in zip((f["sent"], f["held"]), expected[n], strict=True) if v > 1.02 * e
    ]
    finish(
        {"size": given.size, "processes": RANKS, **found}, [f"{name}: above its formula" for name in far], given.json
    )


if __name__ == "__main__":
    main()
