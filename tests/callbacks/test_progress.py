import io

import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_flows.callbacks import SamplingProgress, sampling_progress
from tests.callbacks.toy import Toy, requests, trainer


@pytest.fixture
def _own_console():
    yield
    rich.reconfigure()


def terminal(**options):
    return Console(file=io.StringIO(), width=100, **options)


def test_bar_counts_solver_steps_on_a_terminal():
    console = terminal(force_terminal=True)
    with sampling_progress(10, "drawing", console=console) as report:
        for step in range(4):
            report(step + 1, 8)
    text = console.file.getvalue()
    assert "drawing" in text
    assert "4/8" in text


def test_nothing_is_shown_where_there_is_no_terminal():
    console = terminal(force_terminal=False)
    with sampling_progress(10, console=console) as report:
        report(1, 10)
    assert console.file.getvalue() == ""


@pytest.mark.usefixtures("_own_console")
def test_solver_steps_stand_below_lightnings_rich_bar(tmp_path):
    screen = io.StringIO()
    console = {"file": screen, "force_terminal": True, "width": 120}
    bar, seen = RichProgressBar(refresh_rate=1, console_kwargs=console), []

    class Slow(Toy):
        def predict_step(self, batch, batch_idx):
            result = super().predict_step(batch, batch_idx)
            bar.progress.refresh()
            seen.extend((t.description, t.completed, t.total, t.visible) for t in bar.progress.tasks)
            return result

    model = Slow()
    predict = trainer(tmp_path, SamplingProgress("solving"), bar, enable_progress_bar=True)
    predict.predict(model, requests("abc"), return_predictions=False)
    assert ("solving", 3, 3, True) in seen
    assert "solving" in screen.getvalue()
    assert "Predicting" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert model.progress is None


def test_solver_steps_stand_behind_a_tqdm_bar(tmp_path, capsys):
    bar = TQDMProgressBar(refresh_rate=1)
    predict = trainer(tmp_path, SamplingProgress(), bar, enable_progress_bar=True)
    predict.predict(Toy(), requests("abc"), return_predictions=False)
    out = capsys.readouterr()
    assert "sampling 3/3" in out.out + out.err


def test_without_a_bar_the_run_is_silent(tmp_path, capsys):
    model = Toy()
    trainer(tmp_path, SamplingProgress()).predict(model, requests("ab"), return_predictions=False)
    assert "sampling" not in capsys.readouterr().out
    assert model.progress is None


def test_an_exception_takes_the_line_away(tmp_path):
    class Broken(Toy):
        def predict_step(self, batch, batch_idx):
            super().predict_step(batch, batch_idx)
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, SamplingProgress()).predict(model, requests("ab"))
    assert model.progress is None
