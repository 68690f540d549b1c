import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.callbacks import PredictionWriter, write_sample
from lightning_flows.codecs import LabelMap
from lightning_flows.codecs.label_map import UNLABELLED, distinct_colours
from tests.callbacks.toy import Toy, requests, trainer

ROOT = Path(__file__).parents[2]


def run(folder, ids, batch_size=2, model=None, **options):
    predict = trainer(folder, PredictionWriter(**options))
    predict.predict(model or Toy(), requests(ids, batch_size), return_predictions=False)
    return folder / "predictions"


def contents(folder):
    return {p.name: Image.open(p).tobytes() for p in folder.iterdir()}


class Fixed(Toy):
    """Predicts what it is given."""

    def __init__(self, prediction) -> None:
        super().__init__()
        self.prediction = prediction

    def predict_step(self, batch, batch_idx):
        return self.prediction


def test_one_file_per_request_named_by_its_id_whatever_the_batch_size(tmp_path):
    ids = ["b", "a", "10", "2", "with space"]
    one, four = (run(tmp_path / str(size), ids, size) for size in (1, 4))
    assert sorted(contents(one)) == sorted([*(f"{i}.png" for i in ids), "grid.png"])
    assert contents(one) == contents(four)


def test_grid_shows_the_run_in_the_order_of_ids(tmp_path):
    folder = run(tmp_path, ["10", "9", "100", "1"], 3)  # shades 128, 140, 153, 166 in this order
    grid = Image.open(folder / "grid.png")
    assert grid.size == (2 * 66 + 2, 2 * 66 + 2)
    assert [grid.getpixel(p) for p in ((5, 5), (75, 5), (5, 75), (75, 75))] == [166, 140, 128, 153]


def test_files_of_an_earlier_run_stay_but_not_on_the_grid(tmp_path):
    run(tmp_path, ["old", "a"], 1)
    before = contents(tmp_path / "predictions")
    run(tmp_path, ["a", "new", "b"], 2)
    after = contents(tmp_path / "predictions")
    assert after["old.png"] == before["old.png"]
    assert after["a.png"] != before["a.png"]
    assert Image.open(tmp_path / "predictions" / "grid.png").getpixel((5, 5)) == 128  # a: seed 0


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b", "", "grid", "predictions"])
def test_ids_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="id must"):
        run(tmp_path, [name])


def test_grid_is_an_id_like_others_where_no_grid_is_written(tmp_path):
    assert list(contents(run(tmp_path, ["grid"], grid=False))) == ["grid.png"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_id_given_twice_is_refused(tmp_path, batch_size):
    with pytest.raises(ValueError, match="'x' twice"):
        run(tmp_path, ["x", "x"], batch_size)


def test_the_same_writer_serves_a_second_run(tmp_path):
    predict = trainer(tmp_path, PredictionWriter())
    for _ in range(2):
        predict.predict(Toy(), requests(["x"]), return_predictions=False)
    assert sorted(contents(tmp_path / "predictions")) == ["grid.png", "x.png"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colours_and_transparency_survive(tmp_path, channels):
    sample = torch.linspace(-1, 1, channels).reshape(1, channels, 1, 1).expand(1, channels, 3, 5)
    folder = run(tmp_path, ["x"], model=Fixed({"id": ["x"], "sample": sample}))
    image = Image.open(folder / "x.png")
    assert image.size == (5, 3)
    assert len(image.getbands()) == channels


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (torch.zeros(1), "dict with 'id' and 'sample', got Tensor"),
        ({"sample": torch.zeros(1)}, r"got \['sample'\]"),
        ({"id": ["a", "b"], "sample": torch.zeros(1, 1, 2, 2)}, "got 1 and 2"),
        ({"id": ["a"], "sample": torch.full((1, 1, 2, 2), torch.nan)}, "'a' must be finite"),
        ({"id": ["a"], "sample": [object()]}, "got object for 'a'"),
        ({"id": ["a"], "sample": [{"score": float("nan")}]}, "'a' must be of JSON values and finite numbers"),
        ({"id": ["a"], "sample": [{"score": torch.ones(1)}]}, "'a' must be of JSON values and finite numbers"),
        ({"id": ["a"], "sample": torch.zeros(1, 5, 1, 2, 2)}, "must have shape"),
    ],
)
def test_predictions_of_another_kind_are_named(tmp_path, prediction, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, ["a"], model=Fixed(prediction))
    assert not list((tmp_path / "predictions").glob("*"))


def test_other_kinds_of_samples_register_their_own_writer(tmp_path):
    class Words(str):
        pass

    @write_sample.register
    def _(sample: Words, stem: Path) -> Path:
        path = stem.with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample)
        return path

    folder = run(tmp_path, ["x"], model=Fixed({"id": ["x"], "sample": [Words("hello")]}))
    assert (folder / "x.txt").read_text() == "hello"
    assert not (folder / "grid.png").exists()


class Says(Toy):
    """Says something of every request; of those with an odd seed it makes a picture."""

    def predict_step(self, batch, batch_idx):
        rows = [{"seed": int(seed), "values": [0.5, None]} for seed in batch["seed"]]
        pictures = super().predict_step(batch, batch_idx)["sample"]
        samples = [pictures[i] if row["seed"] % 2 else row for i, row in enumerate(rows)]
        return {"id": batch["id"], "sample": samples}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_dictionaries_are_written_one_by_one_and_in_a_table(tmp_path, batch_size):
    folder = run(tmp_path, ["10", "picture", "9"], batch_size, Says())
    names = ["10.json", "9.json", "grid.png", "picture.png", "predictions.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert json.loads((folder / "9.json").read_text()) == {"seed": 2, "values": [0.5, None]}
    table = json.loads((folder / "predictions.json").read_text())
    assert list(table) == ["9", "10"]
    assert table["10"] == {"seed": 0, "values": [0.5, None]}


def test_the_table_shows_this_run_only(tmp_path):
    run(tmp_path, ["old"], model=Says())
    folder = run(tmp_path, ["new"], model=Says())
    assert list(json.loads((folder / "predictions.json").read_text())) == ["new"]
    assert (folder / "old.json").is_file()


def test_without_dictionaries_there_is_no_table(tmp_path):
    assert not (run(tmp_path, ["x"]) / "predictions.json").exists()


def ranks(folder, devices, ids):
    command = [
        sys.executable,
        "-m",
        "tests.callbacks.predict_ranks",
        str(folder),
        str(devices),
        ",".join(ids),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tmp_path):
    ids = ["e", "d", "c", "b", "a"]
    result = ranks(tmp_path / "two", 2, ids)
    assert result.returncode == 0, result.stderr
    two, one = contents(tmp_path / "two" / "predictions"), contents(run(tmp_path / "one", ids))
    assert two == one
    assert len(two) == 6


@pytest.mark.slow
def test_an_id_given_to_two_processes_is_refused(tmp_path):
    result = ranks(tmp_path, 2, ["x", "x"])
    assert result.returncode != 0
    assert "got ['x'] on several ranks" in result.stderr


# ------------------------------------------------------------------ masks

COLOURS = [(0, 0, 0), (250, 0, 0), (0, 250, 0)]


def test_pixels_of_a_written_mask_are_ids_and_its_colours_those_of_the_classes(tmp_path):
    ids = torch.tensor([[0, 1, 2], [2, 255, 1]])
    folder = run(tmp_path, ["x"], model=Fixed({"id": ["x"], "sample": [LabelMap(ids, COLOURS)]}))
    image = Image.open(folder / "x.png")
    assert (image.mode, image.size) == ("P", (3, 2))
    assert np.asarray(image).tolist() == ids.tolist()
    shown = np.asarray(image.convert("RGB"))
    assert [tuple(pixel) for pixel in shown[0]] == COLOURS
    assert tuple(shown[1, 1]) == UNLABELLED


def test_a_mask_may_have_255_classes(tmp_path):
    ids = torch.arange(256).view(16, 16)
    write_sample(LabelMap(ids, distinct_colours(255)), tmp_path / "x")
    image = Image.open(tmp_path / "x.png")
    assert np.asarray(image).tolist() == ids.tolist()
    assert len({tuple(pixel) for row in np.asarray(image.convert("RGB")) for pixel in row}) == 256


def test_masks_images_and_records_stand_in_one_run(tmp_path):
    mask, unsure = LabelMap(torch.ones(4, 4, dtype=torch.int64), COLOURS), torch.zeros(1, 4, 4)
    made = {"id": ["a", "a-uncertainty", "a-class"], "sample": [mask, unsure, {"label": 1}]}
    folder = run(tmp_path, ["a"], model=Fixed(made))
    assert {file.name for file in folder.iterdir()} == {
        *("a.png", "a-uncertainty.png", "a-class.json", "grid.png", "predictions.json"),
    }
    grid = Image.open(folder / "grid.png").convert("RGB")
    assert [grid.getpixel((34, 34)), grid.getpixel((100, 34))] == [COLOURS[1], (128, 128, 128)]
    assert json.loads((folder / "predictions.json").read_text()) == {"a-class": {"label": 1}}


@pytest.mark.parametrize(
    "ids", [torch.zeros(4, 4), torch.zeros(1, 4, 4).long(), torch.full((4, 4), 256), torch.full((4, 4), -1)]
)
def test_what_is_no_mask_is_named(tmp_path, ids):
    with pytest.raises(ValueError, match=r"mask 'x' must hold ids \(H, W\) of 0..255, got"):
        run(tmp_path, ["x"], model=Fixed({"id": ["x"], "sample": [LabelMap(ids, COLOURS)]}))
