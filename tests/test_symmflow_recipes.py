"""Recipes of SymmFlow at full size say what was published; ours have what it lacks, and the small ones are small."""

import math

import pytest
import torch
import yaml

from lightning_flows.cli import dispatch, trainer
from lightning_flows.flow import Euler, Linear, SymmetricMatching, Uniform
from lightning_flows.modules import WarmupCosine
from lightning_flows.store import build
from tests.recipe_sizes import bare, name_of
from tests.symmflow_recipe_facts import OURS, SYMMFLOW
from tests.test_recipes import ROOT, Parsed, known_text_models

__all__ = ["known_text_models"]  # a fixture that every test here uses

SMALL = ("shapes", "cells", "streets", "people", "fashion_mnist")
LEAST_LR = 1e-6


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """What `fit` understands of a recipe: a nested dictionary with every default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FLOWS_DATA", str(tmp_path))
    monkeypatch.setattr(trainer, "FlowsCLI", Parsed)
    return lambda key: dispatch(["fit", "-c", str(ROOT / f"configs/{key}.yaml")]).config["fit"].as_dict()


@pytest.fixture(params=sorted(SYMMFLOW))
def published(request, parse):
    """A fact, what its recipe says, and the model on the meta device."""
    return SYMMFLOW[request.param], parse(request.param), on_meta(request.param)


def content_of(key):
    return yaml.safe_load((ROOT / f"configs/{key}.yaml").read_text())


def on_meta(key):
    """The model of a recipe as its file describes it (parsed, its objective is no longer an entry of its own)."""
    with torch.device("meta"):
        return build(content_of(key)["model"])


@pytest.mark.filterwarnings("ignore:scale_shift=False")  # as published
def test_the_network_is_the_published_one(published):
    fact, parsed, model = published
    entry, side = parsed["model"]["init_args"]["network"], fact.image if fact.image < 64 else fact.image // 8
    assert name_of(entry) == fact.network[0]
    wanted = {**fact.network[1], "input_size": side, "in_channels": sum(fact.channels), "time_scale": 1.0}
    found = {key: entry["init_args"][key] for key in wanted}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} == wanted
    assert (model.shape, model.semantic.channels) == ((fact.channels[0], side, side), fact.channels[1])
    count = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(fact.parameters, str):
        assert f"{count / 1e6:.{len(fact.parameters.partition('.')[2])}f}" == fact.parameters
    else:
        assert count == fact.parameters


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_the_codes_are_the_published_ones(published):
    fact, parsed, _ = published
    arguments = parsed["model"]["init_args"]
    semantic, codec = arguments["semantic"], arguments["codec"]
    vae = {"repo": "stabilityai/sd-vae-ft-mse", "scale": 0.18215}
    if fact.image > 32:  # masks go through the autoencoder of the images; theirs is the mode of the posterior
        assert name_of(semantic) == "ThroughAutoencoder"
        assert vae.items() <= semantic["init_args"]["codec"]["init_args"].items()
        assert {**vae, "posterior": "sample"}.items() <= codec["init_args"].items()
        semantic = semantic["init_args"]["semantic"]
    else:
        assert codec is None
    assert name_of(semantic) == fact.code[0]
    assert {**fact.code[1], "beta": fact.beta}.items() <= semantic["init_args"].items()


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_the_flow_is_the_published_one(published):
    fact, _, model = published
    wanted = SymmetricMatching(fact.image_weight, Linear(1e-4), Uniform(), read_rate=0.0, drop_rate=0.0)
    assert model.objective == wanted
    assert (model.guidance, model.solver, model.steps, model.read_steps) == (None, Euler(), 25, fact.read_steps)


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_the_optimizer_and_its_rates_are_the_published_ones(published):
    fact, _, model = published
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (fact.lr, 0.0)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    schedule = model.make_lr_scheduler(optimizer)
    assert type(schedule) is WarmupCosine
    steps, rise = fact.epochs * fact.epoch, fact.warmup * fact.epoch
    cycle = torch.optim.lr_scheduler.OneCycleLR(  # what "one cycle" says, by torch
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), max_lr=fact.lr, total_steps=steps,
        pct_start=rise / steps, div_factor=fact.lr / LEAST_LR, final_div_factor=1.0,
    )  # fmt: skip
    for step in (0, rise // 2, rise - 1, rise, (rise + steps) // 2, steps - 1):
        cycle.last_epoch = step
        assert math.isclose(fact.lr * schedule.lr_lambdas[0](step), cycle.get_lr()[0], rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_the_run_is_the_published_one(published):
    fact, parsed, _ = published
    data, run = parsed["data"]["init_args"], parsed["trainer"]
    assert (parsed["global_batch"], data["batch_size"]) == (fact.global_batch, fact.batch)
    assert (data["size"], data["crop"], data["flip"], data["drop_last"]) == (fact.image, fact.crop, False, False)
    assert (run["max_epochs"], run["max_steps"]) == (fact.epochs, -1)
    assert (run["precision"], run["gradient_clip_val"]) == (fact.precision, None)
    assert run.get("accumulate_grad_batches", 1) == 1
    callbacks = {name_of(entry): entry["init_args"] for entry in run["callbacks"] if entry.get("init_args")}
    ema = callbacks["EMA"]
    assert (ema["decay"], ema["warmup"], ema["update_every"]) == (fact.ema, False, 1)
    assert fact.epochs * fact.epoch % callbacks["ModelCheckpoint"]["every_n_train_steps"] == 0


@pytest.mark.parametrize("key", [key for key in SYMMFLOW if SYMMFLOW[key].ema == 0.9])
def test_recipes_that_begin_with_published_weights_say_how(key):
    text = (ROOT / f"configs/{key}.yaml").read_text()
    assert "lightning-flows convert diffusers-unet" in text
    assert f"lightning-flows fit -c configs/{key}.yaml --init_from data/sd21-unet --resize true" in text


# ---- ours


@pytest.mark.parametrize("key", OURS)
def test_the_better_recipe_reads_masks_without_an_autoencoder_and_sees_the_time(key, parse):
    model, network = on_meta(key), bare(parse(key)["model"]["init_args"]["network"])["init_args"]
    assert (network["time_scale"], network["scale_shift"]) == (1000.0, True)
    assert type(model.semantic).__name__ == "OneHot"
    assert model.objective.drop_rate > 0 < model.objective.read_rate
    assert model.guidance.scale > 1
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.1f} M parameters" in (ROOT / f"configs/{key}.yaml").read_text()


@pytest.mark.parametrize("stem", SMALL)
def test_small_recipes_are_small_and_end_with_a_checkpoint(stem, parse):
    parsed = parse(f"symmflow/{stem}")
    model, run, data = on_meta(f"symmflow/{stem}"), parsed["trainer"], parsed["data"]["init_args"]
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    (row,) = (line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if f"`symmflow/{stem}.yaml`" in line)
    assert f"| `ADMUNet`, {count:.1f} M, " in row
    assert count < 4
    assert data["size"] in (None, *({model.shape[1]} if model.shape[1] == model.shape[2] else ()), model.shape[1:])
    assert sum(model.semantic.num_classes.values()) == model.semantic.channels
    named = {"mask": data.get("mask_classes"), "label": data.get("classes")}
    for key, count in model.semantic.num_classes.items():
        assert named[key] is None or len(named[key]) == count
    callbacks = {name_of(entry): entry.get("init_args", {}) for entry in run["callbacks"]}
    assert run["max_steps"] % callbacks["ModelCheckpoint"]["every_n_train_steps"] == 0
    schedule = parsed["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert (schedule["total_steps"], schedule["warmup_steps"] < run["max_steps"]) == (run["max_steps"], True)
    metrics = [metric["init_args"] for metric in callbacks["Evaluation"]["metrics"]]
    counts = [arguments["num_classes"] for arguments in metrics if "num_classes" in arguments]
    assert set(counts) == set(model.semantic.num_classes.values())


@pytest.mark.parametrize("stem", SMALL)
def test_small_recipes_leave_the_published_defaults_where_they_say_so(stem):
    content = content_of(f"symmflow/{stem}")
    outer, model = content["model"]["init_args"]["network"], on_meta(f"symmflow/{stem}")
    assert name_of(outer) == "Preconditioned"
    assert outer["init_args"]["codes"] == model.semantic.channels
    assert bare(outer)["init_args"]["time_scale"] == 1000.0
    constant = outer["init_args"].get("constant", 0)
    assert constant in (0, model.semantic.num_classes.get("label", 0))
    assert bare(outer)["init_args"].get("pooled_channels", 0) == constant
    assert content["model"]["init_args"]["objective"]["init_args"]["read_rate"] > 0
    assert content["trainer"]["precision"] == "bf16-mixed"
