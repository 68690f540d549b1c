"""Fits on two processes, of which only the second has a bad batch or gets a signal; started by `test_guard_ranks`."""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

import lightning_flows.strategies  # noqa: F401  "fsdp2"
from lightning_flows.callbacks import ActivationCheckpointing, Compile, GradientWatch, Preemption
from tests.callbacks.short_fit import short_fit

VALIDATE = {"limit_val_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}


class OnRankOne(Callback):
    """Does something at one call of one hook, on the second process."""

    def __init__(self, hook, call, act):
        self.calls, self.call, self.act = 0, call, act
        setattr(self, hook, self._count)

    def _count(self, trainer, module, *args):
        self.calls += 1
        if self.calls == self.call and trainer.global_rank == 1:
            self.act(*args)


def warn(*_):
    os.kill(os.getpid(), signal.SIGUSR1)


def spoil(batch, batch_idx):
    batch["image"].fill_(float("nan"))


def rank():
    return torch.distributed.get_rank()


def preempted(folder, *callbacks, **options):
    try:
        short_fit(folder, Preemption(), *callbacks, **options)
    except SystemExit as end:
        return end.code
    return None


def everything(root):
    torch.set_num_threads(1)
    report = {}
    for strategy in ("ddp", "fsdp2"):
        options = {"devices": 2, "strategy": strategy}
        watch = GradientWatch()
        losses, _, saved = short_fit(root / strategy, watch, **options)
        norms = watch.state_dict()["histories"][0]["good"]
        both = [ActivationCheckpointing(), Compile("blocks", backend="eager")]
        changed, _, other = short_fit(root / f"{strategy}-changed", *both, **options)
        report[strategy] = {"losses": losses, "norms": norms, "changed": changed}
        report[strategy]["states"] = [saved["current_model_state"], other["current_model_state"]]
    options["strategy"] = "ddp"
    watch = GradientWatch()
    _, module, _ = short_fit(root / "bad", watch, OnRankOne("on_train_batch_start", 2, spoil), **options)
    report["bad"] = {"skipped": watch.skipped, "weights": module.state_dict()}

    asked = OnRankOne("on_train_batch_start", 2, warn)
    codes = [preempted(root / "step", asked, **options)]
    during = OnRankOne("on_validation_batch_start", 1, warn)
    codes.append(preempted(root / "validation", during, **options, **VALIDATE))
    saved = [torch.load(root / name / "last.ckpt", weights_only=True) for name in ("step", "validation")]
    report["codes"], report["steps"] = codes, [s["global_step"] for s in saved]
    torch.distributed.barrier()
    _, _, rest = short_fit(root / "rest", ckpt_path=root / "step" / "last.ckpt", **options)
    _, _, rest2 = short_fit(root / "rest2", ckpt_path=root / "validation" / "last.ckpt", **options, **VALIDATE)
    report["ends"] = [r["current_model_state"] for r in (rest, rest2)]
    torch.save(report, root / f"report-{rank()}.pt")
    short_fit(root / "end", Preemption(), OnRankOne("on_train_batch_start", 2, warn), **options)


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
