"""Kill a small training run again and again at random moments: the last of it equals a run that nobody disturbed.

    python -m benchmarks.kills --kills 20 --workers 0
    python -m benchmarks.kills --kills 20 --workers 2

A reduced digits recipe (flow matching with EMA, validation twice an epoch, a checkpoint every three steps) is run by
the command line, killed (SIGKILL to the process and its data workers) at a random moment between its start and its
end, and started again with the same command (``--ckpt_path auto``). Then the last checkpoint of both runs is compared,
bit for bit: weights, average, optimizer, schedule, step and place in the data.

The processes are forked from a server that has imported everything once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_flows.cli.trainer import run
from lightning_flows.strategies import newest_checkpoint

RECIPE = Path(__file__).parents[1] / "configs/lfm/digits.yaml"
COMMAND = ("fit", "-c", "kills.yaml", "--ckpt_path", "auto")
PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
EVERY = 3  # steps between checkpoints
LIMIT = 120  # seconds that one start may take


class Moments(Callback):
    """Notes the steps of this start (one byte each in the file ``started``), and kills its own process on demand.

    The environment variable ``KILL_AT`` is ``MOMENT:STEP``; moments are ``step`` (a batch of training), ``validation``
    (with the average in the module), ``write`` (half of a checkpoint is written), ``remove`` (a checkpoint is written,
    the former one not removed yet), ``link`` (``last.ckpt`` is gone, and its new link not there yet).
    """

    def __init__(self) -> None:
        self.moment, _, step = os.environ.get("KILL_AT", "").partition(":")
        self.step = int(step or 0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        if self.moment == "write":
            self._before(torch, "save", half=True)
        elif self.moment == "link":
            self._before(os, "symlink")
        elif self.moment == "remove":
            self._before(trainer.strategy, "remove_checkpoint")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        with Path("started").open("a") as file:
            file.write(".")
        self._kill_if("step")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._kill_if("validation")

    def _kill_if(self, moment: str) -> None:
        if self.moment == moment and self.trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def _before(self, owner: Any, name: str, half: bool = False) -> None:
        """Put a kill before a call of a function; ``half``: after half of what it writes."""
        original = getattr(owner, name)

        def killing(*args: Any, **kwargs: Any) -> Any:
            if self.trainer.global_step < self.step:
                return original(*args, **kwargs)
            if half:
                original(*args, **kwargs)
                stream = args[1]
                stream.truncate(stream.tell() // 2)
                stream.flush()
            return os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, killing)


def recipe(steps: int, workers: int, **checkpoint: Any) -> dict[str, Any]:
    """The digits recipe for a machine that has a few seconds."""
    content = yaml.safe_load(RECIPE.read_text())
    model, trainer = content["model"]["init_args"], content["trainer"]
    model["network"]["init_args"] |= {"hidden_size": 16, "depth": 1, "num_heads": 2}
    model["lr_scheduler"]["init_args"] |= {"total_steps": steps, "warmup_steps": 5}
    content["data"]["init_args"] |= {"num_workers": workers, "val_fraction": 0.2, "test_fraction": 0.1}
    ema, *_, save = trainer["callbacks"]
    save["init_args"] |= {"every_n_train_steps": EVERY, **checkpoint}
    trainer |= {
        "max_epochs": -1,
        "max_steps": steps,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 0.5,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [ema, save, {"class_path": "benchmarks.kills.Moments"}],
    }
    return content


def prepare(folder: Path, content: dict[str, Any]) -> Path:
    """A working folder with the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kills.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def _train(folder: str, command: tuple[str, ...], kill_at: str) -> None:
    """What a started process does: the command, in a process group of its own, its output in ``output.txt``."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["KILL_AT"] = kill_at
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers: else a server of their own
    run(list(command))


def start(folder: Path, command: tuple[str, ...] = COMMAND, kill_at: str = "") -> Any:
    """A process that runs the command in ``folder``."""
    context = multiprocessing.get_context("forkserver")  # not fork: this process may have computed in several threads
    context.set_forkserver_preload(["benchmarks.kills"])
    (folder / "started").unlink(missing_ok=True)
    from benchmarks.kills import _train as target  # by its importable name, also when this is the main module

    process = context.Process(target=target, args=(str(folder), command, kill_at))
    process.start()
    return process


def finish(folder: Path, **options: Any) -> int:
    """Run the command to its end (or to the moment at which it kills itself); its exit code."""
    process = start(folder, **options)
    process.join(LIMIT)
    if process.exitcode is None:
        _kill(process)
        raise TimeoutError(f"the run in {folder} hangs: {output(folder)}")
    return process.exitcode


def output(folder: Path) -> str:
    """The end of what the processes said."""
    file = folder / "output.txt"
    return file.read_text()[-2000:] if file.exists() else ""


def complete(folder: Path) -> None:
    """Run to the end.

    Raises:
        RuntimeError: it failed.
    """
    if code := finish(folder):
        raise RuntimeError(f"the run in {folder} ended with {code}: {output(folder)}")


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        process.kill()
    process.join()


def steps_of(folder: Path) -> int:
    """Steps that the present start has begun."""
    file = folder / "started"
    return file.stat().st_size if file.exists() else 0


def kill_at_random(folder: Path, most: int, chance: random.Random) -> str:
    """Start the command and kill it; where it was.

    Args:
        folder: of the run.
        most: steps after which it is killed at the latest.
        chance: chooses the step, and up to 50 ms after its beginning; one in eight kills comes before the training.
    """
    before, process = chance.random() < 0.125, start(folder)
    step, delay, since = chance.randint(1, most), chance.uniform(0, 1 if before else 0.05), time.monotonic()
    while not before and steps_of(folder) < step and process.is_alive():
        if time.monotonic() - since > LIMIT:
            raise TimeoutError(f"the run in {folder} does not go on: {output(folder)}")
        time.sleep(0.002)
    time.sleep(delay)
    if not process.is_alive():
        process.join()
        return "finished" if process.exitcode == 0 else f"failed: {output(folder)}"
    _kill(process)
    written = any((folder / "runs/kills/checkpoints").glob(".*.partial"))
    return "in a checkpoint" if written else "in training" if steps_of(folder) else "before"


def differences(a: Any, b: Any, where: str) -> list[str]:
    """Places at which two nested values differ in a single bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [where]
    if isinstance(a, dict):
        keys = [] if a.keys() == b.keys() else [f"{where}: keys"]
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        pairs = itertools.zip_longest(a, b)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} and {b}"]


def _place(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Where a run is in its data: epoch and batch.

    The trainer's own number of the epoch is left out: Lightning, bounded by ``max_steps``, counts one epoch without
    batches when it resumes from a checkpoint of an epoch's end (see `lightning_flows.data.KeyedLoader`).
    """
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return [{name: value for name, value in loader.items() if name != "trainer_epoch"} for loader in loaders]


def compare(one: Path, other: Path) -> list[str]:
    """What differs between the last checkpoints of two runs."""
    first, second = (
        torch.load(newest_checkpoint(folder / "runs/kills/checkpoints") or "", weights_only=True)
        for folder in (one, other)
    )
    place = [_place(state) for state in (first, second)]
    found = [d for part in PARTS for d in differences(first[part], second[part], part)]
    return found + differences(*place, "place in the data")


def experiment(folder: Path, kills: int, workers: int, steps: int, seed: int) -> dict[str, Any]:
    """An undisturbed run and a killed one; what happened, and what differs.

    Raises:
        RuntimeError: a run failed by itself.
    """
    content = recipe(steps, workers)
    whole, killed = (prepare(folder / name, content) for name in ("whole", "killed"))
    complete(whole)
    chance, most = random.Random(seed), max(1, round(1.5 * steps / kills))  # three quarters of the run on the average
    moments = [kill_at_random(killed, most, chance) for _ in range(kills)]
    if failed := [moment for moment in moments if moment.startswith("failed")]:
        raise RuntimeError(failed[0])
    complete(killed)
    return {
        "kills": kills - moments.count("finished"),
        "moments": dict(Counter(moments)),
        "workers": workers,
        "steps": steps,
        "differences": compare(whole, killed),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning:runpy"  # the server knows this module already
    with tempfile.TemporaryDirectory() as folder:
        report = experiment(Path(folder), args.kills, args.workers, args.steps, args.seed)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
