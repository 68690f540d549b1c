"""Every recipe and every zoo entry: it parses, its model says one config in JSON, and it takes two steps."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_flows.cli import dispatch
from lightning_flows.store import build, check, config_of, read_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("zoo/*/recipe.yaml")])
ENTRIES = sorted(path.parent for path in ROOT.glob("zoo/*/config.json"))
NETWORK = "--model.init_args.network.init_args."
SMALL = [
    NETWORK + "hidden_size=16",
    NETWORK + "depth=1",
    NETWORK + "num_heads=2",
    "--model.init_args.steps=2",
]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_takes_two_steps(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    steps = ["--trainer.max_steps=2", "--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
    cli = dispatch(["fit", "-c", str(recipe), *SMALL, *quiet, *steps])
    assert cli.trainer.global_step == 2
    assert (Path(cli.trainer.default_root_dir) / "checkpoints/last.ckpt").is_file()
    config = config_of(cli.model)
    assert json.loads(json.dumps(config)) == config
    check(config)
    assert config_of(build(config)) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_says_how_long_and_how_averaged(recipe):
    content = yaml.safe_load(recipe.read_text())
    assert {"max_epochs", "max_steps"} & set(content["trainer"])
    names = [callback["class_path"] for callback in content["trainer"]["callbacks"]]
    assert "lightning_flows.callbacks.EMA" in names


@pytest.mark.parametrize("entry", ENTRIES, ids=name)
def test_zoo_config_is_one_config(entry):
    config = read_config(entry)
    check(config)
    assert config_of(build(config)) == config
