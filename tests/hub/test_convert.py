import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_flows.flow import Condition
from lightning_flows.hub.convert import FORMATS, convert, load_network, read_state
from lightning_flows.hub.convert.transformer import HEADS
from lightning_flows.networks import DiT, ReversedTime
from lightning_flows.store import load_tensors, read_config

TRANSFORMERS = ("dit", "lfm-dit", "sit")  # the U-Nets are in test_convert_unet.py
SIZES = {
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "frequency_size": 32,
    "num_classes": 5,
    "label_dropout": 0.1,
}


def original(input_size=8, seed=0, **arguments):
    """A network under its official names, as the authors' code has it."""
    network = DiT(input_size, **{**SIZES, **arguments})
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return network.eval()


def official(network):
    return {**network.state_dict(), "pos_embed": network.pos_embed.clone()}


def save(tmp_path, content, name="model.pth"):
    file = tmp_path / name
    torch.save(content, file)
    return file


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


# ---- reading files ----


@pytest.mark.parametrize("wrap", [dict, prefixed], ids=["bare", "module."])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_the_prefix_is_stripped_where_it_is(tmp_path, wrap, kind):
    state = official(original())
    file = tmp_path / f"model.{kind}"
    torch.save(wrap(state), file) if kind == "pth" else save_file(wrap(state), file)
    read = read_state(file)
    assert set(read) == set(state)
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_a_prefix_on_some_keys_only_is_an_error(tmp_path):
    state = prefixed(official(original()))
    state["pos_embed"] = state.pop("module.pos_embed")
    with pytest.raises(ValueError, match=r"model\.pth.*only some keys.*pos_embed"):
        read_state(save(tmp_path, state))


@pytest.mark.parametrize(("weights", "seed"), [(None, 1), ("ema", 1), ("raw", 0)])
def test_the_average_is_taken_unless_the_raw_weights_are_asked_for(tmp_path, weights, seed):
    content = {
        "model": official(original(seed=0)),
        "ema": official(original(seed=1)),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-XL/2", image_size=256),
    }
    read = read_state(save(tmp_path, content), weights)
    assert torch.equal(read["pos_embed"], content["ema"]["pos_embed"])
    assert torch.equal(read["final_layer.linear.bias"], original(seed=seed).final_layer.linear.bias)


def test_a_resume_file_with_a_namespace_is_read(tmp_path):
    state = official(original())
    content = {
        "epoch": 3,
        "global_step": 9,
        "args": argparse.Namespace(lr=1e-4),
        "optimizer": {},
        "scheduler": {},
    }
    content["model_dict"] = prefixed(state)
    file = save(tmp_path, content)
    assert set(read_state(file)) == set(state)
    assert set(read_state(file, "raw")) == set(state)
    with pytest.raises(ValueError, match=r"weights='ema'.*only \['raw'\]"):
        read_state(file, "ema")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_bare_file_offers_no_choice_of_weights(tmp_path, weights):
    with pytest.raises(ValueError, match=rf"weights='{weights}'.*bare state dict"):
        read_state(save(tmp_path, official(original())), weights)


def test_an_unknown_choice_of_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"weights.*ema.*raw.*'best'"):
        read_state(save(tmp_path, official(original())), "best")


class Danger:
    def __reduce__(self):
        return print, ("code of the file was executed",)


def test_code_in_a_pickle_is_never_executed(tmp_path, capsys):
    content = {"model": official(original()), "args": Danger()}
    with pytest.raises(ValueError, match=r"model\.pth"):
        read_state(save(tmp_path, content))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, kept):
    file = save(tmp_path, official(original()))
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"model\.pth"):
        read_state(file)


def test_a_web_page_saved_as_weights_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "model.pth"
    file.write_text("<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    with pytest.raises(ValueError, match=r"model\.pth"):
        read_state(file)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "list, not a state dict"),
        ({}, "not a state dict"),
        ({"x": torch.zeros(2), "n": 3}, "'n' must be a tensor.*int"),
        ({"x": torch.zeros(2), "n": torch.arange(3)}, "'n' must be a tensor.*int64"),
        ({"model": {"x": torch.zeros(2)}, "second_stage_model": {}}, "second_stage_model"),
    ],
)
def test_contents_that_nobody_understands_are_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_state(save(tmp_path, content))


# ---- networks ----


def inputs(network):
    source = torch.Generator().manual_seed(5)
    return torch.randn(3, *network.shape, generator=source), torch.tensor([0.0, 0.3, 1.0])


LABELS = Condition(label=torch.tensor([0, 4, 2]))


def test_a_sit_network_is_taken_as_it_is():
    network = original(learn_sigma=True, patch_size=4, mlp_ratio=2.5, max_period=300.0)
    ours = load_network("sit", official(network), num_heads=2, max_period=300.0)
    x, t = inputs(network)
    assert type(ours) is DiT
    assert torch.equal(ours(x, t, LABELS), network(x, t, LABELS))
    assert torch.equal(ours(x, t), network(x, t))


def test_an_lfm_network_runs_from_noise_to_data():
    network = original()
    ours = load_network("lfm-dit", official(network), num_heads=2)
    x, t = inputs(network)
    torch.testing.assert_close(ours(x, t, LABELS), -network(x, 1 - t, LABELS))


def test_a_dit_network_predicts_noise_at_step_999_for_pure_noise():
    network = original(learn_sigma=True)
    ours = load_network("dit", official(network), num_heads=2)
    x, t = inputs(network)
    assert isinstance(ours, ReversedTime)
    assert ours.prediction == "noise"
    torch.testing.assert_close(ours(x, t, LABELS), network(x, 999 * (1 - t), LABELS), rtol=1e-3, atol=1e-3)


def test_the_label_table_tells_classes_and_null_row():
    classes = [
        ({"num_classes": 1, "label_dropout": 0.0}, {}, (1, 0.0)),
        ({"num_classes": 1, "label_dropout": 0.1}, {}, (1, 0.1)),
        ({"num_classes": 5, "label_dropout": 0.1}, {}, (5, 0.1)),
        ({"num_classes": 5, "label_dropout": 0.0}, {"label_dropout": 0.0}, (5, 0.0)),
        ({"num_classes": 5, "label_dropout": 0.2}, {"label_dropout": 0.2}, (5, 0.2)),
    ]
    for made, told, (number, dropout) in classes:
        ours = load_network("sit", official(original(**made)), num_heads=2, **told)
        assert (ours.y_embedder.num_classes, ours.y_embedder.dropout) == (number, dropout)


def test_without_null_row_the_last_class_stands_for_no_label_as_in_the_official_code():
    network = original(label_dropout=0.0)
    x, t = inputs(network)
    last = Condition(label=torch.full((3,), 4))
    ours = load_network("sit", official(network), num_heads=2, label_dropout=0.0)
    assert torch.equal(ours(x, t), network(x, t, last))


def test_a_null_row_needs_two_rows():
    state = official(original(num_classes=1, label_dropout=0.0))
    with pytest.raises(ValueError, match=r"label_dropout=0.1.*one row"):
        load_network("sit", state, num_heads=2, label_dropout=0.1)


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_rectangular_grids_convert_when_they_are_named(size):
    network = original(input_size=size)
    state = official(network)
    with pytest.raises(ValueError, match="input_size"):
        load_network("sit", state, num_heads=2)
    assert load_network("sit", state, num_heads=2, input_size=size).shape == network.shape
    with pytest.raises(ValueError, match="pos_embed"):
        load_network("sit", state, num_heads=2, input_size=size[::-1])
    with pytest.raises(ValueError, match=r"input_size=6.*8 tokens"):
        load_network("sit", state, num_heads=2, input_size=6)


def test_heads_of_published_widths_are_known():
    assert HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16}
    state = official(original(hidden_size=384, depth=1, num_heads=6))
    assert load_network("sit", state).config["init_args"]["num_heads"] == 6


def test_heads_of_other_widths_must_be_told():
    with pytest.raises(ValueError, match=r"num_heads is needed: hidden_size=16"):
        load_network("sit", official(original()))


def change(name, value):
    return lambda state: {**state, name: value}


def remove(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("blocks.0.attn.q_norm.weight", torch.ones(8)), r"unknown.*blocks\.0\.attn\.q_norm\.weight"),
        (change("blocks.0.attn.qkv.weight", torch.ones(47, 16)), r"blocks\.0\.attn\.qkv\.weight.*\(47, 16\)"),
        (change("final_layer.linear.weight", torch.ones(24, 16)), r"final_layer\.linear\.weight.*\(24, 16\)"),
        (change("x_embedder.proj.weight", torch.ones(16, 4)), r"x_embedder\.proj\.weight.*\(16, 4\)"),
        (change("pos_embed", torch.zeros(1, 16, 16)), r"pos_embed.*sine-cosine"),
        (remove("blocks.1.mlp.fc2.bias"), r"missing blocks\.1\.mlp\.fc2\.bias"),
        (remove("pos_embed"), "'pos_embed'"),
        (remove("y_embedder.embedding_table.weight"), r"y_embedder\.embedding_table\.weight"),
        (lambda state: {"time_embed.0.weight": torch.ones(2, 2)}, r"x_embedder\.proj\.weight"),
    ],
)
@pytest.mark.parametrize("format", TRANSFORMERS)
def test_tensors_that_do_not_fit_are_named(format, damage, message):
    with pytest.raises(ValueError, match=message):
        load_network(format, damage(official(original())), num_heads=2)


def test_an_unknown_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"format.*dit.*lfm-dit.*sit.*'flux'"):
        convert("flux", tmp_path / "a", tmp_path / "b")


# ---- folders ----


@pytest.mark.parametrize("format", TRANSFORMERS)
def test_a_converted_folder_loads_and_is_the_same_network(tmp_path, format):
    from lightning_flows.modules import from_pretrained

    network = original(learn_sigma=format != "lfm-dit")
    file = save(tmp_path, prefixed(official(network)))
    out = convert(format, file, tmp_path / "out", num_heads=2)
    model = from_pretrained(out)
    x, t = inputs(network)
    expected = load_network(format, official(network), num_heads=2)(x, t, LABELS)
    assert torch.equal(model.network(x, t, LABELS), expected)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "network.pos_embed" not in load_tensors(out / "model.safetensors")
    card = (out / "README.md").read_text()
    assert f"license: {FORMATS[format].licence}\n" in card
    assert FORMATS[format].licence_note in card


def test_the_published_conventions_are_in_the_config(tmp_path):
    entries = {}
    for format in TRANSFORMERS:
        file = save(tmp_path, official(original()))
        entries[format] = read_config(convert(format, file, tmp_path / format, num_heads=2))["init_args"]
    lfm, sit, dit = entries["lfm-dit"], entries["sit"], entries["dit"]
    assert {e["codec"]["init_args"]["scale"] for e in entries.values()} == {0.18215}
    assert lfm["codec"]["init_args"]["repo"] == "stabilityai/sd-vae-ft-mse"
    assert lfm["network"]["class_path"] == "lightning_flows.networks.ReversedTime"
    assert lfm["objective"]["init_args"]["path"]["init_args"] == {"sigma_min": 1e-5}
    assert sit["network"]["class_path"] == "lightning_flows.networks.DiT"
    assert sit["objective"]["init_args"]["path"]["init_args"] == {"sigma_min": 0.0}
    assert dit["objective"]["init_args"]["prediction"] == "noise"
    assert dit["objective"]["init_args"]["path"]["class_path"] == "lightning_flows.flow.VariancePreserving"
    assert dit["network"]["init_args"]["network"]["init_args"]["time_scale"] == 999.0
    assert all(e["solver"]["class_path"].startswith("lightning_flows.flow.") for e in entries.values())
    json.dumps(entries)


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path):
    file = save(tmp_path, remove("blocks.1.mlp.fc2.bias")(official(original())))
    with pytest.raises(ValueError, match=r"model\.pth cannot be converted as sit.*fc2\.bias"):
        convert("sit", file, tmp_path / "out", num_heads=2)
    assert not (tmp_path / "out").exists()


def test_the_dit_clock_matches_the_diffusion_schedule():
    """At equal signal-to-noise ratio, 999 (1 - t) is the discrete step up to 3.5 of 1000."""
    from lightning_flows.flow import VariancePreserving

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = torch.log1p(-betas).cumsum(0).mul(0.5).exp()
    t = torch.linspace(0, 1, 200001, dtype=torch.float64)
    ours = VariancePreserving(0.1, 20.0).alpha(t)  # rises with t
    nearest = t[torch.searchsorted(ours, alpha).clamp(max=len(t) - 1)]
    difference = (999 * (1 - nearest) - torch.arange(1000)).abs()
    assert difference.max() < 3.5
    assert difference.mean() < 1.5
