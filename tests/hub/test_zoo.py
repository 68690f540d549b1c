"""The table of the zoo shows what lies in its folders, and what `from_pretrained` would take."""

import importlib
import shutil

import pytest

from lightning_flows.hub import entries, table

ZOO = importlib.import_module("lightning_flows.hub.zoo")


@pytest.fixture
def zoo(tmp_path, folder, monkeypatch):
    """Two zoo folders; the first holds the entry ``tiny``."""
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    shutil.copytree(folder, first / "tiny")
    monkeypatch.setattr(ZOO, "zoo_folders", lambda: [first, second])
    return first, second


def test_an_entry_says_what_it_is(zoo):
    (entry,) = entries()
    assert (entry.id, entry.family, entry.data, entry.metric, entry.licence) == (
        "tiny",
        "Linear",
        "digits",
        "kid 0.5",
        "apache-2.0",
    )
    assert entry.size == (zoo[0] / "tiny" / "model.safetensors").stat().st_size
    assert entry.config["class_path"] == "torch.nn.Linear"


def test_entries_are_sorted_and_the_first_folder_wins(zoo):
    first, second = zoo
    shutil.copytree(first / "tiny", second / "tiny")
    shutil.copytree(first / "tiny", second / "a-model")
    (second / "no-entry").mkdir()
    assert [(entry.id, entry.folder) for entry in entries()] == [
        ("a-model", second / "a-model"),
        ("tiny", first / "tiny"),
    ]


def test_an_entry_without_weights_gives_way_to_one_with_them(zoo):
    first, second = zoo
    shutil.copytree(first / "tiny", second / "tiny")
    (first / "tiny" / "model.safetensors").unlink()
    (entry,) = entries()
    assert entry.folder == second / "tiny"


def test_the_table_is_aligned_and_complete(zoo):
    first, _ = zoo
    shutil.copytree(first / "tiny", first / "elsewhere")
    (first / "elsewhere" / "model.safetensors").unlink()
    (first / "elsewhere" / "README.md").unlink()
    (first / "elsewhere" / "metrics.json").unlink()
    lines = table().split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["id", "family", "data", "metric", "size", "licence"]
    assert cells[2] == ["elsewhere", "Linear", "", "", "on the Hub", ""]
    assert cells[3] == ["tiny", "Linear", "digits", "kid 0.5", "0.0 MB", "apache-2.0"]


def test_an_empty_zoo_is_a_table_without_rows(monkeypatch):
    monkeypatch.setattr(ZOO, "zoo_folders", lambda: [])
    assert len(table().split("\n")) == 2


def test_a_damaged_file_is_named(zoo):
    file = zoo[0] / "tiny" / "metrics.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON") as caught:
        table()
    assert str(file) in str(caught.value)
