"""Every entry of the zoo reloads, repeats its stored outputs, and says what its licence and figures are."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.zoo_entry import INPUTS, OUTPUTS, outputs_of
from lightning_flows import from_pretrained
from lightning_flows.hub import check_folder, entries, figures, read_header
from lightning_flows.store import load_tensors

ROOT = Path(__file__).parents[2]
ENTRIES = sorted(path.parent for path in ROOT.glob("zoo/*/config.json"))
FILES = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.json", OUTPUTS, "samples.png"}


def test_there_are_entries():
    assert "lfm-digits" in [entry.name for entry in ENTRIES]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_entry_is_whole_and_small(entry):
    assert {path.name for path in entry.iterdir()} == FILES
    assert (entry / "model.safetensors").stat().st_size <= 7e6
    assert read_header(entry)["license"]
    assert figures(json.loads((entry / "metrics.json").read_text()))
    check_folder(entry)  # no codec names a place on the machine where it was made
    assert not re.search(r":\s*['\"]?/", (entry / "recipe.yaml").read_text())  # and neither does the recipe


def test_the_whole_zoo_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in ROOT.glob("zoo/*/model.safetensors")) <= 36e6


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_entry_repeats_its_stored_outputs(entry):
    stored = load_tensors(entry / OUTPUTS)
    found = outputs_of(from_pretrained(entry), {name: stored[name] for name in INPUTS if name in stored})
    assert found.keys() == stored.keys() - set(INPUTS)
    for name, value in found.items():
        error = (value - stored[name]).abs().max() / stored[name].abs().max()
        assert error < 1e-4, (entry.name, name, float(error))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_from_pretrained_finds_the_entry_by_its_id(entry):
    model = from_pretrained(entry.name)
    wanted = load_tensors(entry / "model.safetensors")
    assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in model.state_dict().items())


def test_the_table_of_the_readme_is_that_of_the_zoo():
    text = (ROOT / "README.md").read_text()
    for entry in entries():
        assert f"| {entry.id} " in text
        assert entry.metric in text
