"""A run with an adapter from the command line: fit, resume, sample, export."""

import json
import sys

import pytest
import torch
import yaml

import lightning_flows as lf
from lightning_flows.cli import dispatch
from lightning_flows.store import load_tensors
from tests.cli.conftest import RECIPE, SMALL

BASE = "runs/digits/checkpoints/last.ckpt"
LORA = [
    *SMALL,
    "--run_name=lora",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks+=LoRA",
    "--trainer.callbacks.rank=2",
    "--trainer.callbacks.train=[y_embedder.*]",
]


def test_an_adapter_from_the_command_line(in_run):
    dispatch(["fit", *RECIPE, *LORA, "--init_from", BASE, "--trainer.max_epochs=1"])
    run = in_run / "runs/lora"
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, BASE)
    first = load_tensors(run / "adapter/adapter_model.safetensors")

    cli = dispatch(["fit", *RECIPE, *LORA, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert cli.trainer.current_epoch == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["init_from"] == BASE  # where the run began stays said
    second = load_tensors(run / "adapter/adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == BASE

    cli = dispatch(["predict", *RECIPE, *LORA, "--ckpt_path=last", "--data.labels=[0,1]", "--data.seed=7"])
    assert len(list((run / "predictions").glob("0*.png"))) == 2
    drawn = cli.model.sample(lf.Condition(label=torch.tensor([0, 1])), seed=7)
    dispatch(["export", "runs/lora", "out", "apache-2.0"])
    for model in (lf.from_pretrained("out"), lf.load_adapter(lf.from_pretrained(BASE), run / "adapter")):
        again = model.sample(lf.Condition(label=torch.tensor([0, 1])), seed=7)
        assert torch.allclose(again, drawn, atol=1e-4)
    assert not torch.allclose(lf.from_pretrained(BASE).sample(lf.Condition(label=torch.tensor([0, 1])), seed=7), drawn)


def test_without_peft_the_command_line_says_what_to_install(in_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"lightning-flows fit: LoRA needs peft: pip install .lightning-flows\[peft\]"):
        dispatch(["fit", *RECIPE, *LORA, "--run_name=without", "--init_from", BASE])
