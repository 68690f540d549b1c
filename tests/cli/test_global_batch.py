"""A recipe that says its global batch runs with that batch or not at all."""

from pathlib import Path

import lightning as L
import pytest

from lightning_flows.cli import dispatch, main
from lightning_flows.cli.global_batch import check_global_batch
from lightning_flows.data import Digits
from tests.cli.conftest import RECIPE, SMALL

CPU = ["--trainer.accelerator=cpu"]


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **quiet, **options)


def test_all_factors_count():
    check_global_batch(None, trainer(), Digits(batch_size=5))
    check_global_batch(5, trainer(devices="auto"), Digits(batch_size=5))
    check_global_batch(60, trainer(devices=2, num_nodes=3, accumulate_grad_batches=2), Digits(batch_size=5))


@pytest.mark.parametrize(
    ("wanted", "options", "says"),
    [
        (48, {"devices": 2}, ["batch_size 6 x devices 2 x nodes 1 x accumulate_grad_batches 1 = 12",
                              "--trainer.accumulate_grad_batches 4 or --data.batch_size 24", "--global_batch 12"]),
        (10, {"devices": 2}, ["set --data.batch_size 5"]),
        (3, {"devices": 2, "num_nodes": 2}, ["devices 2 x nodes 2", "cannot be divided over 4 devices"]),
        (0, {}, ["at least 1"]),
    ],
)  # fmt: skip
def test_another_batch_says_all_factors_and_what_to_set(wanted, options, says):
    with pytest.raises(ValueError, match="--global_batch") as caught:
        check_global_batch(wanted, trainer(**options), Digits(batch_size=6))
    assert all(words in str(caught.value) for words in says)


def test_what_cannot_be_checked_is_an_error():
    with pytest.raises(ValueError, match="LightningDataModule has no batch_size"):
        check_global_batch(4, trainer(), L.LightningDataModule())
    growing = L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 4: 2})
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        check_global_batch(4, trainer(callbacks=[growing]), Digits(batch_size=4))


def test_fit_stops_before_anything_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Digits, "read", lambda self, split: pytest.fail("the data is read"))
    with pytest.raises(SystemExit, match=r"--global_batch is 64, but data.batch_size 128 x devices 1"):
        main(["fit", *RECIPE, *SMALL, *CPU, "--global_batch=64", "--trainer.devices=auto"])
    assert not Path("runs").exists()


def test_fit_runs_with_the_batch_that_it_was_asked_for_and_other_verbs_do_not_ask(in_run):
    more = ["--run_name=accumulated", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=1"]
    cli = dispatch(["fit", *RECIPE, *SMALL, *CPU, *more, "--global_batch=256"])
    assert cli.trainer.global_step == 1
    last = [*RECIPE, *SMALL, *CPU, "--ckpt_path=last", "--global_batch=7"]
    dispatch(["validate", *last, "--trainer.limit_val_batches=1", "--trainer.callbacks=null"])
