import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_flows.flow import Condition, Trigonometric
from lightning_flows.hub.convert import FORMATS, Format, convert, load_network, read_state
from lightning_flows.hub.convert.lfm_adm import load_rescaler
from lightning_flows.networks import ADMUNet, EDMUNet, ReversedTime, SemanticRescaler
from lightning_flows.store import read_config
from tests.hub.official_unets import Weights, adm, edm

ADM = {
    "hidden_size": 32,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_factors": (2,),
    "out_channels": 4,
    "inputs": 4,
    "size": 8,
}
EDM = {
    "hidden_size": 32,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_sizes": (4,),
    "out_channels": 4,
    "inputs": 4,
    "size": 8,
}
GUIDED = {**ADM, "out_channels": 6, "inputs": 3, "size": 16, "head_channels": 32, "resblock_updown": True}
LABELS = torch.tensor([2, 0])
TIMES = torch.tensor([0.3, 0.9])


def points(hyper, channels):
    source = torch.Generator().manual_seed(7)
    whole = torch.randn(2, hyper["inputs"], hyper["size"], hyper["size"], generator=source)
    return whole, whole[:, :channels], whole[:, channels:]


def official(model, hyper, t=TIMES):
    """A state dict, and what the official network answers at their time ``t``."""
    weights, whole = Weights(), points(hyper, 0)[0]
    value = model(weights, whole, t, hyper, LABELS if hyper.get("num_classes") else None)
    return dict(weights), value


def ours(network, hyper):
    x, rest = points(hyper, network.in_channels)[1:]
    label = LABELS if "label" in network.streams else None
    with torch.no_grad():
        return network(x, 1 - TIMES, Condition(label=label, spatial=rest if rest.shape[1] else None))


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


# ---- networks ----

ADM_CASES = {
    "plain": ({}, {}),
    "class": ({"num_classes": 5}, {}),
    "inpainting": ({"inputs": 9}, {}),
    "heads": ({"num_heads": 2}, {"num_heads": 2}),
    "channels per head": ({"head_channels": 32}, {"head_channels": 32}),
    "by kind": ({"qkv_order": "kind"}, {"qkv_order": "kind"}),
    "additive": ({"scale_shift": False, "hidden_size": 64}, {}),
    "residual steps": ({"resblock_updown": True, "qkv_order": "kind"}, {"qkv_order": "kind"}),
    "residual steps, two blocks": ({"resblock_updown": True, "num_blocks": 2, "attention_factors": ()}, {}),
    "fixed steps": ({"conv_resample": False, "num_blocks": 2}, {}),
    "three levels": ({"channel_mult": (2, 1, 3), "attention_factors": (1, 4), "num_blocks": 2, "size": 16}, {}),
    "one level": ({"channel_mult": (1,), "attention_factors": (1,), "num_blocks": 3, "size": 4}, {}),
    "half width": ({"hidden_size": 64, "channel_mult": (0.5, 1)}, {}),
    "another size": ({"size": 12}, {"input_size": 12}),
}


@pytest.mark.parametrize("case", ADM_CASES)
@pytest.mark.filterwarnings("error")
def test_an_adm_network_is_the_official_one(case):
    changes, told = ADM_CASES[case]
    hyper = {**ADM, **changes}
    state, expected = official(adm, hyper)
    network = load_network("lfm-adm", state, **told)
    assert isinstance(network, ReversedTime)
    assert network.shape == (4, hyper["size"], hyper["size"])
    close(-ours(network, hyper), expected)


EDM_CASES = {
    "plain": ({}, {}),
    "class": ({"num_classes": 5}, {}),
    "map": ({"inputs": 8}, {}),
    "heads": ({"head_channels": 16, "attention_sizes": (4, 8)}, {"head_channels": 16}),
    "heads of 24": ({"head_channels": 24, "channel_mult": (3, 1)}, {"head_channels": 24}),
    "three levels": (
        {"channel_mult": (1, 3, 2), "attention_sizes": (8,), "num_blocks": 2, "size": 16, "embedding_mult": 2},
        {},
    ),
    "one level": ({"channel_mult": (2,), "attention_sizes": (8,)}, {}),
}


@pytest.mark.parametrize("case", EDM_CASES)
@pytest.mark.filterwarnings("error")
def test_an_edm_network_is_the_official_one(case):
    changes, told = EDM_CASES[case]
    hyper = {**EDM, **changes}
    state, expected = official(edm, hyper)
    network = load_network("lfm-edm", state, **told)
    assert network.shape == (4, hyper["size"], hyper["size"])
    close(-ours(network, hyper), expected)


def test_an_edm_network_too_narrow_for_heads_has_no_attention():
    hyper = {**EDM, "channel_mult": (1, 1)}
    state, expected = official(edm, hyper)
    with pytest.warns(UserWarning, match="no attention"):
        network = load_network("lfm-edm", state)
    close(-ours(network, hyper), expected)


def test_an_absent_edm_label_is_the_zero_vector():
    hyper = {**EDM, "num_classes": 5}
    state, _ = official(edm, hyper)
    weights = Weights()
    weights.update(state)
    x = points(hyper, 4)[1]
    expected = edm(weights, x, TIMES, hyper)
    network = load_network("lfm-edm", state)
    with torch.no_grad():
        close(-network(x, 1 - TIMES), expected)
        close(-network(x, 1 - TIMES, network.null(Condition(label=LABELS), 2)), expected)


@pytest.mark.parametrize(
    ("format", "changes", "told"),
    [
        ("guided-diffusion", {}, {"head_channels": 32}),
        ("guided-diffusion", {"head_channels": None, "num_heads": 4}, {"num_heads": 4}),
        ("guided-diffusion", {"inputs": 6, "num_classes": 5, "head_channels": 64}, {}),
        ("guided-diffusion", {"out_channels": 3, "head_channels": 64}, {}),
        ("guided-diffusion-cosine", {"qkv_order": "kind"}, {"head_channels": 32}),
        ("guided-diffusion-cosine", {"qkv_order": "head"}, {"head_channels": 32, "qkv_order": "head"}),
    ],
)
def test_a_guided_diffusion_network_predicts_noise_at_step_999_for_pure_noise(format, changes, told):
    hyper = {**GUIDED, **changes}
    state, expected = official(adm, hyper, t=999 * TIMES)
    network = load_network(format, state, **told)
    assert network.prediction == "noise"
    assert network.shape == (3, 16, 16)
    # float32 steps of 999 t differ by 3e-5, which the sinusoid keeps
    torch.testing.assert_close(ours(network, hyper), expected[:, :3], rtol=1e-3, atol=1e-3)


def test_labels_of_adm_files_cannot_be_absent():
    state, _ = official(adm, {**ADM, "num_classes": 5})
    network = load_network("lfm-adm", state)
    with pytest.raises(ValueError, match=r"label is absent.*5 classes"):
        network(points(ADM, 4)[1], TIMES)


def test_the_cosine_clock_is_the_quarter_circle():
    """At equal signal-to-noise ratio, 999 (1 - t) is the discrete step up to 9.1 of 1000."""
    steps = torch.arange(1000, dtype=torch.float64)
    angle = ((steps + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2
    alpha = torch.cos(angle) / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64))
    t = torch.linspace(0, 1, 200001, dtype=torch.float64)
    nearest = t[torch.searchsorted(Trigonometric().alpha(t), alpha).clamp(max=len(t) - 1)]
    difference = (999 * (1 - nearest) - steps).abs()
    assert difference[1:].max() < 9.1
    assert difference[-1] < 0.1


# ---- files that do not fit ----


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_(name, value):
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("out.0.bias"), r"missing out\.0\.bias"),
        (without("input_blocks.3.1.proj_out.weight"), r"missing input_blocks\.3\.1\.proj_out\.weight"),
        (without("time_embed.0.weight"), r"no 'time_embed\.0\.weight'"),
        (without("label_emb.weight"), None),
        (with_("out.3.weight", torch.ones(3)), r"unknown out\.3\.weight"),
        (with_("middle_block.1.qkv.weight", torch.ones(5, 64, 1)), r"middle_block\.1\.qkv\.weight has shape \(5, 64"),
        (with_("out.2.weight", torch.ones(7, 32, 3, 3)), "4 inputs and 7 outputs"),
        (with_("input_blocks.4.0.op.bias", torch.ones(3)), r"5 input blocks.*1 residual"),
        (lambda state: official(edm, EDM)[0], r"no 'time_embed\.0\.weight'"),
    ],
)
def test_adm_tensors_that_do_not_fit_are_named(damage, message):
    state, _ = official(adm, {**ADM, "num_classes": 5})
    if message is None:  # a file without labels is a network without labels
        assert load_network("lfm-adm", damage(state)).streams == ()
        return
    with pytest.raises(ValueError, match=message):
        load_network("lfm-adm", damage(state))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("out_norm.bias"), r"missing out_norm\.bias"),
        (without("enc.8x8_conv.weight"), r"no 'enc\.8x8_conv\.weight'"),
        (with_("map_augment.weight", torch.ones(3, 3)), r"unknown map_augment\.weight"),
        (with_("map_label.weight", torch.ones(7, 3)), r"map_label\.weight has shape"),
        (with_("dec.8x8_up.conv0.resample_filter", torch.ones(1, 1, 4, 4)), r"dec\.8x8_up\.conv0\.resample_filter"),
        (with_("enc.1x1_block0.conv1.weight", torch.ones(3)), r"\[8, 4, 1\] wide"),
        (lambda state: official(adm, ADM)[0], r"no 'map_layer0\.weight'"),
    ],
)
def test_edm_tensors_that_do_not_fit_are_named(damage, message):
    state, _ = official(edm, EDM)
    with pytest.raises(ValueError, match=message):
        load_network("lfm-edm", damage(state))


def test_attention_with_fewer_channels_than_a_head_asks_for_heads():
    state, _ = official(edm, {**EDM, "head_channels": 16})
    with pytest.raises(ValueError, match=r"num_heads or head_channels"):
        load_network("lfm-edm", state, head_channels=128)


def test_an_argument_that_a_format_does_not_have_is_an_error(tmp_path):
    state, _ = official(edm, EDM)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"lfm-edm has no option qkv_order; it has \['num_heads'"):
        convert("lfm-edm", tmp_path / "model.pth", tmp_path / "out", qkv_order="kind")
    with pytest.raises(ValueError, match="sit has no option head_channels"):
        load_network("sit", state, head_channels=64)


# ---- files and folders ----

FILES = {
    "lfm-adm": (adm, {**ADM, "inputs": 9}, {}),
    "lfm-edm": (edm, {**EDM, "num_classes": 5}, {}),
    "guided-diffusion": (adm, {**GUIDED, "num_classes": 5}, {"head_channels": 32}),
    "guided-diffusion-cosine": (adm, {**GUIDED, "qkv_order": "kind"}, {"head_channels": 32}),
}


def written(tmp_path, state, kind):
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "content.pth")
    wrapped = {f"module.{name}": value for name, value in state.items()}
    if kind == "safetensors":
        save_file(wrapped, file)
    elif kind == "resume":
        args = argparse.Namespace(model_type="adm", attn_resolutions=[16, 8])
        aside = {"epoch": 1, "global_step": 2, "args": args, "optimizer": {}, "scheduler": {}}
        mapper = {"module.channel_mapper.weight": torch.randn(4, 19, 1, 1)}
        torch.save({**aside, "model_dict": wrapped, "cond_stage_model_dict": mapper}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("lfm-adm", "resume"),
        ("lfm-adm", "bare"),
        ("lfm-edm", "safetensors"),
        ("guided-diffusion", "bare"),
        ("guided-diffusion-cosine", "safetensors"),
    ],
)
def test_a_converted_folder_loads_and_is_the_same_network(tmp_path, format, kind):
    from lightning_flows.modules import from_pretrained

    model, hyper, told = FILES[format]
    state, _ = official(model, hyper)
    out = convert(format, written(tmp_path, state, kind), tmp_path / "out", **told)
    network = from_pretrained(out).eval().network
    assert torch.equal(ours(network, hyper), ours(load_network(format, state, **told), hyper))
    card = (out / "README.md").read_text()
    assert f"license: {FORMATS[format].licence}\n" in card
    assert FORMATS[format].licence_note in card
    entry = read_config(out)["init_args"]
    json.dumps(entry)
    assert entry["network"]["class_path"] == "lightning_flows.networks.ReversedTime"


@pytest.mark.parametrize(
    ("format", "path", "codec"),
    [
        ("lfm-adm", "lightning_flows.flow.Linear", "lightning_flows.codecs.AutoencoderKL"),
        ("lfm-edm", "lightning_flows.flow.Linear", "lightning_flows.codecs.AutoencoderKL"),
        ("guided-diffusion", "lightning_flows.flow.VariancePreserving", "lightning_flows.codecs.Identity"),
        ("guided-diffusion-cosine", "lightning_flows.flow.Trigonometric", "lightning_flows.codecs.Identity"),
    ],
)
def test_the_published_conventions_are_in_the_config(format, path, codec):
    model, hyper, told = FILES[format]
    module = FORMATS[format].module(load_network(format, official(model, hyper)[0], **told))
    entry = module.config["init_args"]
    guided = format.startswith("guided")
    assert entry["objective"]["init_args"]["path"]["class_path"] == path
    assert entry["objective"]["init_args"]["prediction"] == ("noise" if guided else "velocity")
    assert entry["codec"]["class_path"] == codec
    assert entry["network"]["init_args"]["network"]["init_args"]["time_scale"] == (999.0 if guided else 1.0)
    if not guided:
        assert entry["objective"]["init_args"]["path"]["init_args"] == {"sigma_min": 1e-5}
        assert entry["codec"]["init_args"]["scale"] == 0.18215
        assert (entry["solver"]["init_args"]["rtol"], entry["solver"]["init_args"]["atol"]) == (1e-5, 1e-5)


def test_a_converted_pixel_model_samples():
    state, _ = official(adm, GUIDED)
    model = FORMATS["guided-diffusion"].module(load_network("guided-diffusion", state, head_channels=32))
    assert model.sample(n=2, seed=0, steps=2).shape == (2, 3, 16, 16)


def test_the_condition_encoder_of_a_resumed_run_is_read_beside_the_network(tmp_path):
    state, _ = official(adm, ADM)
    file = written(tmp_path, state, "resume")
    assert set(read_state(file)) == set(state)
    rescaler = load_rescaler(read_state(file, "condition"))
    assert isinstance(rescaler, SemanticRescaler)
    stored = torch.load(file, weights_only=False)["cond_stage_model_dict"]["module.channel_mapper.weight"]
    assert torch.equal(rescaler.channel_mapper.weight, stored)
    with pytest.raises(ValueError, match=r"no 'channel_mapper\.weight'"):
        load_rescaler(state)


def test_sizes_come_from_the_file(tmp_path):
    hyper = {**ADM, "channel_mult": (1, 2, 1), "num_blocks": 2, "attention_factors": (1, 4), "size": 16}
    network = load_network("lfm-adm", official(adm, hyper)[0]).network
    assert type(network) is ADMUNet
    found = {name: network.config["init_args"][name] for name in ("channel_mult", "num_blocks", "attention_factors")}
    assert found == {"channel_mult": [1, 2, 1], "num_blocks": 2, "attention_factors": [1, 4]}
    network = load_network("lfm-edm", official(edm, EDM)[0], label_dropout=0.1).network
    assert type(network) is EDMUNet
    assert network.config["init_args"]["attention_sizes"] == [4]
    assert network.config["init_args"]["label_dropout"] == 0  # no labels, nothing to drop


def test_a_format_may_convert_by_itself(tmp_path, monkeypatch):
    seen = {}

    def own(file, out, **options):
        seen.update(options, file=file)
        return out

    form = Format("own", "somebody", "mit", "", convert=own, options=("input_size", "weights"))
    monkeypatch.setitem(FORMATS, "own", form)
    assert convert("own", tmp_path, tmp_path / "out", input_size=3, weights="raw") == tmp_path / "out"
    assert seen == {"input_size": 3, "weights": "raw", "file": tmp_path}
    with pytest.raises(ValueError, match="own has no option num_heads"):
        convert("own", tmp_path, tmp_path / "out", num_heads=3)
    with pytest.raises(ValueError, match="own holds no network"):
        load_network("own", {})
