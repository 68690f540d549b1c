"""Sampling of a TARFlow beside the published loop, and block-wise Jacobi beside token by token.

First table: the MNIST demo network (28 x 28, patch 4, width 128, 4 blocks of 4 layers) draws ``--batch`` images,
without guidance and with it. All contenders take turns in the rounds of one process, on two threads of a CPU:

    published   float32; keep the keys and values of each token in a list, concatenate all of them at every token, the
                two branches of the guidance one after the other (`benchmarks.published_flow`)
    running     the same, but concatenate what is known with the new token
    ours        float32, keys and values in one storage, both branches in one batch
    medium      the same with ``torch.set_float32_matmul_precision("medium")``: float32 products by another library,
                or bfloat16 ones where the processor has AMX
    bf16        the network in bfloat16, scales and tokens in float32
    compiled    ours with `networks.compile_blocks`
    both        bf16 and compiled

A figure is the median over rounds of the ratio of two wall times of the same round; beside it stands that of CPU times,
which neighbours disturb less. Errors are those of the samples against ours in float32. Bars against the published loop:
ours at most 0.75, the best setting at most 0.50.

Second table: each inverse method at batch 1, 8 and 128, again in turns: passes over a block's layers and milliseconds
for each block of the network, and the error of the samples against token by token. Iterations depend on the weights:
``--weights`` takes a folder of a trained model (its network then stands in the second table), else weights are
random. Bars: at batch 1 some Jacobi is quicker than token by token, and the automatic choice, whose threshold is
tighter, takes nowhere more than 1.1 of the time of token by token.

    python -m benchmarks.flow_sampling --weights zoo/tarflow-mnist
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import finish, parser, show, table

THREADS = 2
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.published_flow import PublishedTARFlow  # noqa: E402
from lightning_flows.flow import Condition, LogLinear  # noqa: E402
from lightning_flows.networks import (  # noqa: E402
    Automatic,
    FlowStack,
    InverseMethod,
    Jacobi,
    Part,
    Sequential,
    TARFlow,
    compile_blocks,
)

RESULTS = Path(__file__).parent / "results"
DEMO = {"patch_size": 4, "in_channels": 1, "hidden_size": 128, "num_blocks": 4, "depth": 4, "num_classes": 10}
BARS = {"ours": 0.75, "best": 0.50, "automatic": 1.1}
SCALE = 2.0  # of the guidance
SEQUENTIAL = "token by token"
METHODS: dict[str, InverseMethod] = {
    SEQUENTIAL: Sequential(),
    "Jacobi 16": Jacobi(threshold=1e-3),
    "Jacobi 16, official": Jacobi(threshold=1e-3, faithful=True),
    "Jacobi, one segment": Jacobi(segment=10**6, threshold=1e-3, max_iterations=64),
    "automatic": Automatic(),
}


# ---------------------------------------------------------------------- contenders in turns


class Times(NamedTuple):
    """Seconds of one contender in each round."""

    wall: list[float]
    cpu: list[float]


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Time each contender once per round, in an order that rotates, after one run of each to warm up."""
    names, times = list(contenders), {name: Times([], []) for name in contenders}
    for run in contenders.values():
        run()
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(own: list[float], bare: list[float]) -> float:
    return statistics.median(a / max(b, 1e-9) for a, b in zip(own, bare, strict=True))


def error(found: Tensor, exact: Tensor) -> dict[str, float]:
    gap = (found - exact).float()
    return {"rms": gap.square().mean().sqrt().item(), "max": gap.abs().max().item()}


# ---------------------------------------------------------------------- against the published loop


@contextmanager
def medium() -> Iterator[None]:
    """Float32 products at the speed that the processor has for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def demo(**sizes: Any) -> TARFlow:
    """The demo network, with outputs that depend on their inputs."""
    torch.manual_seed(0)
    network = TARFlow(**{"input_size": 28, **DEMO, **sizes}).eval()
    for block in network.stack:
        nn.init.normal_(block.proj_out.weight, std=0.02)
    return network


def samplers(network: TARFlow, batch: int, scale: float, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Contenders that draw the same images."""
    z = torch.randn(batch, *network.shape, generator=torch.Generator().manual_seed(1))
    label = torch.arange(batch) % (network.num_classes or 1)
    published = PublishedTARFlow(network).eval()
    guidance = LogLinear(scale)

    def ours(net: FlowStack, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            with torch.no_grad(), context():
                return net.draw(z, Condition(label=label), guidance=guidance, method=Sequential()).x

        return draw

    made = {
        "published": lambda: published.sample(z, label, scale - 1, "list"),
        "running": lambda: published.sample(z, label, scale - 1, "running"),
        "ours": ours(network),
        "medium": ours(network, medium),
        "bf16": ours(copy.deepcopy(network).bfloat16()),
    }
    if compiled:
        for name, twin in (("compiled", copy.deepcopy(network)), ("both", copy.deepcopy(network).bfloat16())):
            compile_blocks(twin)
            made[name] = ours(twin)
    return made


def compare(network: TARFlow, batch: int, scale: float, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for each contender."""
    made = samplers(network, batch, scale, compiled)
    exact = made["ours"]()
    times = in_turns(made, rounds)
    return [
        {
            "guidance": scale,
            "contender": name,
            "seconds": statistics.median(taken.wall),
            "ratio": ratio(taken.wall, times["published"].wall),
            "cpu_ratio": ratio(taken.cpu, times["published"].cpu),
            "of_running": ratio(taken.wall, times["running"].wall),
            **error(made[name](), exact),
        }
        for name, taken in times.items()
    ]


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Bars against the published loop that were not met."""
    found = {row["contender"]: row["ratio"] for row in rows}
    best = min(found[name] for name in found if name not in ("published", "running"))
    scale = rows[0]["guidance"]
    failed = [f"ours, scale {scale}: {found['ours']:.3f} above {BARS['ours']}"] if found["ours"] > BARS["ours"] else []
    return failed + ([f"best, scale {scale}: {best:.3f} above {BARS['best']}"] if best > BARS["best"] else [])


# ---------------------------------------------------------------------- Jacobi


class Watched(NamedTuple):
    """What one inversion took.

    Attributes:
        x: the samples.
        passes: of each block, in the order of the network.
        seconds: of each block.
    """

    x: Tensor
    passes: list[int]
    seconds: list[float]


@torch.no_grad()
def watched(network: FlowStack, z: Tensor, condition: Condition | None, method: InverseMethod) -> Watched:
    """Draw with counts and times for each block."""
    count, calls = len(network.blocks), [0] * len(network.blocks)
    marks = [0.0] * count

    def watch(part: Part) -> None:
        if part.x is not None:
            marks[part.block] = time.perf_counter()

    handles = [
        block.proj_out.register_forward_hook(lambda *_, b=b: calls.__setitem__(b, calls[b] + 1))
        for b, block in enumerate(network.stack)
    ]
    start = time.perf_counter()
    try:
        x = network.draw(z, condition, method=method, watch=watch).x
    finally:
        for handle in handles:
            handle.remove()
    order = list(reversed(range(count)))  # samples start at the last block
    starts = dict(zip(order, [start, *(marks[b] for b in order)], strict=False))
    return Watched(x, calls, [marks[b] - starts[b] for b in range(count)])


def jacobi_rows(network: FlowStack, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each method."""
    z = torch.randn(batch, *network.shape, generator=torch.Generator().manual_seed(2))
    classes = getattr(network, "num_classes", None)
    condition = Condition(label=torch.arange(batch) % classes) if classes else None
    found: dict[str, list[Watched]] = {name: [] for name in METHODS}

    def run(name: str) -> Callable[[], None]:
        return lambda: found[name].append(watched(network, z, condition, METHODS[name]))

    times = in_turns({name: run(name) for name in METHODS}, rounds)
    exact, rows = found[SEQUENTIAL][0].x, []
    for name, seen in found.items():
        blocks = [statistics.median(w.seconds[b] for w in seen[1:]) for b in range(len(network.blocks))]
        rows.append(
            {
                "batch": batch,
                "method": name,
                "passes": seen[0].passes,
                "milliseconds": [1e3 * seconds for seconds in blocks],
                "seconds": statistics.median(times[name].wall),
                "ratio": ratio(times[name].wall, times[SEQUENTIAL].wall),
                "cpu_ratio": ratio(times[name].cpu, times[SEQUENTIAL].cpu),
                **error(seen[0].x, exact),
            }
        )
    return rows


def missed_jacobi(rows: list[dict[str, Any]]) -> list[str]:
    """Bars of the methods of one batch that were not met."""
    found, batch = {row["method"]: row["cpu_ratio"] for row in rows}, rows[0]["batch"]
    jacobi = min(value for name, value in found.items() if name.startswith("Jacobi"))
    failed = [f"Jacobi at batch 1: {jacobi:.3f} of token by token"] if batch == 1 and jacobi >= 1 else []
    allowed = BARS["automatic"]
    slow = found["automatic"] > allowed
    return failed + ([f"automatic at batch {batch}: {found['automatic']:.3f} above {allowed:.3f}"] if slow else [])


# ---------------------------------------------------------------------- report


def trained(folder: Path | None) -> FlowStack:
    """The network of a folder; the demo network with random weights without one."""
    if folder is None:
        return demo()
    from lightning_flows import from_pretrained

    return from_pretrained(str(folder)).network.eval()


def report(published: list[dict[str, Any]], jacobi: list[dict[str, Any]]) -> str:
    """Both tables."""
    head = ("guidance", "", "seconds", "of published", "of CPU time", "of running", "error rms", "error max")
    rows = [
        (
            *(row["guidance"], row["contender"], f"{row['seconds']:.3f}"),
            *(f"{row[key]:.3f}" for key in ("ratio", "cpu_ratio", "of_running")),
            *(f"{row[key]:.1e}" for key in ("rms", "max")),
        )
        for row in published
    ]
    names = ("batch", "method", "passes of each block", "ms of each block", "seconds")
    names += ("of token by token", "of CPU time", "error rms", "error max")
    more = [
        (
            *(row["batch"], row["method"], " ".join(map(str, row["passes"]))),
            *(" ".join(f"{ms:.0f}" for ms in row["milliseconds"]), f"{row['seconds']:.4f}"),
            *(f"{row[key]:.3f}" for key in ("ratio", "cpu_ratio")),
            *(f"{row[key]:.1e}" for key in ("rms", "max")),
        )
        for row in jacobi
    ]
    return "\n\n".join(table(head, rows) for head, rows in ((head, rows), (names, more)) if rows)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--weights", type=Path, help="folder of a trained flow, for the second table")
    options.add_argument("--parts", nargs="+", choices=["published", "jacobi"], default=["published", "jacobi"])
    options.add_argument("--batch", type=int, default=128, help="images of the first table")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 128], help="of the second table")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=THREADS)
    options.add_argument("--eager", action="store_true", help="leave out what is compiled")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    return options.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    published: list[dict[str, Any]] = []
    jacobi: list[dict[str, Any]] = []
    failed: list[str] = []
    if "published" in given.parts:
        for scale in (1.0, SCALE):
            published += compare(demo(), given.batch, scale, given.rounds, not given.eager)
            failed += missed([row for row in published if row["guidance"] == scale])
    if "jacobi" in given.parts:
        network = trained(given.weights)
        for batch in given.batches:
            jacobi += jacobi_rows(network, batch, given.rounds)
            failed += missed_jacobi([row for row in jacobi if row["batch"] == batch])
    text = report(published, jacobi)
    show(text)
    settings = {"threads": given.threads, "rounds": given.rounds, "torch": torch.__version__, "bars": BARS}
    settings["weights"] = None if given.weights is None else given.weights.name
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "flow_sampling-cpu.md").write_text(f"# Sampling of flows\n\n{settings}\n\n{text}\n")
    file = given.json or given.out / "flow_sampling-cpu.json"
    finish({"settings": settings, "published": published, "jacobi": jacobi}, failed, file)


if __name__ == "__main__":
    main()
