"""Recipes of normalizing flows at full size say what was published, and their networks are what they are on paper."""

import math
from pathlib import Path

import pytest
import torch

from lightning_flows.cli import dispatch, trainer
from lightning_flows.flow import Condition, Tokens
from lightning_flows.modules import WarmupCosine
from lightning_flows.networks import Sequential
from lightning_flows.store import build
from tests.flow_recipe_facts import FLOWS
from tests.recipe_sizes import NETWORKS, name_of
from tests.test_recipes import ROOT, Parsed, known_text_models

__all__ = ["known_text_models"]  # a fixture that every test here uses


@pytest.fixture(params=sorted(FLOWS))
def fact(request):
    return FLOWS[request.param]


@pytest.fixture
def parsed(request, fact, tmp_path, monkeypatch):
    """What `fit` understands of a recipe: a nested dictionary with every default."""
    recipe = ROOT / f"configs/{next(key for key, value in FLOWS.items() if value is fact)}.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FLOWS_DATA", str(tmp_path))
    monkeypatch.setattr(trainer, "FlowsCLI", Parsed)
    return dispatch(["fit", "-c", str(recipe)]).config["fit"].as_dict()


@pytest.fixture
def model(parsed):
    with torch.device("meta"):
        return build(parsed["model"])


def arguments_of(parsed):
    return parsed["model"]["init_args"]


def test_the_network_is_the_published_one(fact, parsed, model):
    entry = arguments_of(parsed)["network"]
    assert name_of(entry) == fact.network
    side = fact.image // 8 if fact.latents else fact.image
    wanted = {**fact.sizes, "input_size": side, "num_classes": fact.classes}
    wanted["text_dropout" if fact.text else "label_dropout"] = fact.dropout
    if fact.text:
        wanted |= {"text_length": fact.text[1], "text_size": fact.text[2]}
    assert {key: entry["init_args"][key] for key in wanted} == wanted
    digits, unit = len(fact.parameters[:-1].partition(".")[2]), {"M": 1e6, "B": 1e9}[fact.parameters[-1]]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / unit:.{digits}f}" == fact.parameters[:-1]


def test_the_data_and_their_noise_are_the_published_ones(fact, parsed, model):
    arguments, data = arguments_of(parsed), parsed["data"]["init_args"]
    noise = arguments["objective"]["init_args"]["data_noise"]
    if fact.noise is None:
        assert (name_of(noise), noise["init_args"]) == ("Dequantization", {"levels": 256})
    else:
        assert (name_of(noise), noise["init_args"]) == ("GaussianNoise", {"deviation": fact.noise, "weighted": False})
    assert model.objective.latent_penalty == fact.penalty
    codec, wanted = arguments["codec"], {"repo": fact.latents, "scale": 0.18215, "posterior": "sample"}
    if fact.latents:
        assert {key: codec["init_args"][key] for key in wanted} == wanted
    else:
        assert codec is None
    assert (data["flip"], data["crop"]) == (fact.flip, "center")
    assert data["size"] in (fact.image, None)
    if fact.text:
        text = arguments["text"]["init_args"]
        assert (text["repo"], text["length"], text["template"]) == (*fact.text[:2], None)


def test_the_optimizer_and_its_rates_are_the_published_ones(fact, parsed, model):
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer) is torch.optim.AdamW
    wanted = {"lr": fact.lr, "betas": (0.9, 0.95), "weight_decay": 1e-4, "eps": 1e-8}
    assert {key: optimizer.defaults[key] for key in wanted} == wanted
    if fact.least_lr is None:
        return
    schedule = model.make_lr_scheduler(optimizer)
    assert type(schedule) is WarmupCosine
    warmup = fact.epoch if fact.warmup is None else fact.warmup
    settled = arguments_of(parsed)["lr_scheduler"]["init_args"]
    assert (settled["warmup_steps"], settled["total_steps"], settled["first"]) == (warmup, fact.steps, None)
    rates = [fact.lr * schedule.lr_lambdas[0](step) for step in (0, warmup // 2, warmup, fact.steps)]
    half = fact.least_lr + (fact.lr - fact.least_lr) * (warmup // 2) / warmup
    for found, rate in zip(rates, (fact.least_lr, half, fact.lr, fact.least_lr), strict=True):
        assert math.isclose(found, rate, rel_tol=1e-9)


def test_the_run_is_the_published_one(fact, parsed):
    data, run = parsed["data"]["init_args"], parsed["trainer"]
    assert (parsed["global_batch"], data["batch_size"]) == (fact.global_batch, fact.batch)
    length = ("max_steps", fact.steps) if fact.images is not None else ("max_epochs", fact.epochs)
    assert run[length[0]] == length[1]
    assert (run["precision"] or "32-true", run["strategy"]) == (fact.precision, fact.strategy)
    assert run["gradient_clip_val"] is None
    assert run.get("accumulate_grad_batches", 1) == 1
    callbacks = {name_of(entry): entry.get("init_args", {}) for entry in run["callbacks"]}
    assert "EMA" in callbacks
    if fact.image > 28:
        assert {"Compile", "GradientWatch", "ModelCheckpoint", "Throughput"} <= set(callbacks)
        assert callbacks["EMA"]["decay"] == 0.9999
        assert callbacks["GradientWatch"]["max_norm"] is None


def test_every_published_flow_has_its_recipe():
    assert all(Path(ROOT, f"configs/{key}.yaml").is_file() for key in FLOWS)


# ---- networks that were built without memory


@pytest.mark.parametrize(
    ("network", "more"),
    [
        ("TARFlow", {"num_classes": 3, "in_channels": 2}),
        ("TARFlow", {"volume_preserving": True}),
        ("STARFlow", {"num_classes": 3}),
        ("STARFlow", {"text_length": 4, "text_size": 8, "norm": "rms", "qk_norm": True}),
    ],
)
def test_a_flow_built_on_the_meta_device_becomes_real(network, more):
    """By `to_empty` and a state dict, or by `to_empty` and fresh weights: nothing is left as memory held it."""
    sizes, side = NETWORKS[network]
    config = {"class_path": f"lightning_flows.networks.{network}", "init_args": {**sizes, "input_size": side, **more}}
    real = build(config).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in real.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=source) * 0.05 + 0.01)
    with torch.device("meta"):
        holder = torch.nn.ModuleList([build(config).eval()])
        holder.to_empty(device="cpu")
    (made,) = holder
    made.load_state_dict(real.state_dict())
    x = torch.randn(2, *real.shape, generator=source)
    condition = Condition(label=torch.tensor([0, 2]))
    if "text_length" in more:
        condition = Condition(tokens=Tokens(torch.randn(2, 3, 8, generator=source), torch.ones(2, 3, dtype=torch.bool)))
    for found, wanted in zip(made(x, condition), real(x, condition), strict=True):
        assert torch.equal(found, wanted)
    back = made.inverse(made(x, condition)[0], condition, method=Sequential())
    assert torch.allclose(back, x, atol=1e-4)
    for value in made.state_dict().values():
        value.fill_(float("nan"))
    made.reset_parameters()
    z, log_det = made(x, condition)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    if "volume_preserving" in more:
        assert torch.equal(made.prior_variance, torch.ones_like(made.prior_variance))
