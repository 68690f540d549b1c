"""A model that draws and reads, from the command line: what a test measures without being told, and its tasks."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lightning_flows.cli import dispatch, main
from lightning_flows.cli.evaluation import semantic_metrics, usual_metrics
from lightning_flows.codecs import AutoencoderKL, ClassPlane, JointSemantics, OneHot, RGBPalette
from lightning_flows.data import Shapes
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import ADMUNet
from tests.cli.test_trainer_verbs import refused
from tests.mask_stand_ins import picked, pixels, save

ROOT = Path(__file__).parents[2]
SIZES = {"input_size": 8, "hidden_size": 32, "channel_mult": [1, 2], "num_blocks": 1, "attention_factors": []}
ITEMS = 12
DISTANCES = [f"{name}[pixels]" for name in ("frechet", "kernel", "prdc", "sliced_wasserstein")]


def entry(room, name, **arguments):
    return {"class_path": f"lightning_flows.{room}.{name}", "init_args": arguments}


def recipe():
    """Shapes of 8 pixels and both fields, without an Evaluation."""
    parts = [entry("codecs", "OneHot", num_classes=6), entry("codecs", "OneHot", num_classes=5, per="image")]
    model = {
        "network": entry("networks", "ADMUNet", in_channels=14, head_channels=32, **SIZES),
        "semantic": entry("codecs", "JointSemantics", parts=parts),
        "objective": entry("flow", "SymmetricMatching", read_rate=0.2, drop_rate=0.1),
        "steps": 2,
    }
    data = entry("data", "Shapes", size=8, n_train=ITEMS, n_val=ITEMS, n_test=ITEMS, batch_size=8)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 1}
    return {"model": entry("modules", "SymmFlow", **model), "data": data, "trainer": trainer}


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    """Folder with the recipe and, in ``runs/shapes``, a run of one step."""
    torch.set_num_threads(1)
    folder, before = tmp_path_factory.mktemp("symmflow"), Path.cwd()
    (folder / "shapes.yaml").write_text(yaml.safe_dump(recipe()))
    os.chdir(folder)
    try:
        dispatch(["fit", "-c", "shapes.yaml"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def in_shapes(shapes_run, monkeypatch):
    """The same, as working directory."""
    monkeypatch.chdir(shapes_run)
    return shapes_run


def measured(out, *options):
    """Entries of a test."""
    main(["test", "-c", "shapes.yaml", "--ckpt_path", "runs/shapes/checkpoints/last.ckpt",
          "--trainer.default_root_dir", str(out), *options])  # fmt: skip
    return json.loads((out / "metrics.json").read_text())["test"]["values"]


def test_a_test_measures_both_directions_without_being_told(in_shapes, tmp_path):
    found = measured(tmp_path)
    assert list(found) == [*DISTANCES, "miou", "pixel_accuracy", "accuracy", "calibration"]
    assert (found["miou"]["num_classes"], found["accuracy"]["num_classes"]) == (6, 5)
    assert 0 <= found["pixel_accuracy"]["value"] <= 1
    assert found["frechet[pixels]"]["samples"] == ITEMS
    assert found["frechet[pixels]"]["nfe"] == 2


def test_several_samples_for_each_item_are_a_value_of_their_own(in_shapes, tmp_path):
    found = measured(tmp_path, "--per_item", "3")
    one, three = found["frechet[pixels]"], found["frechet[pixels][per_item=3]"]
    assert (one["samples"], one["samples_per_item"]) == (ITEMS, 1)
    assert (three["samples"], three["samples_per_item"], three["real"]) == (3 * ITEMS, 3, ITEMS)
    assert three["value"] != one["value"]
    assert found["miou"]["value"].keys() == {"mean", "per_class"}


def test_samples_and_per_item_exclude_each_other(in_shapes, tmp_path):
    where = ["--ckpt_path", "last", "--trainer.default_root_dir", str(tmp_path)]
    message = refused(["test", "-c", "shapes.yaml", *where[:2], "--samples", "9", "--per_item", "2"])
    assert "samples must be None beside per_item=2" in message


def test_a_recipe_that_says_what_is_measured_allows_no_per_item(in_shapes, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry("callbacks", "Evaluation")]}}))
    ckpt = ["--ckpt_path", "runs/shapes/checkpoints/last.ckpt"]
    message = refused(["test", "-c", "shapes.yaml", "-c", str(own), *ckpt, "--per_item", "2"])
    assert "--per_item: the recipe has an Evaluation of the test" in message


def test_the_recipe_of_the_docs_goes_over_the_one_of_shapes(tmp_path, monkeypatch):
    text = (ROOT / "docs/symmflow.md").read_text()
    (found,) = re.findall(r"```yaml\n(# mine\.yaml\n.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(found)
    for kind, values in (("images", pixels(64, 32, 3)), ("masks", picked(64, 32, range(19)))):
        for i, value in enumerate(values):
            save(tmp_path / f"faces/{kind}/{i}.png", value)
    monkeypatch.chdir(tmp_path)
    run = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"]
    cli = dispatch(["fit", "-c", str(ROOT / "configs/symmflow/shapes.yaml"), "-c", "mine.yaml", *run])
    assert cli.model.semantic.num_classes == {"mask": 19}
    assert cli.model.network.codes == 19
    assert Path("runs/mine/checkpoints/last.ckpt").is_file()


def test_what_lightning_refuses_is_a_sentence(in_shapes):
    message = refused(["fit", "-c", "shapes.yaml", "--run_name", "other", "--trainer.val_check_interval", "1.0",
                       "--trainer.check_val_every_n_epoch", "null"])  # fmt: skip
    assert message.startswith("lightning-flows fit: `val_check_interval` should be an integer")


def picture(folder, name, image):
    file = folder / f"{name}.png"
    image.save(file)
    return str(file)


def test_pictures_are_read_and_edited(in_shapes, tmp_path):
    item = Shapes(size=8, n_train=1).read("train")[0]
    image = picture(tmp_path, "image", Image.fromarray(item["image"].permute(1, 2, 0).numpy()))
    mask = picture(tmp_path, "mask", Image.fromarray(item["mask"].numpy()))
    where = ["--ckpt_path", "last", "--run_name", "shapes"]

    main(["predict", "-c", "shapes.yaml", *where, f"--data.images=[{image}]", "--data.task=segment",
          "--data.task_options={votes: 3, uncertainty: true}"])  # fmt: skip
    read = in_shapes / "runs/shapes/predictions"
    found = Image.open(read / "00000.png")
    assert (found.mode, found.size) == ("P", (8, 8))
    assert max(found.getdata()) < 6
    assert Image.open(read / "00000-uncertainty.png").size == (8, 8)
    record = json.loads((read / "00000-class.json").read_text())
    assert len(record["scores"]) == 5
    assert sum(record["scores"]) == pytest.approx(1, abs=1e-4)

    main(["predict", "-c", "shapes.yaml", *where, f"--data.images=[{image}]", "--data.task=classify"])
    assert json.loads((read / "00000.json").read_text())["label"] in range(5)

    main(["predict", "-c", "shapes.yaml", *where, f"--data.images=[{image}]", f"--data.masks=[{mask}]",
          "--data.task=edit", "--data.task_options={grow: 0}"])  # fmt: skip
    assert Image.open(read / "00000.png").mode != "P"

    main(["predict", "-c", "shapes.yaml", *where, f"--data.masks=[{mask}]", "--data.labels=[2]"])
    assert Image.open(read / "00000-label2.png").size == (8, 8)


@pytest.mark.parametrize(
    ("semantic", "names"),
    [
        (OneHot(6), ["miou", "pixel_accuracy"]),
        (RGBPalette("celebamask-hq"), ["miou", "pixel_accuracy"]),
        (ClassPlane(4), ["accuracy", "calibration"]),
        (JointSemantics([ClassPlane(4), OneHot(6)]), ["miou", "pixel_accuracy", "accuracy", "calibration"]),
    ],
)
def test_what_is_measured_follows_what_the_code_knows(semantic, names):
    metrics = semantic_metrics(semantic)
    assert [metric.name for metric in metrics] == names
    for metric in metrics:
        key = "label" if metric.name == "accuracy" else "mask"
        assert getattr(metric, "num_classes", None) in (None, semantic.num_classes.get(key))


def test_a_model_of_latents_is_asked_for_no_likelihood():
    network = ADMUNet(**SIZES, in_channels=10, head_channels=32)
    model = SymmFlow(network=network, semantic=OneHot(6), codec=AutoencoderKL("org/name"))
    names = [metric.name for metric in usual_metrics(model, Shapes(size=64))]
    assert names[-2:] == ["miou", "pixel_accuracy"]
    assert not any("dim" in name for name in names)
