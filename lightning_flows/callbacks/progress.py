"""Progress over the steps of a sampling run, alone or on a line below Lightning's own bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import rich
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]
"""Called by `sample(..., progress=report)` after each solver step with (steps done, steps in all)."""


@contextmanager
def sampling_progress(total: int, description: str = "sampling", *, console: Console | None = None) -> Iterator[Report]:
    """A bar on the terminal while sampling in a script; nothing is shown where the output is no terminal.

    Args:
        total: solver steps expected; what the solver reports later wins.
        description: text before the bar.
        console: where to draw, by default rich's own.

    Example:
        with sampling_progress(50) as report:
            model.sample(n=64, steps=50, progress=report)
    """
    console = console or rich.get_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda step, steps: bar.update(task, completed=step, total=steps)


class SamplingProgress(Callback):
    """Shows the solver steps of the current batch together with Lightning's bar during predict.

    Sets `pl_module.progress`, which `predict_step` hands to `sample`. Below a Rich bar it is a line of its
    own, on a TQDM bar the text behind it; without a bar nothing is shown.

    Args:
        description: text of the line.
    """

    def __init__(self, description: str = "sampling") -> None:
        self.description = description
        self._task: tuple[Progress, TaskID] | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module something to report to."""
        bar = trainer.progress_bar_callback
        self._task = None
        pl_module.progress = lambda step, total: self._show(bar, step, total)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the line away."""
        self._finish(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the line away."""
        self._finish(pl_module)

    def _show(self, bar: ProgressBar | None, step: int, total: int) -> None:
        if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.is_enabled:
            self._show_line(bar, bar.progress, step, total)
        elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.predict_progress_bar.set_postfix_str(f"{self.description} {step}/{total}")

    def _show_line(self, bar: RichProgressBar, progress: Progress, step: int, total: int) -> None:
        if self._task is None or self._task[0] is not progress:  # Lightning begins a new display for each stage
            self._task = (progress, progress.add_task(self.description, total=total))
        progress.update(self._task[1], completed=step, total=total, visible=True)
        bar.refresh()

    def _finish(self, pl_module: L.LightningModule) -> None:
        if self._task is not None:
            self._task[0].update(self._task[1], visible=False)
            self._task = None
        pl_module.progress = None
