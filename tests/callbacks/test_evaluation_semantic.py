"""Evaluation of a model that draws, segments and classifies: what is logged, images for each mask, what is absent."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_flows.callbacks import Evaluation
from lightning_flows.metrics import Frechet, LabelAccuracy, MeanIoU, PixelAccuracy
from tests.callbacks.evaluation_ranks import ITEMS, Items, trainer
from tests.callbacks.semantic_ranks import Masked, Reader, evaluate, semantic

ROOT = Path(__file__).parents[2]


def scored(folder, metrics, data=None, stage="test", model=None, **options):
    run = trainer(folder, Evaluation(metrics, on="validation" if stage == "val" else "test", **options))
    model = model or Reader()
    (run.validate if stage == "val" else run.test)(model, DataLoader(data or Masked(), 2), verbose=False)
    values = json.loads((folder / "metrics.json").read_text())[stage]["values"]
    return values, {name: float(value) for name, value in run.callback_metrics.items()}, model


@pytest.mark.parametrize("stage", ["test", "val"])
def test_classes_are_written_and_their_mean_is_logged(tmp_path, stage):
    found, logged, _ = scored(tmp_path, semantic(), stage=stage)
    entry = found["miou"]
    assert entry["value"]["per_class"] == pytest.approx([24 / 25, 1, 0, None])
    assert entry["value"]["mean"] == pytest.approx(0.98 * 2 / 3, abs=1e-3)
    assert (entry["real"], entry["num_classes"], entry["rule"]) == (ITEMS, 4, "strict")
    assert "samples" not in entry
    assert found["calibration"]["value"]["bins"]["count"] == [0, 0, 0, ITEMS]
    assert found["accuracy"]["real"] == ITEMS
    assert found["asked_miou"]["rule"].endswith("dark")
    logs = ("miou/mean", "pixel_accuracy", "accuracy", "calibration/error", "asked_miou/mean", "nfe")
    assert set(logged) == {f"{stage}/{name}" for name in (*logs, "seconds_per_sample")}
    assert logged[f"{stage}/pixel_accuracy"] == pytest.approx(27 / 28)


@pytest.mark.parametrize("stage", ["test", "val"])
def test_several_images_of_each_mask_stand_beside_one_of_each(tmp_path, stage):
    found, logged, model = scored(tmp_path, [Frechet(), MeanIoU(4)], stage=stage, per_item=3)
    assert sorted(model.drawn) == list(range(3 * ITEMS))
    one, many = found["frechet[pixels]"], found["frechet[pixels][per_item=3]"]
    assert (one["real"], one["samples"], one["samples_per_item"]) == (ITEMS, ITEMS, 1)
    assert (many["real"], many["samples"], many["samples_per_item"]) == (ITEMS, 3 * ITEMS, 3)
    alone, _, _ = scored(tmp_path / "alone", [Frechet(), MeanIoU(4)], stage=stage)
    assert one["value"] == alone["frechet[pixels]"]["value"]
    assert "samples_per_item" not in alone["frechet[pixels]"]
    all_of_them, _, _ = scored(tmp_path / "all", [Frechet()], stage=stage, samples=3 * ITEMS)
    assert many["value"] == pytest.approx(all_of_them["frechet[pixels]"]["value"])
    assert all_of_them["frechet[pixels]"]["samples_per_item"] == 3
    assert logged[f"{stage}/frechet[pixels][per_item=3]"] == pytest.approx(many["value"])
    assert logged[f"{stage}/nfe"] == 8
    assert set(found) == {"frechet[pixels]", "frechet[pixels][per_item=3]", "miou"}
    assert found["miou"]["value"] == alone["miou"]["value"]


def test_one_for_each_item_is_what_is_done_anyway(tmp_path):
    found, _, model = scored(tmp_path, [Frechet()], per_item=1)
    assert sorted(model.drawn) == list(range(ITEMS))
    assert set(found) == {"frechet[pixels]"}
    assert found["frechet[pixels]"]["samples_per_item"] == 1


def test_a_part_of_a_round_is_said_as_a_fraction(tmp_path):
    found, _, _ = scored(tmp_path, [Frechet()], samples=10)
    assert found["frechet[pixels]"]["samples_per_item"] == pytest.approx(10 / 7)


def test_a_look_draws_for_masks_whatever_the_bound_of_the_samples(tmp_path):
    found, _, model = scored(tmp_path, [Frechet(), PixelAccuracy(4)], stage="val", samples=3)
    assert sorted(model.drawn) == list(range(ITEMS))
    assert found["frechet[pixels]"]["samples"] == 3
    assert found["pixel_accuracy"]["value"] == pytest.approx(27 / 28)


@pytest.mark.parametrize(("metric", "missing"), [(MeanIoU(4), "segmented"), (LabelAccuracy(2), "class_scores")])
@pytest.mark.parametrize("stage", ["test", "val"])
def test_what_the_data_do_not_have_is_named(tmp_path, metric, missing, stage):
    with pytest.raises(ValueError, match=rf"{metric.name} needs .*'{missing}'.*; data and module have no .*") as raised:
        scored(tmp_path, [metric], Items(), stage)
    given = str(raised.value).partition("gave")[2]
    assert "'sample'" in given
    assert "'label'" not in given  # it is there, as None


@pytest.mark.parametrize(
    ("options", "word"),
    [({"per_item": 0}, "per_item must be at least 1"), ({"per_item": 2, "samples": 9}, "samples must be None beside")],
)
def test_wrong_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Evaluation(**options)


@pytest.mark.slow
def test_two_processes_give_the_values_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.callbacks.semantic_ranks", str(tmp_path / "two"), "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MASTER_PORT": str(port)}
    started = [subprocess.Popen(command, cwd=ROOT, env=env | {"LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(timeout=600) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    evaluate(tmp_path / "one", 1)
    for stage in ("test", "val"):
        one, two = (json.loads((tmp_path / each / "metrics.json").read_text())[stage] for each in ("one", "two"))
        assert one["values"].keys() == two["values"].keys()
        assert one["values"]["frechet[pixels][per_item=3]"]["samples"] == 3 * ITEMS
        for name, entry in one["values"].items():
            other = two["values"][name]
            for key in ("real", "samples", "samples_per_item"):
                assert other.get(key) == entry.get(key), (name, key)
            close = entry["value"] if isinstance(entry["value"], dict) else pytest.approx(entry["value"], rel=1e-6)
            assert other["value"] == close, name
