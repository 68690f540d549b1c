import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from lightning_flows.cli import dispatch, main
from lightning_flows.store import config_of, resolve
from tests.cli.conftest import RECIPE, SMALL

LAST = ["--ckpt_path", "last"]


def refused(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    return str(caught.value)


def test_a_run_has_one_folder(in_run):
    run = in_run / "runs/digits"
    assert (run / "checkpoints/last.ckpt").is_file()
    assert list((run / "samples").glob("*.png"))
    assert list((run / "log").rglob("metrics.csv"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["network"]["init_args"]["hidden_size"] == 16


def test_a_fresh_fit_never_overwrites_a_run(in_run):
    message = refused(["fit", *RECIPE, *SMALL])
    assert "runs/digits already holds a run" in message
    assert "--ckpt_path last" in message
    assert "--run_name" in message


def test_last_of_a_run_that_is_not_there_names_the_folder(in_run):
    for verb in ("fit", "validate", "test", "predict"):
        message = refused([verb, *RECIPE, *SMALL, *LAST, "--run_name", "nothing"])
        assert "runs/nothing/checkpoints holds no last.ckpt" in message


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_untrained_weights_are_never_used(in_run, verb):
    assert "no weights" in refused([verb, *RECIPE, *SMALL])


def test_words_that_exclude_each_other(in_run):
    assert "exclude each other" in refused(["test", *RECIPE, *LAST, "--weights", "lfm-digits"])
    assert "--init_from is for fit" in refused(["test", *RECIPE, "--init_from", "lfm-digits"])
    assert "--weights is for" in refused(["fit", *RECIPE, "--weights", "lfm-digits", "--run_name", "x"])
    assert "give one of them" in refused(["fit", *RECIPE, *LAST, "--init_from", "lfm-digits"])
    assert "--reinit" in refused(["fit", *RECIPE, "--reinit", "[a]", "--run_name", "x"])


def test_predict_replaces_training_data_by_requests(in_run):
    cli = dispatch(["predict", *RECIPE, *SMALL, *LAST, "--data.labels=[0,1,2]", "--data.seed=7"])
    folder = in_run / "runs/digits/predictions"
    assert sorted(path.name for path in folder.glob("0*.png")) == [
        "00000-label0.png", "00001-label1.png", "00002-label2.png",
    ]  # fmt: skip
    assert (folder / "grid.png").is_file()
    # a request is the same picture as the sample of the same seed in Python
    from lightning_flows import Condition

    images = cli.model.sample(Condition(label=torch.tensor([0, 1, 2])), seed=7)
    grey = torch.tensor(list(Image.open(folder / "00001-label1.png").convert("L").tobytes())).reshape(8, 8)
    wanted = ((images[1, 0].clamp(-1, 1) + 1) * 127.5).round()
    assert (grey - wanted).abs().max() <= 1


def test_test_writes_metrics_with_their_settings(in_run):
    dispatch(["test", *RECIPE, *SMALL, *LAST])
    content = json.loads((in_run / "runs/digits/metrics.json").read_text())["test"]["values"]
    entry = content["frechet[pixels]"]
    assert entry["real"] == entry["samples"] == 180
    assert entry["nfe"] == 4
    assert content["bits_per_dim"]["value"] > 0


def test_resume_continues_the_same_run(in_run, tmp_path, monkeypatch):
    shutil.copytree(in_run / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    cli = dispatch(["fit", *RECIPE, *SMALL, *LAST, "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 22
    assert len(list((tmp_path / "runs/digits/log").iterdir())) == 2  # the first log is kept


def test_export_predicts_and_starts_a_new_run(in_run, tmp_path, monkeypatch):
    out = tmp_path / "small-digits"
    main(["export", "digits", str(out), "apache-2.0"])
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "README.md",
    }
    monkeypatch.chdir(tmp_path)
    main(["predict", "-c", str(out / "recipe.yaml"), "--data.labels=[3]"])
    assert (tmp_path / "runs/small-digits/predictions/00000-label3.png").is_file()
    cli = dispatch(["fit", *RECIPE, *SMALL, "--init_from", str(out), "--run_name", "new", "--trainer.max_steps=1"])
    assert config_of(cli.model)["class_path"].endswith("LatentFlowMatching")
    assert "init_from" not in json.dumps(config_of(cli.model))
    assert yaml.safe_load((tmp_path / "runs/new/config.yaml").read_text())["init_from"] == str(out)
    message = refused(["test", "-c", str(out / "recipe.yaml"), "--model.init_args.network.init_args.num_classes=7"])
    assert "embedding_table" in message


def test_init_from_with_other_classes_needs_the_changed_tensors_named(in_run, tmp_path, monkeypatch):
    ckpt = str(in_run / "runs/digits/checkpoints/last.ckpt")
    monkeypatch.chdir(tmp_path)
    seven = [*RECIPE, *SMALL, "--model.init_args.network.init_args.num_classes=7", "--init_from", ckpt]
    assert "embedding_table" in refused(["fit", *seven, "--run_name", "seven"])


def test_a_checkpoint_does_not_overrule_the_command_line(in_run, tmp_path, monkeypatch):
    ckpt = str(in_run / "runs/digits/checkpoints/last.ckpt")
    monkeypatch.chdir(tmp_path)
    other = "--model.init_args.optimizer.init_args.lr=0.5"
    cli = dispatch(["fit", *RECIPE, *SMALL, other, "--ckpt_path", ckpt, "--trainer.max_epochs=1"])
    assert cli.model.make_optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"] == 0.5


def test_a_missing_recipe_is_named():
    assert "configs/nothing.yaml does not exist" in refused(["fit", "-c", "configs/nothing.yaml"])


def test_a_recipe_with_an_equals_sign_is_the_same_recipe(in_run):
    message = refused(["fit", "--config=configs/lfm/digits.yaml", *SMALL])
    assert "runs/digits already holds a run" in message


@pytest.mark.parametrize("words", [["--weights", "lfm-digits"], ["--weights=lfm-digits"]])
def test_weights_alone_say_what_the_model_is(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    fewer = "--model.init_args.steps=3"
    cli = dispatch(["predict", *words, fewer, "--data.labels=[3]", "--trainer.enable_progress_bar=false"])
    assert cli.model.steps == 3
    (picture,) = (tmp_path / "runs/lfm-digits/predictions").glob("0*.png")
    assert Image.open(picture).size == (8, 8)


def test_weights_alone_are_no_run_and_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused(["predict", "--weights", "nowhere"])


def test_weights_in_the_folder_where_one_stands_name_the_run(tmp_path, monkeypatch):
    shutil.copytree(resolve("lfm-digits"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    cli = dispatch(["predict", "--weights", ".", "--data.labels=[3]", "--trainer.enable_progress_bar=false"])
    assert cli.folder.as_posix() == "runs/mine"
