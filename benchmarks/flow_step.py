"""A training step of the MNIST demo TARFlow (batch 128) beside the same step as it was published.

Three contenders take the same step - noise on the images, forward, likelihood, backward, AdamW - from the same weights,
in turn, over many rounds of one process on two threads of a CPU:

    published   float32; `benchmarks.published_flow` and an AdamW that is not fused
    ours        float32; `flow.MaximumLikelihood` over `networks.TARFlow`, with the fused AdamW of our recipes
    mixed       ours under bfloat16 autocast, which is what Lightning's precision ``bf16-mixed`` is

Before anything is timed the first two must give the same loss of the same noisy images. The figures are ratios of two
wall times of the same round, and the median of them over rounds; beside them stands the ratio of CPU times, which
neighbours disturb less. Bars: ours / published at most 1.05, mixed / published at most 0.85; the second where the
processor multiplies bfloat16 (AVX512-BF16 or AMX). ``--parts`` also shows forward, backward and optimizer.

    python -m benchmarks.flow_step
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.common import STEP_PARTS, finish, measure, parser, ratio, show, table

THREADS = 2
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.published_flow import PublishedTARFlow, published_loss  # noqa: E402
from lightning_flows.flow import Condition, GaussianNoise, MaximumLikelihood, StepNoise  # noqa: E402
from lightning_flows.networks import TARFlow  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DEMO = {"patch_size": 4, "in_channels": 1, "hidden_size": 128, "num_blocks": 4, "depth": 4, "num_classes": 10}
BARS = {"ours": 1.05, "mixed": 0.85}
DEVIATION = 0.1  # of the noise on the images


class Contender:
    """A network with its optimizer, and the seconds that its steps took."""

    def __init__(self, network: nn.Module, x: Tensor, label: Tensor, *, mixed: bool = False, fused: bool) -> None:
        self.network, self.x, self.label, self.mixed = network, x, label, mixed
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=fused or None
        )
        self.objective = MaximumLikelihood(GaussianNoise(DEVIATION))
        self.steps = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in STEP_PARTS}

    def loss(self) -> Tensor:
        """Of this step's noisy images."""
        if isinstance(self.network, PublishedTARFlow):
            return published_loss(self.network, self.x + DEVIATION * torch.randn_like(self.x), self.label)
        noise = StepNoise(0, self.steps)
        return self.objective(self.network, self.x, Condition(label=self.label), noise).loss.mean()

    def step(self) -> None:
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16) if self.mixed else nullcontext():
            loss = self.loss()
        marks.append(time.perf_counter())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        self.steps += 1
        for name, start, end in zip(STEP_PARTS, marks, marks[1:], strict=False):
            self.parts[name].append(end - start)

    def timed(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def network(**sizes: Any) -> TARFlow:
    """The demo network, with outputs that depend on their inputs."""
    torch.manual_seed(0)
    made = TARFlow(**{"input_size": 28, **DEMO, **sizes})
    for block in made.stack:
        nn.init.normal_(block.proj_out.weight, std=0.02)
    return made


def losses(ours: TARFlow, published: PublishedTARFlow, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses of the same images."""
    found = MaximumLikelihood(GaussianNoise(0.0))(ours, x, Condition(label=label), StepNoise(0, 0))
    return found.loss.mean(), published_loss(published, x, label)


def contenders(made: TARFlow, batch: int, mixed: bool) -> dict[str, Contender]:
    """From the same weights, on the same images."""
    x = torch.rand(batch, *made.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    label = torch.arange(batch) % (made.num_classes or 1)
    published = PublishedTARFlow(made)
    ours, theirs = losses(made, published, x, label)
    ours, theirs = ours.detach(), theirs.detach()
    if abs(float(ours) - float(theirs)) > 1e-5 * abs(float(theirs)):
        raise RuntimeError(f"losses {float(ours)} and {float(theirs)}: the two networks are not the same")
    found = {
        "published": Contender(published, x, label, fused=False),
        "ours": Contender(copy.deepcopy(made), x, label, fused=True),
    }
    if mixed:
        found["mixed"] = Contender(copy.deepcopy(made), x, label, fused=True, mixed=True)
    return found


def figures_of(made: dict[str, Contender]) -> dict[str, dict[str, float]]:
    bare = made["published"]
    return {
        name: {
            "seconds": statistics.median(own.wall),
            "ratio": ratio(own.wall, bare.wall),
            "cpu": ratio(own.cpu, bare.cpu),
            **{part: statistics.median(taken) for part, taken in own.parts.items()},
        }
        for name, own in made.items()
    }


def report(figures: dict[str, dict[str, float]], parts: bool) -> str:
    """The table; with the milliseconds of each part of a step where asked."""
    names = STEP_PARTS if parts else ()
    head = ("", "seconds", "of published", "of CPU time", *(f"{part} (ms)" for part in names))
    rows = [
        (name, f"{f['seconds']:.4f}", f"{f['ratio']:.3f}", f"{f['cpu']:.3f}", *(f"{1e3 * f[p]:.1f}" for p in names))
        for name, f in figures.items()
    ]
    return table(head, rows)


def missed(figures: dict[str, dict[str, float]]) -> list[str]:
    """Bars that were not met."""
    return [
        f"{name}: {figures[name]['ratio']:.3f} above {bar}"
        for name, bar in BARS.items()
        if name in figures and figures[name]["ratio"] > bar
    ]


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15, help="steps of each contender")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--threads", type=int, default=THREADS)
    options.add_argument("--mixed", action="store_true", help="bf16-mixed also where it is emulated")
    options.add_argument("--parts", action="store_true", help="also show forward, backward and optimizer")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    return options.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    made = contenders(network(), given.batch, native or given.mixed)
    measure(made, given.rounds)
    figures = figures_of(made)
    text = report(figures, given.parts)
    show(text)
    if not native:
        show("bf16-mixed has no bar here: this processor has no instructions for bfloat16")
    settings = {"batch": given.batch, "rounds": given.rounds, "threads": given.threads, "torch": torch.__version__}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "flow_step-cpu.md").write_text(f"# A training step of TARFlow\n\n{settings}\n\n{text}\n")
    asked = {name: f for name, f in figures.items() if native or name != "mixed"}
    settings |= {"bars": BARS, "native_bfloat16": native}
    finish({"settings": settings, **figures}, missed(asked), given.json or given.out / "flow_step-cpu.json")


if __name__ == "__main__":
    main()
