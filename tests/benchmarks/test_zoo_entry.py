"""An entry is made of a run: stored outputs that a reloaded model repeats, pictures, figures, a card."""

import json

import pytest
import torch

from benchmarks import zoo_entry
from lightning_flows import Condition, from_pretrained
from lightning_flows.flow import Dequantization
from lightning_flows.hub import read_header
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import DiT
from lightning_flows.store import load_tensors
from tests.benchmarks.tiny import SIZES, Halves, flow, images

RECIPE = "data: {class_path: lightning_flows.data.Digits, init_args: {batch_size: 4}}\n"


def test_an_entry_of_an_autoencoder_stores_how_real_images_are_coded():
    x = images(20)[0]
    inputs = zoo_entry.inputs_of(Halves(), 10, x)
    found = zoo_entry.outputs_of(Halves(), inputs)
    assert inputs.keys() <= set(zoo_entry.INPUTS)
    assert torch.equal(found["latent"], x[..., :14])
    assert torch.equal(found["reconstruction"], Halves().decode(x[..., :14]))
    rows = torch.stack(zoo_entry.picture(Halves(), 10, x)).split(10)  # real, reconstructed, real, reconstructed
    assert torch.equal(torch.cat([rows[0], rows[2]]), x)
    assert torch.equal(torch.cat([rows[1], rows[3]]), found["reconstruction"])


@pytest.mark.parametrize("classes", [10, None])
def test_an_entry_of_a_flow_stores_a_velocity_and_samples(classes):
    model = LatentFlowMatching(network=DiT(**SIZES, num_classes=classes), steps=2)
    inputs = zoo_entry.inputs_of(model, classes, None)
    assert ("label" in inputs) == (classes is not None)
    found = zoo_entry.outputs_of(model, inputs)
    assert found["velocity"].shape == found["sample"].shape == (10, 1, 28, 28)
    assert len(zoo_entry.picture(model, classes, None)) == 80


def test_an_entry_of_a_normalizing_flow_stores_both_ways_its_density_and_samples():
    model = flow()
    inputs = zoo_entry.inputs_of(model, 10, None)
    assert inputs.keys() == {"x", "label"} <= set(zoo_entry.INPUTS)
    found = zoo_entry.outputs_of(model, inputs)
    assert found.keys() == {"z", "log_det", "log_prob", "inverse", "sample", "guided_sample"}
    assert torch.allclose(found["inverse"], inputs["x"], atol=1e-4)
    condition = Condition(label=inputs["label"])
    assert torch.allclose(found["log_prob"], model.log_prob(inputs["x"], condition), rtol=1e-5)
    plain = model.sample(condition, seed=zoo_entry.SEED, guidance=1.0)
    assert torch.allclose(found["sample"], plain, atol=1e-3)  # the automatic method may choose Jacobi
    assert not torch.allclose(found["guided_sample"], found["sample"], atol=1e-3)
    again = zoo_entry.outputs_of(model, inputs)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    assert len(zoo_entry.picture(model, 10, None)) == 80


def test_an_entry_of_a_flow_in_dequantised_pixels_stores_real_images_and_no_samples():
    model, x = flow(Dequantization(), num_classes=None), images(10)[0]
    inputs = zoo_entry.inputs_of(model, None, x)
    assert inputs.keys() == {"x"}
    assert 0 < (inputs["x"] - x).abs().max() < 2 / 255
    found = zoo_entry.outputs_of(model, inputs)
    assert found.keys() == {"z", "log_det", "log_prob", "inverse"}
    assert torch.allclose(found["log_prob"], model.log_prob(inputs["x"]), rtol=1e-5)


def test_real_images_come_from_the_data_of_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert zoo_entry.real_images(recipe, 12).shape == (12, 1, 8, 8)


def test_judged_figures_come_before_those_of_the_run(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    for folder, blocks in ((run, {"test": 2, "validate": 0}), (out, {"test": 1, "fashion": 3})):
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(blocks))
    assert list(zoo_entry.merged(run, out).items()) == [("fashion", 3), ("test", 2)]
    (run / "metrics.json").unlink()
    assert list(zoo_entry.merged(run, out).items()) == [("fashion", 3), ("test", 1)]
    (out / "metrics.json").unlink()
    assert zoo_entry.merged(run, out) == {}


def run_of(model, folder, recipe=RECIPE):
    """Folder of a run of a model."""
    (folder / "checkpoints").mkdir(parents=True)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(recipe)
    return folder


@pytest.fixture
def run(tmp_path):
    """Folder of a run of an untrained flow in pixels, whose weights are not zero."""
    model = LatentFlowMatching(network=DiT(**SIZES, num_classes=10), steps=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return run_of(model, tmp_path / "run")


def test_an_entry_stored_in_16_bits_repeats_its_outputs(run, tmp_path, monkeypatch):
    sizes = {}
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        about = ["--licence", "mit", "--data", "made up", "--summary", "A flow.", "--dtype", dtype]
        monkeypatch.setattr("sys.argv", ["zoo_entry", str(run), str(out), *about])
        threads = torch.get_num_threads()
        zoo_entry.main()
        torch.set_num_threads(threads)
        model, stored = from_pretrained(out), load_tensors(out / zoo_entry.OUTPUTS)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        found = zoo_entry.outputs_of(model, {name: stored[name] for name in zoo_entry.INPUTS if name in stored})
        for name, value in found.items():
            assert torch.allclose(value, stored[name], rtol=1e-4, atol=1e-5), name
        assert (out / "samples.png").is_file()
        assert read_header(out)["license"] == "mit"
        assert ("Stored as float16" in (out / "README.md").read_text()) == (dtype == "float16")
        sizes[dtype] = (out / "model.safetensors").stat().st_size
    assert sizes["float16"] < 0.7 * sizes["float32"]


def test_a_codec_on_this_machine_makes_no_entry(tmp_path, monkeypatch, run):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["codec"] = {
        "class_path": "lightning_flows.codecs.AutoencoderKL",
        "init_args": {"repo": str(tmp_path / "kl")},
    }
    torch.save(content, run / "checkpoints" / "last.ckpt")
    about = ["--licence", "mit", "--data", "made up", "--summary", "A flow."]
    monkeypatch.setattr("sys.argv", ["zoo_entry", str(run), str(tmp_path / "out"), *about])
    with pytest.raises(ValueError, match="is a path on this machine"):
        zoo_entry.main()
    assert not (tmp_path / "out" / zoo_entry.OUTPUTS).exists()


@pytest.mark.parametrize(
    ("model", "classes"),
    [(flow(), 10), (flow(Dequantization(), num_classes=None, input_size=8, patch_size=4), 0)],
    ids=["tarflow", "dequantised"],
)
def test_an_entry_of_a_normalizing_flow_is_whole(tmp_path, monkeypatch, model, classes):
    run, out = run_of(model, tmp_path / "run"), tmp_path / "out"
    about = ["--licence", "mit", "--data", "made up", "--summary", "A flow.", "--dtype", "float16"]
    monkeypatch.setattr("sys.argv", ["zoo_entry", str(run), str(out), *about, "--classes", str(classes)])
    threads = torch.get_num_threads()
    zoo_entry.main()
    torch.set_num_threads(threads)
    stored = load_tensors(out / zoo_entry.OUTPUTS)
    inputs = {name: stored[name] for name in zoo_entry.INPUTS if name in stored}
    found = zoo_entry.outputs_of(from_pretrained(out), inputs)
    assert found.keys() == stored.keys() - inputs.keys()
    for name, value in found.items():
        assert (value - stored[name]).abs().max() <= 1e-4 * stored[name].abs().max(), name
    assert read_header(out)["tags"] == ["normalizing-flow", "lightning"]
    assert (out / "samples.png").is_file()
