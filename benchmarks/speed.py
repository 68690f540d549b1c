"""Speed and memory of the networks, family by family and size by size: one command, one table.

    python -m benchmarks.speed                          # this machine's accelerator, else its CPU at reduced batches
    python -m benchmarks.speed --device cuda --cases dit-b2 dit-xl2 --compile --batch fill

Every case runs in a process of its own, as a user runs it: Lightning's Trainer, `LatentFlowMatching`, AdamW and EMA, on
latents that lie in memory. Columns:

    steps/s, samples/s   training, after a warm-up, EMA and optimizer included
    utilisation          3 x (operations of one forward pass) x samples/s over the peak of the device; recomputed
                         activations do not count. The peak is that of a large matrix product in the same process and
                         precision, or ``--peak``
    memory               training: CUDA's peak of allocated memory; CPU: what the process grew by
    latency              one network call at batch 1, without gradients, median
    guided               Heun steps of a classifier-free guided sample (batch beside it), two network calls of twice the
                         batch each, per second

``--compile`` runs every case eager and compiled and adds the ratio; the loss after the warm-up must then agree to 1e-4
in float32. ``--batch fill`` doubles the batch until the memory is full. Results go to ``--out``, by default
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import finish, parser, show, table

RESULTS = Path(__file__).parent / "results"
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
CLASSES, GUIDANCE, TOLERANCE = 1000, 4.0, 1e-4
WARM_UP = 3


class Case(NamedTuple):
    """A network of a family.

    Attributes:
        family: of the module.
        what: the published configuration.
        network: makes it, on the current device.
        batch: training batch on a CPU, and on an accelerator.
    """

    family: str
    what: str
    network: Callable[[], nn.Module]
    batch: tuple[int, int]


def dit(size: str) -> nn.Module:
    from lightning_flows.networks import DiT

    return DiT.of_size(size, input_size=32, patch_size=2, num_classes=CLASSES, label_dropout=0.1)


def adm() -> nn.Module:
    """The U-Net of LFM's CelebA-HQ 256 run, with classes."""
    from lightning_flows.networks import ADMUNet

    return ADMUNet(
        input_size=32,
        hidden_size=256,
        channel_mult=(1, 2, 2, 2),
        num_blocks=2,
        attention_factors=(8,),
        num_heads=4,
        num_classes=CLASSES,
        label_dropout=0.1,
    )


CASES = {
    "dit-s2": Case("latent flow matching", "DiT-S/2, 4x32x32", functools.partial(dit, "S"), (4, 256)),
    "dit-b2": Case("latent flow matching", "DiT-B/2, 4x32x32", functools.partial(dit, "B"), (2, 256)),
    "dit-l2": Case("latent flow matching", "DiT-L/2, 4x32x32", functools.partial(dit, "L"), (1, 128)),
    "dit-xl2": Case("latent flow matching", "DiT-XL/2, 4x32x32", functools.partial(dit, "XL"), (1, 128)),
    "adm-256": Case("latent flow matching", "ADM U-Net 256, 4x32x32", adm, (1, 128)),
}
ON_CPU = ("dit-s2", "dit-b2", "adm-256")


# ---------------------------------------------------------------------- one case, in a process of its own


class Setting(NamedTuple):
    """What a worker is asked for; see the options of the command."""

    case: str
    device: str
    precision: str
    compiled: bool
    batch: int
    steps: int
    solver_steps: int
    peak: float


def work(asked: Setting) -> dict[str, Any]:
    """All figures of one case."""
    case, device = CASES[asked.case], torch.device(asked.device)
    forward, before = operations(case), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    module = make(case, device)
    parameters = sum(p.numel() for p in module.network.parameters())
    seconds, loss = train(module, asked)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else grown
    module = module.to(device).eval()
    samples, peak = asked.batch / seconds, asked.peak or matrix_peak(device, DTYPES[asked.precision])
    return {
        **asked._asdict(), "family": case.family, "what": case.what, "parameters": parameters,
        "forward_flops": forward, "seconds_per_step": seconds, "samples_per_second": samples, "loss": loss,
        "memory_bytes": memory, "peak_flops": peak, "utilisation": 3 * forward * samples / peak,
        "latency_seconds": latency(module, device, asked), "heun_seconds": guided(module, device, asked),
    }  # fmt: skip


def operations(case: Case) -> int:
    """Operations of one forward pass of one sample, a product and a sum counted as two."""
    with torch.device("meta"):
        network = case.network()
        x, t, condition = inputs(network, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        network(x, t, condition)
    return counter.get_total_flops()


def inputs(network: nn.Module, n: int, device: torch.device) -> tuple[Tensor, Tensor, Any]:
    from lightning_flows.flow import Condition

    x = torch.randn(n, *network.shape, device=device)
    return x, torch.rand(n, device=device), Condition(label=torch.arange(n, device=device) % CLASSES)


def make(case: Case, device: torch.device) -> Any:
    from lightning_flows.flow import Heun
    from lightning_flows.modules import LatentFlowMatching

    optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    return LatentFlowMatching(network=case.network(), solver=Heun(), optimizer=optimizer)


def train(module: Any, asked: Setting) -> tuple[float, float]:
    """Median seconds of a step, and the loss of the first step after the warm-up."""
    import lightning as L

    from lightning_flows.callbacks import EMA, Compile

    generator = torch.Generator().manual_seed(1)
    batch = {
        "latent": torch.randn(asked.batch, *module.network.shape, generator=generator),
        "label": torch.arange(asked.batch) % CLASSES,
    }
    marks = marks_of(asked.device)
    compiled = [Compile(backend="inductor")] if asked.compiled else []
    count = WARM_UP + asked.steps
    trainer = L.Trainer(
        accelerator=torch.device(asked.device).type.replace("cuda", "gpu"), devices=1, max_steps=count, max_epochs=-1,
        precision=asked.precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMA(0.9999), *compiled, marks],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch] * count, batch_size=None))
    taken = [b - a for a, b in zip(marks.times, marks.times[1:], strict=False)][WARM_UP - 1 :]
    return statistics.median(taken), marks.losses[WARM_UP]


def marks_of(device: str) -> Any:
    import lightning as L

    class Marks(L.Callback):
        """When every batch was done, and its loss."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            wait(torch.device(device))
            self.times.append(time.perf_counter())
            self.losses.append(outputs["loss"].item())

    return Marks()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, after two to warm up."""
    taken = []
    for k in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        taken += [time.perf_counter() - start] if k >= 2 else []
    return statistics.median(taken)


def latency(module: Any, device: torch.device, asked: Setting) -> float:
    """Seconds of one network call at batch 1."""
    x, t, condition = inputs(module.network, 1, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bf16-mixed"):
        return timed(lambda: module.network(x, t, condition), device, rounds=9)


def guided(module: Any, device: torch.device, asked: Setting) -> float:
    """Seconds of one guided Heun step of a batch; with ``compiled`` each evaluation of the guided field is compiled."""
    from lightning_flows.flow import Condition
    from lightning_flows.flow.fields import evaluate

    if asked.compiled:
        module.compiled_evaluate = torch.compile(evaluate)
    condition = Condition(label=torch.arange(asked.batch, device=device) % CLASSES)
    options = {"seed": 0, "steps": asked.solver_steps, "guidance": GUIDANCE}
    with torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bf16-mixed"):
        seconds = timed(lambda: module.sample(condition, **options), device, rounds=3)
    return seconds / asked.solver_steps


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, rounds=9)


# ---------------------------------------------------------------------- all cases


def settings(given: Any) -> list[Setting]:
    on_gpu = given.device.startswith("cuda")
    names = given.cases or (list(CASES) if on_gpu else list(ON_CPU))
    precision = given.precision or ("bf16-mixed" if on_gpu else "32-true")
    made = []
    for name in names:
        size = CASES[name].batch[on_gpu] if given.batch in (None, "fill") else int(given.batch)
        for compiled in (False, True) if given.compile else (False,):
            steps = given.steps or (20 if on_gpu else 3)
            solver_steps = given.solver_steps or (25 if on_gpu else 1)
            made.append(Setting(name, given.device, precision, compiled, size, steps, solver_steps, given.peak))
    return made


def run(asked: Setting) -> dict[str, Any] | None:
    """The figures of a worker; None where it ran out of memory.

    Raises:
        RuntimeError: it failed otherwise.
    """
    command = [sys.executable, "-m", "benchmarks.speed", "--worker", json.dumps(asked._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f"{asked}: {done.stderr[-2000:]}")


def fill(asked: Setting) -> dict[str, Any] | None:
    """The figures of the largest batch (a power of two times that of the case) that the memory holds."""
    best = None
    while (found := run(asked)) is not None:
        best, asked = found, asked._replace(batch=2 * asked.batch)
    return best


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on and with."""
    from importlib.metadata import version

    cpu = next((line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name")), "CPU")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    return {
        "device": name, "threads": str(torch.get_num_threads()), "system": platform.system(),
        "python": platform.python_version(), **{p: version(p) for p in ("torch", "lightning", "lightning-flows")},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def cpu_info() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else [f"model name: {platform.processor()}"]


HEAD = ("case", "parameters", "forward GFLOP", "precision", "mode", "batch", "steps/s", "samples/s", "utilisation",
        "memory (GB)", "latency (ms)", "guided Heun steps/s")  # fmt: skip


def row(found: dict[str, Any]) -> list[str]:
    return [
        found["what"], f"{found['parameters'] / 1e6:.1f} M", f"{found['forward_flops'] / 1e9:.1f}", found["precision"],
        "compiled" if found["compiled"] else "eager", str(found["batch"]), f"{1 / found['seconds_per_step']:.3g}",
        f"{found['samples_per_second']:.3g}", f"{found['utilisation']:.2f}", f"{found['memory_bytes'] / 1e9:.2f}",
        f"{1e3 * found['latency_seconds']:.3g}", f"{1 / found['heun_seconds']:.3g}",
    ]  # fmt: skip


def ratios(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compiled over eager speed of each case that was run in both modes at one batch."""
    pairs = {name: {f["compiled"]: f for f in found if f["case"] == name} for name in {f["case"] for f in found}}
    return {
        name: {
            "training": pair[False]["seconds_per_step"] / pair[True]["seconds_per_step"],
            "guided sampling": pair[False]["heun_seconds"] / pair[True]["heun_seconds"],
            "loss": abs(pair[True]["loss"] - pair[False]["loss"]) / abs(pair[False]["loss"]),
        }
        for name, pair in pairs.items()
        if len(pair) == 2 and pair[False]["batch"] == pair[True]["batch"]
    }


def report(found: list[dict[str, Any]], where: dict[str, str], compared: dict[str, dict[str, float]]) -> str:
    text = f"# Speed on {where['device']}\n\n" + ", ".join(f"{k} {v}" for k, v in where.items() if k != "device")
    text += (
        f", peak {found[0]['peak_flops'] / 1e12:.3g} TFLOP/s.\n`python -m benchmarks.speed` says what the columns are."
    )
    for family in dict.fromkeys(f["family"] for f in found):
        text += f"\n\n## {family}\n\n" + table(HEAD, [row(f) for f in found if f["family"] == family])
    for name, values in compared.items():
        text += f"\n\n{name}, compiled over eager: " + ", ".join(
            f"{k} {v:.3g}" for k, v in values.items() if k != "loss"
        )
    return text + "\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--cases", nargs="+", choices=list(CASES))
    options.add_argument("--precision", choices=list(DTYPES), help="bf16-mixed on an accelerator, 32-true on a CPU")
    options.add_argument("--compile", action="store_true", help="every case eager and compiled")
    options.add_argument("--batch", help="a number, or fill; by default that of the case")
    options.add_argument("--steps", type=int, default=0, help="timed training steps")
    options.add_argument("--solver-steps", type=int, default=0, help="Heun steps of a guided sample")
    options.add_argument("--peak", type=float, default=0.0, help="operations per second that count as 1")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        quiet()
        show(json.dumps(work(Setting(**json.loads(given.worker)))))
        return
    found = [f for asked in settings(given) if (f := (fill if given.batch == "fill" else run)(asked)) is not None]
    where, compared = machine(given.device), ratios(found)
    text = report(found, where, compared)
    show(text)
    given.out.mkdir(parents=True, exist_ok=True)
    stem = "speed-cuda" if given.device.startswith("cuda") else "speed-cpu"
    (given.out / f"{stem}.md").write_text(text)
    figures = {"machine": where, "cases": found, "compiled_over_eager": compared}
    (given.out / f"{stem}.json").write_text(json.dumps(figures, indent=2) + "\n")
    far = [f"{n}: losses differ by {v['loss']:.1e}" for n, v in compared.items() if v["loss"] > limit(given, found)]
    finish(figures, far, given.json)


def limit(given: Any, found: list[dict[str, Any]]) -> float:
    """How far the losses may be apart: rounding in 16 bits takes another way when kernels are fused."""
    return TOLERANCE if found[0]["precision"] == "32-true" else 0.02


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
