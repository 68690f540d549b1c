"""A training step of `LatentFlowMatching` beside the same network and loss in a bare LightningModule.

Both are fitted by Lightning's Trainer on the digits (batch 128, the network of configs/lfm/digits.yaml), both
with and both without a moving average. A step lasts from one `on_train_batch_start` to the next: fetching the
batch, loss, backward, optimizer, logging and callbacks. Contenders take turns over many rounds of one process
on a single thread; the figure is CPU time of the process, the bar is a ratio of medians of at most 1.05.

    python -m benchmarks.training_step --json training_step.json
"""

from __future__ import annotations

import functools
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

from benchmarks.common import finish, parser, show, single_thread, table

single_thread()

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

from lightning_flows.callbacks import EMA  # noqa: E402
from lightning_flows.data import Digits  # noqa: E402
from lightning_flows.flow import Condition  # noqa: E402
from lightning_flows.modules import LatentFlowMatching  # noqa: E402
from lightning_flows.networks import DiT  # noqa: E402

BAR = 1.05
BATCH = 128
WARMUP = 2  # steps of a fit that are not counted


def network() -> DiT:
    return DiT(
        8,
        in_channels=1,
        hidden_size=128,
        depth=5,
        num_heads=4,
        num_classes=10,
        label_dropout=0.1,
        time_scale=1000.0,
    )


class Bare(L.LightningModule):
    """Flow matching in a dozen lines."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x1, label = batch["image"], batch["label"]
        x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
        s = t[:, None, None, None]
        kept = torch.rand(len(x1), device=x1.device) >= 0.1
        output = self.network(s * x1 + (1 - s) * x0, t, Condition(label=label, present={"label": kept}))
        loss = (output - (x1 - x0)).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def ours() -> LatentFlowMatching:
    return LatentFlowMatching(network=network(), optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))


class Marks(Callback):
    """CPU time of the process at the start of every step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.process_time())


class Contender:
    """One module that is fitted again and again, and the CPU seconds of its steps by round."""

    def __init__(self, module: L.LightningModule, ema: bool) -> None:
        self.module, self.ema = module, ema
        self.rounds: list[list[float]] = []

    def fit(self, steps: int, folder: str) -> None:
        marks = Marks()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=steps + WARMUP + 1, max_epochs=-1,
            default_root_dir=folder, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False,
            callbacks=[*([EMA(decay=0.995)] if self.ema else []), marks],
        )  # fmt: skip
        trainer.fit(self.module, Digits(batch_size=BATCH))
        taken = [b - a for a, b in zip(marks.marks, marks.marks[1:], strict=False)]
        self.rounds.append(taken[WARMUP:])

    @property
    def median(self) -> float:
        return statistics.median(second for taken in self.rounds for second in taken)


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Medians in seconds and their ratios, with and without EMA."""
    made = {
        (name, ema): Contender(Bare() if name == "bare" else ours(), ema)
        for ema in (False, True)
        for name in ("bare", "ours")
    }
    with tempfile.TemporaryDirectory() as folder:
        for k in range(rounds):
            order = list(made.values())
            for contender in order if k % 2 == 0 else order[::-1]:
                contender.fit(steps, folder)
    return {_name(ema): _compare(made["bare", ema], made["ours", ema]) for ema in (False, True)}


def _name(ema: bool) -> str:
    return "with EMA" if ema else "without EMA"


def _compare(bare: Contender, own: Contender) -> dict[str, float]:
    pairs = zip(own.rounds, bare.rounds, strict=True)
    by_round = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    return {
        "bare_seconds": bare.median,
        "ours_seconds": own.median,
        "ratio": own.median / bare.median,
        "ratio_by_round": statistics.median(by_round),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=6, help="fits of each contender")
    options.add_argument("--steps", type=int, default=8, help="counted steps of a fit")
    given = options.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    L.seed_everything(0, verbose=False)
    figures = measure(given.rounds, given.steps)
    head = ("", "bare (ms)", "ours (ms)", "ratio of medians", "median ratio of a round")
    show(table(head, [_row(name, found) for name, found in figures.items()]))
    failed = [f"{name}: ratio {f['ratio']:.3f} above {BAR}" for name, f in figures.items() if f["ratio"] > BAR]
    settings = {"batch": BATCH, "rounds": given.rounds, "steps": given.steps, "threads": 1, "bar": BAR}
    finish({"settings": settings, **figures}, failed, given.json)


def _row(name: str, found: dict[str, float]) -> tuple[str, ...]:
    bare, own = (f"{1e3 * found[key]:.1f}" for key in ("bare_seconds", "ours_seconds"))
    return name, bare, own, f"{found['ratio']:.3f}", f"{found['ratio_by_round']:.3f}"


if __name__ == "__main__":
    main()
