"""Weights out and in: round trips, other shapes, safe loading, one config for Python and the command line."""

import functools
import json
import logging

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_flows.callbacks import EMA
from lightning_flows.codecs import AutoencoderKL, Identity
from lightning_flows.flow import (
    ClassifierFree,
    Condition,
    FlowMatching,
    Heun,
    LogitNormal,
    Midpoint,
    Stratified,
)
from lightning_flows.modules import (
    GenerativeModule,
    LatentFlowMatching,
    WarmupCosine,
    from_pretrained,
    init_from,
)
from lightning_flows.networks import DiT, ReversedTime
from lightning_flows.store import build, config_of
from tests.modules.tiny import awake, batch, dit, model

ADAM = functools.partial(torch.optim.AdamW, lr=0.003, betas=(0.9, 0.95))


def reversed_time():
    return model(ReversedTime(dit()))


def everything():
    made = model(
        objective=FlowMatching(times=LogitNormal(0.0, 1.0)),
        solver=Heun(),
        guidance=ClassifierFree(2.0, interval=(0.1, 0.9)),
        optimizer=ADAM,
        lr_scheduler=functools.partial(WarmupCosine, total_steps=10, warmup_steps=2),
        standardize=3,
    )
    made.set_latent_statistics(torch.tensor([0.3]), torch.tensor([0.7]))
    return made


def with_autoencoder():
    return model(codec=AutoencoderKL("org/vae", revision="abc", scale=0.2, shift=0.1))


@pytest.mark.parametrize("make", [model, reversed_time, everything, with_autoencoder])
def test_what_was_saved_is_what_is_loaded_bit_for_bit(tmp_path, make):
    made = make()
    loaded = from_pretrained(made.save_pretrained(tmp_path / "out"))
    assert type(loaded) is LatentFlowMatching
    assert config_of(loaded) == config_of(made)
    state = loaded.state_dict()
    assert list(state) == list(made.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert not any(part.training for part in loaded.modules())
    condition, noise = Condition(label=torch.tensor([1, 2])), torch.randn(2, 1, 4, 4)
    t = torch.tensor([0.2, 0.8])
    assert torch.equal(loaded.network(noise, t, condition), made.eval().network(noise, t, condition))


@pytest.mark.parametrize("make", [model, reversed_time, everything])
def test_the_samples_of_a_loaded_model_are_those_of_the_saved_one(tmp_path, make):
    made, condition = make(), Condition(label=torch.tensor([0, 1]))
    loaded = from_pretrained(made.save_pretrained(tmp_path))
    assert torch.equal(loaded.sample(condition, seed=7), made.sample(condition, seed=7))


def test_a_folder_holds_what_is_trained_and_the_files_that_were_given(tmp_path):
    made = with_autoencoder()
    folder = made.save_pretrained(tmp_path / "a" / "b", {"README.md": "a card"})
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["init_args"]["codec"] == {
        "class_path": "lightning_flows.codecs.AutoencoderKL",
        "init_args": {
            "repo": "org/vae", "subfolder": None, "revision": "abc",
            "scale": 0.2, "shift": 0.1, "posterior": "sample",
        },
    }  # fmt: skip
    assert not any("codec" in name for name in made.state_dict())
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in made.network.parameters())


def test_saved_weights_are_those_of_now_not_of_the_hyperparameters(tmp_path):
    made = model()
    with torch.no_grad():
        made.network.final_layer.linear.bias.fill_(3.0)
    loaded = from_pretrained(made.save_pretrained(tmp_path))
    assert loaded.network.final_layer.linear.bias.eq(3.0).all()


# ---------------------------------------------------------------------- other shapes


@pytest.fixture
def folder(tmp_path):
    return model().save_pretrained(tmp_path / "saved")


TABLE = "network.y_embedder.embedding_table.weight"


def test_changed_shapes_are_named(folder):
    with pytest.raises(ValueError, match=rf"saved: .*{TABLE} has shape \(4, 16\) instead of \(8, 16\).*reinit"):
        from_pretrained(folder, num_classes=7)


@pytest.mark.parametrize("where", ["num_classes", "network.num_classes"])
def test_named_tensors_start_afresh_and_the_others_are_loaded(folder, caplog, where):
    with caplog.at_level(logging.INFO):
        loaded = from_pretrained(folder, reinit=["*embedding_table*"], **{where: 7})
    assert f"1 tensors start afresh: {TABLE}" in caplog.text
    assert loaded.network.y_embedder.embedding_table.weight.shape == (8, 16)
    assert config_of(loaded)["init_args"]["network"]["init_args"]["num_classes"] == 7
    state, original = loaded.state_dict(), from_pretrained(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in original.items() if name != TABLE)


def test_overrides_change_the_module_and_its_config(folder):
    loaded = from_pretrained(folder, steps=9)
    assert loaded.steps == 9
    assert config_of(loaded)["init_args"]["steps"] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depht": 3}, "'depht' is no argument"),
        ({"reinit": ["nothing"]}, "names no tensor"),
        ({"reinit": "network.*"}, "is a string"),
        ({"depth": 2}, "missing network.blocks.1"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, **options)


# ---------------------------------------------------------------------- resized


def test_other_sizes_are_fitted_and_said(folder, caplog):
    with caplog.at_level(logging.INFO):
        loaded = from_pretrained(folder, resize=True, num_classes=5, patch_size=4, input_size=8, in_channels=3)
    said = [line for line in caplog.messages if "resized" in line]
    assert [line.removeprefix(f"{folder}: resized network.") for line in said] == [
        "x_embedder.proj.weight: (16, 1, 2, 2) -> (16, 3, 4, 4) (patch kernel)",
        "final_layer.linear.weight: (4, 16) -> (48, 16) (patch rows)",
        "final_layer.linear.bias: (4,) -> (48,) (patch rows)",
        "y_embedder.embedding_table.weight: (4, 16) -> (6, 16) (label table)",
    ]
    source = from_pretrained(folder)
    condition, noise = Condition(label=torch.tensor([1, 2])), torch.randn(2, 1, 1, 1)
    t = torch.tensor([0.2, 0.8])
    flat = source.network(noise.expand(-1, 1, 4, 4), t, condition)
    assert loaded.network(noise.expand(-1, 3, 8, 8), t, condition).shape == (2, 3, 8, 8)
    close = {"atol": 1e-5, "rtol": 1e-5}
    tokens = [m.network.x_embedder(noise.expand(-1, *m.network.shape)) for m in (source, loaded)]
    torch.testing.assert_close(*tokens, **close)
    big = loaded.network(noise.expand(-1, 3, 8, 8), t, condition)
    corners = (slice(None), slice(None), slice(None, None, 4), slice(None, None, 4))  # of patches: not interpolated
    torch.testing.assert_close(big[corners], flat[:, :, ::2, ::2].expand(-1, 3, -1, -1), **close)


def test_a_new_run_is_fitted_to_its_own_sizes(folder, tmp_path, quiet_trainer):
    _, file = trained(tmp_path, quiet_trainer)
    for ref in (folder, file):
        made = fresh(num_classes=7)
        assert init_from(made, ref, resize=True) == []
        source = from_pretrained(ref).state_dict()[TABLE]
        table = made.network.y_embedder.embedding_table.weight
        assert torch.equal(table[[0, 1, 2, 7]], source)
        assert config_of(made)["init_args"]["network"]["init_args"]["num_classes"] == 7


def test_what_has_no_rule_must_be_named_and_the_rest_is_fitted(folder):
    options = {"num_classes": 7, "mlp_ratio": 2.0}
    with pytest.raises(ValueError, match=r"resize=True fits other sizes"):
        init_from(fresh(**options), folder)
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight has shape \(64, 16\) instead of \(32, 16\)") as caught:
        init_from(fresh(**options), folder, resize=True)
    assert "embedding_table" not in str(caught.value)
    assert "resize=True" not in str(caught.value)
    made = fresh(**options)
    assert init_from(made, folder, resize=True, reinit=["*.mlp.fc*"]) == [
        f"network.blocks.0.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    assert torch.equal(
        made.network.y_embedder.embedding_table.weight[:3], from_pretrained(folder).state_dict()[TABLE][:3]
    )


def test_named_tensors_are_not_resized(folder):
    with pytest.raises(ValueError, match=rf"saved: {TABLE} cannot be resized: 3 classes cannot become 2"):
        from_pretrained(folder, resize=True, num_classes=2)
    made = fresh(num_classes=2)
    table = made.network.y_embedder.embedding_table.weight.clone()
    assert init_from(made, folder, resize=True, reinit=["*.embedding_table.*"]) == [TABLE]
    assert torch.equal(made.network.y_embedder.embedding_table.weight, table)


class Settled(DiT):
    """A network whose constructor says nothing of sizes."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=num_classes)


def test_a_network_that_settles_its_sizes_is_loaded_as_it_is(tmp_path):
    source = model(awake(Settled()))
    source.save_pretrained(tmp_path)
    made = model(Settled())
    assert init_from(made, tmp_path) == init_from(made, tmp_path, resize=True) == []
    with pytest.raises(ValueError, match=rf"{TABLE} has shape"):
        init_from(model(Settled(4)), tmp_path, resize=True)


@pytest.mark.parametrize(("classes", "dropout"), [(4, 0.0), (3, 0.2)])
def test_as_many_rows_of_another_meaning_are_not_mistaken_for_the_same(tmp_path, classes, dropout):
    source = model(dit(num_classes=7 - classes, label_dropout=0.2 - dropout)).save_pretrained(tmp_path)
    options = {"num_classes": classes, "label_dropout": dropout}
    if classes == 4:
        with pytest.raises(ValueError, match=rf"{TABLE}: of the same shape, but of another meaning.*resize=True"):
            from_pretrained(source, **options)
        table = from_pretrained(source, resize=True, **options).state_dict()[TABLE]
        old = from_pretrained(source).state_dict()[TABLE]
        assert torch.equal(table[:3], old[:3])
        torch.testing.assert_close(table[3], old[:3].mean(0))
    else:
        with pytest.raises(ValueError, match="of another meaning"):
            from_pretrained(source, **options)
        with pytest.raises(ValueError, match="4 classes cannot become 3"):
            from_pretrained(source, resize=True, **options)
    assert from_pretrained(source, reinit=[TABLE], **options).state_dict()[TABLE].shape == (4, 16)


def test_a_last_class_may_be_said_to_mean_no_label(tmp_path):
    source = model(dit(label_dropout=0.0))
    loaded = from_pretrained(source.save_pretrained(tmp_path), absent_label="last")
    assert torch.equal(loaded.state_dict()[TABLE], source.state_dict()[TABLE])


STATISTICS = ["latent_shift", "latent_scale"]


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, False),
        ({"codec": Identity()}, False),
        ({"codec": AutoencoderKL("org/vae")}, True),
        ({"network": {"in_channels": 3}}, True),
        ({"network": {"num_classes": 4}}, False),
    ],
)
def test_statistics_of_other_latents_are_measured_anew(tmp_path, options, lost):
    source = model()
    source.set_latent_statistics(torch.tensor([0.3]), torch.tensor([0.7]))
    source.save_pretrained(tmp_path)
    made = model(dit(**options.pop("network", {})), **options)
    assert init_from(made, tmp_path, resize=True) == (STATISTICS if lost else [])
    assert made._has_statistics() is not lost


# ---------------------------------------------------------------------- classes


class Other(LatentFlowMatching):
    """A family of another package."""


def test_the_base_class_loads_every_family_and_a_family_only_its_own(folder):
    assert type(GenerativeModule.from_pretrained(folder)) is LatentFlowMatching
    assert type(LatentFlowMatching.from_pretrained(folder)) is LatentFlowMatching
    with pytest.raises(ValueError, match=r"LatentFlowMatching.* is not a subclass of .*Other"):
        Other.from_pretrained(folder)


def test_classes_of_others_need_consent(tmp_path):
    made = Other(network=dit())
    folder = made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Other.*trust_remote_code"):
        from_pretrained(folder)
    assert type(from_pretrained(folder, trust_remote_code=True)) is Other


def test_a_folder_that_is_no_generative_module_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["init_args"]["network"]))
    with pytest.raises(ValueError, match=r"not a subclass of .*LightningModule"):
        from_pretrained(folder)


# ---------------------------------------------------------------------- init_from and checkpoints


def trained(tmp_path, quiet_trainer, **options):
    """A model after two steps with a moving average, and its checkpoint."""
    items = [{name: value[i] for name, value in batch(8).items()} for i in range(8)]
    made = model(optimizer=ADAM, **options)
    trainer = quiet_trainer(max_steps=2, callbacks=[EMA(decay=0.5)])
    trainer.fit(made, DataLoader(items, batch_size=4))
    file = tmp_path / "run.ckpt"
    trainer.save_checkpoint(file)
    return made, file


def fresh(**options):
    return model(awake(dit(**options), seed=9))


def test_a_new_run_starts_from_a_folder_and_keeps_its_own_config(folder):
    made = fresh()
    made.steps = 11
    config = config_of(made)
    assert init_from(made, folder) == []
    assert config_of(made) == config
    original = from_pretrained(folder).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in made.state_dict().items())


def test_a_new_run_starts_from_the_average_of_a_checkpoint(tmp_path, quiet_trainer):
    source, file = trained(tmp_path, quiet_trainer)
    made = fresh()
    assert init_from(made, file) == []
    stored = torch.load(file, weights_only=True)
    for name, value in made.state_dict().items():
        assert torch.equal(value, stored["state_dict"][name])
        assert torch.equal(value, source.state_dict()[name])
    assert any(not torch.equal(stored["current_model_state"][name], value) for name, value in made.state_dict().items())


def test_fresh_tensors_of_a_new_run_are_returned(folder):
    made = fresh(num_classes=7)
    table = made.network.y_embedder.embedding_table.weight.clone()
    with pytest.raises(ValueError, match=TABLE):
        init_from(made, folder)
    assert init_from(made, folder, reinit=[TABLE]) == [TABLE]
    assert torch.equal(made.network.y_embedder.embedding_table.weight, table)


def test_a_failed_start_leaves_the_model_as_it_was(folder):
    made = fresh(num_classes=7)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=TABLE):
        init_from(made, folder)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.ckpt does not exist"):
        init_from(model(), tmp_path / "gone.ckpt")


def test_a_checkpoint_rebuilds_its_module_with_weights_only(tmp_path, quiet_trainer):
    made, file = trained(tmp_path, quiet_trainer, solver=Heun(), objective=FlowMatching(times=Stratified()))
    loaded = LatentFlowMatching.load_from_checkpoint(file, weights_only=True)
    assert type(loaded) is LatentFlowMatching
    assert config_of(loaded) == config_of(made)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())
    assert loaded.configure_optimizers().param_groups[0]["betas"] == (0.9, 0.95)


# ---------------------------------------------------------------------- one config

RECIPE = """
class_path: lightning_flows.modules.LatentFlowMatching
init_args:
  network:
    class_path: lightning_flows.networks.DiT
    init_args: {input_size: 4, in_channels: 1, hidden_size: 16, depth: 1, num_heads: 2, num_classes: 3}
  objective:
    class_path: lightning_flows.flow.FlowMatching
    init_args:
      times: {class_path: lightning_flows.flow.Stratified}
  guidance:
    class_path: lightning_flows.flow.ClassifierFree
    init_args: {scale: 2.0, interval: [0.1, 0.9]}
  codec:
    class_path: lightning_flows.codecs.AutoencoderKL
    init_args: {repo: org/vae}
  steps: 12
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 0.003, betas: [0.9, 0.95]}
  lr_scheduler:
    class_path: lightning_flows.modules.WarmupCosine
    init_args: {total_steps: 10, warmup_steps: 2}
"""


def by_hand():
    return LatentFlowMatching(
        network=DiT(4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3),
        objective=FlowMatching(times=Stratified()),
        guidance=ClassifierFree(2.0, interval=(0.1, 0.9)),
        codec=AutoencoderKL("org/vae"),
        steps=12,
        optimizer=ADAM,
        lr_scheduler=functools.partial(WarmupCosine, total_steps=10, warmup_steps=2),
    )


def by_command(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": recipe}))
    return LightningCLI(
        GenerativeModule,
        subclass_mode_model=True,
        run=False,
        args=["-c", str(file)],
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        parser_kwargs={"parser_mode": "omegaconf"},
    ).model


def test_python_and_the_command_line_make_one_config(tmp_path):
    hand, command = by_hand(), by_command(tmp_path, yaml.safe_load(RECIPE))
    assert config_of(command) == config_of(hand)
    assert dict(command.hparams) == dict(hand.hparams)
    for made in (hand, command):
        settings = made.configure_optimizers()
        assert settings["optimizer"].defaults["betas"] == (0.9, 0.95)
        assert settings["lr_scheduler"]["scheduler"].get_last_lr() == [0.0015] * len(settings["optimizer"].param_groups)


def test_a_config_is_itself_a_recipe_of_both(tmp_path):
    config = config_of(by_hand())
    assert json.loads(json.dumps(config)) == config
    assert config_of(build(config)) == config
    assert config_of(by_command(tmp_path, config)) == config


def test_defaults_are_written_out():
    init_args = config_of(LatentFlowMatching(network=dit()))["init_args"]
    assert init_args["steps"] == 25
    assert init_args["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    assert init_args["network"]["init_args"]["mlp_ratio"] == 4.0
    assert config_of(model(solver=Midpoint()))["init_args"]["solver"] == {
        "class_path": "lightning_flows.flow.Midpoint",
        "init_args": {},
    }
