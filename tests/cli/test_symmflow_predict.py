"""``lightning-flows predict`` with a SymmFlow: a tiny model beside its recipe, procedural shapes in, files out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_flows as lf
from lightning_flows.callbacks.pictures import to_image
from lightning_flows.cli import dispatch, main
from lightning_flows.codecs import JointSemantics, OneHot, RGBPalette
from lightning_flows.data import Shapes
from lightning_flows.flow import SymmetricMatching
from lightning_flows.modules import SymmFlow
from lightning_flows.store import config_of
from tests.modules.tiny import dit

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
COLOURS = [[10, 20, 30], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]]  # of six mask classes


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Shapes of 8 x 8 pixels, their masks and labels; saved in ``both`` with a recipe beside it."""
    monkeypatch.chdir(tmp_path)
    semantic = JointSemantics([RGBPalette(COLOURS, beta=10.0), OneHot(5, per="image")])
    sizes = {"input_size": 8, "in_channels": 3 + semantic.channels, "num_classes": None, "label_dropout": 0.0}
    made = SymmFlow(network=dit(**sizes), semantic=semantic, objective=SymmetricMatching(drop_rate=0.1), steps=2)
    recipe = {"model": config_of(made)}
    made.eval().save_pretrained("both", {"recipe.yaml": json.dumps(recipe)})  # JSON is YAML
    return made


@pytest.fixture
def items(model):
    """Two pictures and their masks on disk, as the command line reads them."""
    data = Shapes(size=8, n_train=2, n_val=0, n_test=0)
    data.setup("fit")
    read = [data.read("train")[i] for i in range(2)]
    for name, item in zip("ab", read, strict=True):
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(f"{name}.png")
        Image.fromarray(item["mask"].numpy()).save(f"{name}-mask.png")
    image = torch.stack([item["image"] for item in read]) / 127.5 - 1
    return image, torch.stack([item["mask"] for item in read]).long()


IMAGES, MASKS = "--data.images=[a.png,b.png]", "--data.masks=[a-mask.png,b-mask.png]"


def predict(*words):
    dispatch(["predict", "-c", "both/recipe.yaml", *QUIET, *words])


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "-c", "both/recipe.yaml", *QUIET, *words])
    return str(caught.value)


def written(tmp_path, name):
    path = tmp_path / "runs/both/predictions" / name
    return json.loads(path.read_text()) if name.endswith(".json") else Image.open(path)


def same(picture, image):
    """Whether a picture shows an image (C, H, W), up to one grey level."""
    wanted = np.asarray(to_image(image)).astype(int)
    return np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1


def test_images_of_masks_and_labels(model, items, tmp_path):
    predict(MASKS, "--data.labels=[1,4]", "--data.seed=7")
    given = lf.Condition(label=torch.tensor([1, 4]), spatial=items[1][:, None])
    drawn = model.sample(given, seed=7)
    for i, name in enumerate(["00000-label1.png", "00001-label4.png"]):
        assert same(written(tmp_path, name), drawn[i])


def test_images_of_masks_alone_and_of_labels_alone(model, items, tmp_path):
    predict("--data.labels=[3]", "--data.seed=7")
    assert same(written(tmp_path, "00000-label3.png"), model.sample(lf.Condition(label=torch.tensor([3])), seed=7)[0])
    predict(MASKS, "--data.seed=7", "--run_name=masks")
    drawn = model.sample(lf.Condition(spatial=items[1][:, None]), seed=7)
    assert same(Image.open(tmp_path / "runs/masks/predictions/00001.png"), drawn[1])


def test_masks_are_pictures_whose_pixels_are_ids(model, items, tmp_path):
    predict(
        IMAGES,
        "--data.seed=5",
        "--data.batch_size=1",
        '--data.task_options={"votes": 2, "uncertainty": true}',
        "--data.task=segment",
    )
    found = model.read(items[0], seed=5, votes=2)
    for i in range(2):
        picture, labels = written(tmp_path, f"0000{i}.png"), found.decoded["mask"].labels[i]
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels.numpy())
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.array(COLOURS)[labels.numpy()])
        assert same(written(tmp_path, f"0000{i}-uncertainty.png"), found.uncertainty["mask"][i][None] * 2 - 1)
        record = written(tmp_path, f"0000{i}-class.json")
        assert record["label"] == int(found.decoded["label"].labels[i])
        assert record["scores"] == pytest.approx(found.decoded["label"].scores[i].tolist(), abs=1e-4)
        assert record["uncertainty"] == pytest.approx(float(found.uncertainty["label"][i]), abs=1e-4)
    assert set(written(tmp_path, "predictions.json")) == {"00000-class", "00001-class"}
    assert written(tmp_path, "grid.png").size[0] > 0


def test_a_mask_that_was_written_is_a_mask_to_draw_from(model, items, tmp_path):
    predict(IMAGES, "--data.seed=5")
    predict("--data.masks=[runs/both/predictions/00000.png]", "--run_name=again", "--data.seed=2")
    mask = model.read(items[0], seed=5).decoded["mask"].labels[:1]
    drawn = model.sample(lf.Condition(spatial=mask[:, None]), seed=2)
    assert same(Image.open(tmp_path / "runs/again/predictions/00000.png"), drawn[0])


def test_classes_are_records(model, items, tmp_path):
    predict(IMAGES, "--data.task=classify", "--data.seed=5")
    found = model.read(items[0], seed=5).decoded["label"]
    table = written(tmp_path, "predictions.json")
    assert [record["label"] for record in table.values()] == found.labels.tolist()
    assert not (tmp_path / "runs/both/predictions/00000.png").exists()


def test_edits(model, items, tmp_path):
    mask = model.read(items[0], steps=2, seed=5).decoded["mask"].labels
    mask[:, :4, :4] = (mask[:, :4, :4] + 1) % 6
    for name, ids in zip("ab", mask, strict=True):
        Image.fromarray(ids.to(torch.uint8).numpy()).save(f"{name}-mask.png")
    options = '--data.task_options={"grow": 0}'
    predict(IMAGES, MASKS, "--data.labels=[1,4]", "--data.task=edit", "--data.seed=5", options)
    edited = model.edit(items[0], mask, label=torch.tensor([1, 4]), seed=5, grow=0)
    assert not torch.equal(edited, items[0])
    for i, name in enumerate(["00000-label1.png", "00001-label4.png"]):
        picture = written(tmp_path, name)
        assert same(picture, edited[i])
        assert np.array_equal(np.asarray(picture)[4:], np.asarray(Image.open(f"{'ab'[i]}.png"))[4:])


def test_a_larger_mask_is_scaled_to_the_size_that_is_asked_for(model, items, tmp_path):
    Image.open("a-mask.png").resize((20, 20), Image.Resampling.NEAREST).save("large.png")
    message = refused("--data.masks=[large.png]", "--data.size=4")
    assert "does not fit this model, whose state is (3, 8, 8): size must be at most the mask's (4, 4)" in message
    predict("--data.masks=[large.png]", "--data.size=8")
    assert written(tmp_path, "00000.png").size == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([IMAGES, MASKS], "the requests give images and ['mask']: name a task, one of ('sample', 'segment'"),
        (["--data.task=edit", IMAGES], "there are no ['masks']"),
        (["--data.task=segment", IMAGES, MASKS], "takes ['images'] and has no use for ['masks']"),
        (["--data.task=edit", IMAGES, "--data.masks=[a-mask.png,tall.png]"], "differ in size"),
        (["--data.task=segment", IMAGES, "--data.size=6"], "those of the model have (3, 8, 8): give them another size"),
        (["--data.labels=[7]"], "holds 7, but allowed are 0 to 4"),
    ],
)
def test_wrong_requests_are_refused(items, words, message):
    Image.fromarray(np.zeros((10, 8), np.uint8)).save("tall.png")
    assert message in refused(*words)
