"""Every recipe: at full size it says what was published; made small, on data in its own layout, it takes two steps.

Every zoo entry is a recipe, and its config is the one config of its model.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from lightning_flows.cli import dispatch, trainer
from lightning_flows.codecs import FrozenText
from lightning_flows.flow import Condition
from lightning_flows.store import build, check, config_of, read_config
from tests.flow_recipe_facts import FLOWS
from tests.mask_stand_ins import unchecked_cifar10
from tests.recipe_facts import DECODERS, PUBLISHED
from tests.recipe_sizes import NETWORKS, name_of, small
from tests.symmflow_recipe_facts import OURS, SYMMFLOW

ROOT = Path(__file__).parent.parent
RECIPES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("zoo/*/recipe.yaml")])
ENTRIES = sorted(path.parent for path in ROOT.glob("zoo/*/config.json"))


def name(path):
    return str(path.relative_to(ROOT))


def fact_of(recipe):
    return PUBLISHED.get(name(recipe).removeprefix("configs/").removesuffix(".yaml"))


# ---- at full size


class Parsed(trainer.FlowsCLI):
    """The command line up to the point where it would build anything."""

    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(autouse=True)
def known_text_models(monkeypatch):
    """The sizes of tokens that published configs would tell: none is fetched."""
    sizes = {fact.text[0]: fact.text[2] for fact in FLOWS.values() if fact.text}
    read = FrozenText.size.fget
    monkeypatch.setattr(FrozenText, "size", property(lambda text: sizes.get(text.repo) or read(text)))


@pytest.fixture(params=RECIPES, ids=name)
def recipe(request):
    return request.param


@pytest.fixture
def parsed(recipe, tmp_path, monkeypatch):
    """What `fit` understands of a recipe: a nested dictionary with every default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FLOWS_DATA", str(tmp_path))
    monkeypatch.setattr(trainer, "FlowsCLI", Parsed)
    return dispatch(["fit", "-c", str(recipe)]).config["fit"].as_dict()


def test_full_size_recipe_is_what_it_claims(recipe, parsed):
    """Parsed by the command line and built on the meta device, where numbers need no memory."""
    with torch.device("meta"):
        model = build(parsed["model"])
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    config = config_of(model)
    assert json.loads(json.dumps(config)) == config
    check(config)
    if (fact := fact_of(recipe)) is not None:
        chosen = {key: value for key, value in fact.chosen.items() if key not in ("batch", "processes")}
        assert not {key for key in chosen if getattr(fact, key) not in (None, 0.0)}, "chosen, though published"
        check_network(fact, model, parsed["model"]["init_args"])
        check_flow(fact, parsed["model"]["init_args"])
        check_optimizer(fact, model, parsed["model"]["init_args"])
        check_run(fact, parsed)
    if (decoder := DECODERS.get(name(recipe).removeprefix("configs/").removesuffix(".yaml"))) is not None:
        check_decoder(decoder, model, parsed)


def check_decoder(fact, model, parsed):
    millions = [sum(p.numel() for p in model.network.parameters() if p.requires_grad or frozen) for frozen in (0, 1)]
    assert tuple(f"{count / 1e6:.1f}" for count in millions) == fact.millions
    arguments, run, data = parsed["model"]["init_args"], parsed["trainer"], parsed["data"]["init_args"]
    assert (arguments["trained"], arguments["reconstruction"]) == ("decoder", "squared")
    assert arguments["latent_noise"] == fact.latent_noise
    assert model.network.scaling_factor == fact.scaling_factor
    assert tuple(distance.weight for distance in model.perceptual) == fact.perceptual
    adversary = model.adversary
    assert (adversary.weight, adversary.lecam, adversary.lecam_decay, adversary.balance) == (*fact.critic, False)
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    chosen = (type(optimizer), optimizer.defaults["betas"], optimizer.defaults["weight_decay"])
    assert chosen == (torch.optim.AdamW, fact.betas, fact.weight_decay)
    assert arguments["lr_scheduler"]["init_args"]["warmup_steps"] == fact.warmup
    assert run["max_steps"] == 2 * fact.steps  # the critic's count as well
    assert (data["size"], data["batch_size"]) == (fact.image, fact.batch)
    assert parsed["global_batch"] == fact.batch * fact.processes


def said(fact, key):
    """A published value, or the one that stands in for it."""
    published = getattr(fact, key)
    return fact.chosen.get(key) if key in fact.chosen else published


def check_network(fact, model, arguments):
    entry = arguments["network"]
    assert name_of(entry) == fact.network
    latent = fact.image // 8
    wanted = {
        **fact.sizes, "in_channels": 4, "input_size": latent, "num_classes": fact.classes,
        "label_dropout": said(fact, "label_dropout"), "time_scale": 1.0,
    }  # fmt: skip
    assert {key: entry["init_args"][key] for key in wanted} == wanted
    assert model.shape == (4, latent, latent)
    count = sum(parameter.numel() for parameter in model.parameters())
    count += model.network.pos_embed.numel() if fact.network == "DiT" else 0
    digits = len(said(fact, "millions").partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == said(fact, "millions")


def check_flow(fact, arguments):
    codec, objective, guidance = arguments["codec"], arguments["objective"]["init_args"], arguments["guidance"]
    wanted = {"repo": fact.vae, "scale": 0.18215, "posterior": "sample"}
    assert {key: codec["init_args"][key] for key in wanted} == wanted
    assert name_of(objective["path"]) == "Linear"
    assert objective["path"]["init_args"]["sigma_min"] == fact.sigma_min
    assert (name_of(objective["times"]), objective["times"]["init_args"]) == ("Uniform", {"shift": 1.0})
    assert name_of(arguments["solver"]) == fact.solver[0]
    assert fact.solver[1].items() <= arguments["solver"].get("init_args", {}).items()
    assert (guidance and guidance["init_args"]["scale"]) == fact.guidance


def check_optimizer(fact, model, arguments):
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer) is torch.optim.AdamW
    assert {key: optimizer.defaults[key] for key in ("lr", "weight_decay", "betas")} == {
        "lr": said(fact, "lr"), "weight_decay": 0, "betas": (0.9, 0.999),
    }  # fmt: skip
    if fact.final_lr is None:
        assert arguments["lr_scheduler"] is None
        return
    steps = fact.epochs * (fact.items // (fact.batch * fact.processes))
    rates = model.make_lr_scheduler(optimizer).lr_lambdas[0]
    assert arguments["lr_scheduler"]["init_args"]["total_steps"] == steps
    assert rates(0) == 1.0
    assert math.isclose(rates(steps) * fact.lr, fact.final_lr)


def check_run(fact, parsed):
    data, run = parsed["data"]["init_args"], parsed["trainer"]
    batch, processes = said(fact, "batch"), said(fact, "processes")
    assert (parsed["global_batch"], data["batch_size"]) == (batch * processes, batch)
    assert (data["size"], data["flip"], data["crop"]) == (fact.image, True, "center")
    if name_of(parsed["data"]) == "ImageFolder":
        assert data["scaling"] == "adm"
    if data.get("first") is not None:
        assert data["first"] == fact.items
    length = {"max_epochs": said(fact, "epochs"), "max_steps": -1 if fact.steps is None else fact.steps}
    assert {key: run[key] for key in length} == length
    assert (run["precision"], run["gradient_clip_val"]) == (fact.precision, None)
    assert run.get("accumulate_grad_batches", 1) == 1
    assert run["strategy"] == "auto"  # DDP where there are several devices
    assert [name_of(entry) for entry in run["callbacks"]].count("Compile") == 1
    (ema,) = [entry["init_args"] for entry in run["callbacks"] if name_of(entry) == "EMA"]
    assert (ema["decay"], ema["update_every"]) == (fact.ema, 1)


def test_every_published_configuration_has_its_recipe_and_says_its_facts():
    assert {f"configs/{key}.yaml" for key in PUBLISHED} <= {name(path) for path in RECIPES}
    large = [path for path in RECIPES if any(size in path.stem for size in ("256", "512", "1024"))]
    # The facts of flows are in test_flow_recipes, those of SymmFlow in test_symmflow_recipes.
    others = {f"configs/{key}.yaml" for key in (*DECODERS, *FLOWS, *SYMMFLOW, *OURS)}
    assert all(fact_of(path) is not None for path in large if name(path) not in others)
    assert others <= {name(path) for path in RECIPES}


def test_recipe_says_how_long_and_how_averaged(recipe):
    content = yaml.safe_load(recipe.read_text())
    assert {"max_epochs", "max_steps"} & set(content["trainer"])
    names = [callback["class_path"] for callback in content["trainer"]["callbacks"]]
    assert "lightning_flows.callbacks.EMA" in names


# ---- made small


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Folders of tiny random autoencoders, one for each shape."""
    made = {}

    def make(channels, latent_channels, levels):
        import diffusers

        key = (channels, latent_channels, levels)
        if key not in made:
            network = diffusers.AutoencoderKL(
                in_channels=channels, out_channels=channels, latent_channels=latent_channels, layers_per_block=1,
                block_out_channels=(4,) * levels, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
            )  # fmt: skip
            made[key] = tmp_path_factory.mktemp("vae")
            network.save_pretrained(made[key])
        return made[key]

    return make


def test_recipe_takes_two_steps(recipe, tmp_path, monkeypatch, autoencoder):
    monkeypatch.chdir(tmp_path)
    unchecked_cifar10(monkeypatch)
    torch.set_num_threads(1)
    folder = tmp_path / "data"
    folder.mkdir()
    reduced = tmp_path / "small.yaml"
    reduced.write_text(yaml.safe_dump(small(yaml.safe_load(recipe.read_text()), folder, autoencoder)))
    cli = dispatch(["fit", "-c", str(reduced)])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert (Path(cli.trainer.default_root_dir) / "checkpoints/last.ckpt").is_file()
    config = config_of(cli.model)
    assert json.loads(json.dumps(config)) == config
    check(config)
    assert config_of(build(config)) == config


@pytest.mark.parametrize("network", sorted(set(NETWORKS) - {"TARFlow", "STARFlow"}))  # those: test_flow_recipes
def test_a_network_built_on_the_meta_device_becomes_real(network):
    """By `to_empty` and a state dict, or by `to_empty` and fresh weights: nothing is left as memory held it."""
    floor = "codecs" if network == "KLNetwork" else "networks"
    sizes, side = NETWORKS[network]
    more = {"input_size": side} if floor == "networks" else {}
    more |= {"num_classes": 3} if floor == "networks" and network != "StableDiffusionUNet" else {}
    config = {"class_path": f"lightning_flows.{floor}.{network}", "init_args": {**sizes, **more}}
    real = build(config).eval()
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.normal_(std=0.2)
    with torch.device("meta"):
        holder = torch.nn.ModuleList([build(config).eval()])
        holder.to_empty(device="cpu")
    (made,) = holder
    made.load_state_dict(real.state_dict())
    for (key, want), found in zip(real.named_buffers(), made.buffers(), strict=True):
        assert torch.equal(want, found), key
    if floor == "networks":
        x, t = torch.randn(2, *real.shape), torch.tensor([0.2, 0.7])
        condition = Condition(label=torch.tensor([0, 2]))
        assert torch.equal(made(x, t, condition), real(x, t, condition))
        made.reset_parameters()
        assert torch.equal(made(x, t, condition), torch.zeros_like(x))


# ---- the zoo


@pytest.mark.parametrize("entry", ENTRIES, ids=name)
def test_zoo_config_is_one_config(entry):
    config = read_config(entry)
    check(config)
    assert config_of(build(config)) == config
