"""A compiled training step and a compiled guided sampling step of a DiT beside the same steps uncompiled.

Training: forward, flow-matching loss, backward and AdamW from the same weights on the same batch,

    eager      as written
    blocks     `networks.compile_blocks`: what `callbacks.Compile("blocks")` does
    network    `networks.compile_network`: `callbacks.Compile("network")`

Sampling: Heun steps with classifier-free guidance (two evaluations a step, each of both branches in one batch),

    eager      as written
    sampling   `flow.fields.evaluate` compiled as a whole: `callbacks.Compile("sampling")`

All contenders take turns in the rounds of one process. A figure is the median over rounds of the ratio of the eager
time to the compiled one (above 1: compiled is faster). Times are CPU seconds on a CPU, with one thread, and seconds of
wall time on a GPU, which is waited for. Before the first round the losses of ``--check`` training steps and a sample
are compared: they must agree to 1e-4 in float32; in bfloat16 the gap is shown. On a GPU the arithmetic of the training
step is also set against the peak of the board: operations of the products in a forward and a backward pass, counted by
torch, over the seconds of a step.

    python -m benchmarks.compiled_step                                                    # a CPU, minutes
    python -m benchmarks.compiled_step --device cuda --size XL --batch 256 --sample-batch 64 --steps 25 --bf16
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from benchmarks.common import finish, parser, show, single_thread, table

single_thread()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from lightning_flows.callbacks.throughput import known_peak  # noqa: E402
from lightning_flows.flow import ClassifierFree, Condition, Field, Heun, Velocity  # noqa: E402
from lightning_flows.flow.fields import evaluate  # noqa: E402
from lightning_flows.networks import DIT_SIZES, DiT  # noqa: E402
from lightning_flows.networks.parallel import compile_blocks, compile_network  # noqa: E402

CLASSES, SIDE, CHANNELS = 1000, 32, 4
TOLERANCE = 1e-4  # relative, float32


def network(size: str, depth: int | None) -> DiT:
    """DiT of a published width whose gates are open, so that every part of it counts."""
    sizes = {**DIT_SIZES[size], **({"depth": depth} if depth else {})}
    made = DiT(SIDE, patch_size=2, in_channels=CHANNELS, num_classes=CLASSES, label_dropout=0.1, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


class Training:
    """A network with its optimizer and one batch."""

    def __init__(self, network: DiT, batch: tuple[Tensor, ...], bf16: bool) -> None:
        self.network, self.batch, self.bf16 = network, batch, bf16
        fused = batch[0].is_cuda
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=fused or None)
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        x, t, label, target = self.batch
        with autocast(x.device, self.bf16):
            output = self.network(x, t, Condition(label=label))
        loss = F.mse_loss(output.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())


class Sampling:
    """A solver with a guided field."""

    def __init__(self, network: DiT, x: Tensor, label: Tensor, steps: int, scale: float, bf16: bool) -> None:
        self.network, self.x, self.condition = network, x, Condition(label=label)
        self.steps, self.scale, self.bf16 = steps, scale, bf16
        self.compiled: Callable[..., Tensor] | None = None
        self.sample = x

    @torch.no_grad()
    def __call__(self) -> None:
        field = Field(Velocity(self.network), self.condition, ClassifierFree(self.scale), compiled=self.compiled)
        grid = torch.linspace(0, 1, self.steps + 1, device=self.x.device)
        with autocast(self.x.device, self.bf16):
            self.sample = Heun().solve(field, self.x, grid).x


def autocast(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(contenders: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in an order that rotates; all are warm."""
    names, seconds = list(contenders), {name: [] for name in contenders}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = clock(device)
            contenders[name]()
            seconds[name].append(clock(device) - start)
    return seconds


def speedups(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median seconds, and the median ratio of the eager time to a contender's."""
    eager = seconds["eager"]
    return {
        name: {
            "seconds": statistics.median(own),
            "speedup": statistics.median(e / o for e, o in zip(eager, own, strict=True)),
        }
        for name, own in seconds.items()
    }


def training_contenders(made: DiT, batch: tuple[Tensor, ...], given: Any) -> dict[str, Training]:
    contenders = {"eager": Training(made, batch, given.bf16)}
    for name, change in (("blocks", compile_blocks), ("network", compile_network)):
        if name in given.parts:
            twin = copy.deepcopy(made)
            change(twin, mode=given.mode)
            contenders[name] = Training(twin, batch, given.bf16)
    return contenders


def loss_gap(contenders: dict[str, Training], steps: int) -> float:
    """Largest relative difference between an eager and a compiled loss, over some steps from the same weights."""
    for contender in contenders.values():
        for _ in range(steps):
            contender()
    losses = {name: torch.stack(contender.losses) for name, contender in contenders.items()}
    return max(float(((own - losses["eager"]) / losses["eager"]).abs().max()) for own in losses.values())


def operations(step: Training) -> int:
    """Operations of the products of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def sampling_contenders(made: DiT, given: Any, device: torch.device) -> tuple[dict[str, Sampling], float]:
    """The two contenders, warm, and the largest difference of their samples relative to the largest value."""
    x = torch.randn(given.sample_batch, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).to(device)
    label = (torch.arange(given.sample_batch) * 7 % CLASSES).to(device)
    arguments = (x, label, given.steps, given.scale, given.bf16)
    contenders = {name: Sampling(made, *arguments) for name in ("eager", "sampling")}
    contenders["sampling"].compiled = torch.compile(evaluate, mode=given.mode)
    for contender in contenders.values():
        contender()
    expected = contenders["eager"].sample
    return contenders, float((contenders["sampling"].sample - expected).abs().max() / expected.abs().max())


def batch_of(size: int, device: torch.device) -> tuple[Tensor, ...]:
    """(x_t, t, label, velocity) of a flow-matching step."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(size, CHANNELS, SIDE, SIDE, generator=generator) for _ in range(2))
    t = torch.rand(size, generator=generator)
    s = t[:, None, None, None]
    parts = (s * x1 + (1 - s) * x0, t, torch.arange(size) * 7 % CLASSES, x1 - x0)
    return tuple(part.to(device) for part in parts)


def arguments() -> Any:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--size", choices=list(DIT_SIZES), default="S")
    options.add_argument("--depth", type=int, help="blocks; those of the size by default, 3 on a CPU")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--sample-batch", type=int, default=4)
    options.add_argument("--steps", type=int, default=2, help="Heun steps of a sample")
    options.add_argument("--scale", type=float, default=1.5, help="of the guidance")
    options.add_argument("--parts", nargs="*", default=["blocks", "network", "sampling"], help="which are measured")
    options.add_argument("--mode", help="of torch.compile")
    options.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--check", type=int, default=3, help="training steps whose losses are compared")
    given = options.parse_args()
    if given.device == "cpu" and given.depth is None:
        given.depth = 3
    return given


def main() -> None:
    given = arguments()
    device = torch.device(given.device)
    made, figures, gaps = network(given.size, given.depth).to(device), {}, {}
    if {"blocks", "network"} & set(given.parts):
        contenders = training_contenders(made, batch_of(given.batch, device), given)
        gaps["loss"] = loss_gap(contenders, given.check)
        figures["training"] = speedups(measure(contenders, given.rounds, device))
        if peak := known_peak(device):
            work = operations(contenders["eager"])
            for row in figures["training"].values():
                row["utilisation"] = work / row["seconds"] / peak
        del contenders
    if "sampling" in given.parts:
        pair, gaps["sample"] = sampling_contenders(made, given, device)
        figures["sampling"] = speedups(measure(pair, given.rounds, device))
    rows = [
        (step, name, f"{row['seconds']:.4g}", f"{row['speedup']:.3f}", f"{row.get('utilisation', float('nan')):.3f}")
        for step, found in figures.items()
        for name, row in found.items()
    ]
    show(table(("step", "", "seconds", "speed over eager", "utilisation"), rows))
    show(", ".join(f"largest relative gap of the {name}: {gap:.1e}" for name, gap in gaps.items()))
    failed = [f"{name} differs by {gap:.1e}" for name, gap in gaps.items() if gap > TOLERANCE and not given.bf16]
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    settings |= {"torch": torch.__version__, "hardware": hardware}
    finish({"settings": settings, "gaps": gaps, **figures}, failed, given.json)


if __name__ == "__main__":
    main()
