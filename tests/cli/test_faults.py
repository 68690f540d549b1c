"""What the command line does with damaged checkpoints, requeued jobs and folders that cannot be written."""

import shutil

import pytest
import yaml

from lightning_flows.cli import dispatch, main
from lightning_flows.strategies import AtomicCheckpointIO
from tests.cli.conftest import RECIPE, SMALL


def refused(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    return str(caught.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """A copy of a run of 11 steps with its ``last.ckpt`` and an older checkpoint; the working directory beside it."""
    shutil.copytree(finished_run / "runs/digits", tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/digits/checkpoints"
    for file in folder.glob("epoch*.ckpt"):
        file.unlink()
    shutil.copy2(folder / "last.ckpt", folder / "older.ckpt")
    return folder


def test_a_truncated_last_checkpoint_is_replaced_by_the_one_before(run):
    truncate(run / "last.ckpt")
    (run / ".last.ckpt.0123abcd.partial").touch()  # of a killed process
    message = r"last\.ckpt cannot be used \(it is truncated.*older\.ckpt is used instead"
    with pytest.warns(UserWarning, match=message):
        cli = dispatch(["fit", *RECIPE, *SMALL, "--ckpt_path", "last", "--trainer.max_steps=12"])
    assert cli.trainer.global_step == 12
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert not list(run.glob(".*.partial"))


def test_no_usable_checkpoint_is_an_error_that_names_them_all(run):
    truncate(run / "last.ckpt")
    truncate(run / "older.ckpt")
    for verb, word in (("fit", "auto"), ("test", "last")):
        message = refused([verb, *RECIPE, *SMALL, "--ckpt_path", word])
        assert "no usable checkpoint" in message
        assert "last.ckpt" in message
        assert "older.ckpt" in message


def test_auto_starts_and_resumes_with_one_command(run, monkeypatch, tmp_path):
    weights = ["--init_from", str(run / "last.ckpt")]
    command = ["fit", *RECIPE, *SMALL, "--ckpt_path", "auto", "--run_name", "job", *weights]
    cli = dispatch([*command, "--trainer.max_steps=1"])
    assert cli.trainer.global_step == 1  # a new run, from weights
    cli = dispatch([*command, "--trainer.max_steps=2"])
    assert cli.trainer.global_step == 2
    config = yaml.safe_load((tmp_path / "runs/job/config.yaml").read_text())
    assert config["ckpt_path"].endswith("runs/job/checkpoints/last.ckpt")
    assert config["init_from"] == weights[1]  # still the base of the card
    assert "auto resumes or starts a fit" in refused(["test", *RECIPE, *SMALL, "--ckpt_path", "auto"])


def test_a_checkpoint_io_of_the_user_stays(run):
    own = "--trainer.plugins=lightning.fabric.plugins.TorchCheckpointIO"
    cli = dispatch(["fit", *RECIPE, *SMALL, own, "--ckpt_path", "last", "--trainer.max_steps=11"])
    assert not isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    message = refused(["fit", *RECIPE, *SMALL, "--trainer.default_root_dir", str(tmp_path / "file/run")])
    assert f"the run's folder {tmp_path}/file/run cannot be written: Not a directory" in message
    assert "--run_name" in message


def test_a_full_disk_ends_a_fit_with_one_sentence(run, tmp_path):
    from tests.faults.test_disk import full_disk

    before = (run / "last.ckpt").read_bytes()
    with full_disk():
        message = refused(["fit", *RECIPE, *SMALL, "--ckpt_path", "last", "--trainer.max_epochs=2"])
    assert "was not written: File too large" in message
    assert (run / "last.ckpt").read_bytes() == before
    assert not list(run.glob(".*.partial"))
