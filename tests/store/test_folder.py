"""A model folder is written whole or not at all, and read as raw JSON."""

import json
from pathlib import Path

import pytest
import torch

from lightning_flows.store import load_tensors, read_config, save_folder

CONFIG = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}


def tensors():
    return torch.nn.Linear(2, 3).state_dict()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_holds_config_weights_and_extra_files(tmp_path):
    (tmp_path / "source.yaml").write_text("a: 1")
    extra = {"README.md": "text", "x.bin": b"\x00", "recipe.yaml": tmp_path / "source.yaml"}
    folder = save_folder(tmp_path / "deep" / "out", CONFIG, tensors(), extra)
    assert names(folder) == ["README.md", "config.json", "model.safetensors", "recipe.yaml", "x.bin"]
    assert read_config(folder) == CONFIG
    assert load_tensors(folder / "model.safetensors").keys() == tensors().keys()
    assert (folder / "recipe.yaml").read_text() == "a: 1"
    assert names(tmp_path / "deep") == ["out"]


def test_other_files_of_an_existing_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    save_folder(tmp_path, CONFIG, tensors())
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert read_config(tmp_path) == CONFIG


def test_two_processes_that_write_one_folder_at_once_both_succeed(tmp_path, monkeypatch):
    save_folder(tmp_path / "m", {"class_path": "A", "init_args": {}}, {"w": torch.zeros(2)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)  # the other one has not written yet; now it has
        save_folder(tmp_path / "m", {"class_path": "A", "init_args": {}}, {"w": torch.ones(2)})
    assert load_tensors(tmp_path / "m" / "model.safetensors")["w"].tolist() == [1, 1]
    assert names(tmp_path) == ["m"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_flows.store.folder._write", fail)
    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "out", CONFIG, tensors())
    assert names(tmp_path) == []


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_a_config_that_is_not_json_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match="not made of JSON values"):
        save_folder(tmp_path / "out", {**CONFIG, "init_args": bad}, tensors())
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../escape", "a/b", "config.json", "model.safetensors", "/etc/x"])
def test_extra_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="extra_files"):
        save_folder(tmp_path / "out", CONFIG, tensors(), {name: "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ('{"class_path": NaN}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no object with a class_path"),
        (json.dumps({"init_args": {}}), "no object with a class_path"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
