"""A reference leads to a folder: local first, then the zoo in its order, then pinned on the Hub."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_flows.store import Pin, resolve, save_folder
from lightning_flows.store.resolve import sha256

MODULE = importlib.import_module("lightning_flows.store.resolve")
CONFIG = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}


def model_folder(folder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(3, 2, generator=generator), "bias": torch.zeros(3)}
    return save_folder(folder, CONFIG, tensors, {"README.md": "card"})


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo named by the environment, a second one after it, and no other."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("LIGHTNING_FLOWS_ZOO", str(first))
    monkeypatch.setattr(MODULE, "zoo_folders", lambda: [first, second])
    return first, second


def hub(monkeypatch, folder, calls):
    import huggingface_hub

    def snapshot_download(repo, *, revision=None, allow_patterns=None):
        calls.append((repo, revision, allow_patterns))
        if folder is None:
            raise OSError("no such repository\nlong explanation")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_folder_is_itself(tmp_path):
    folder = model_folder(tmp_path / "out")
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder


def test_the_zoo_of_the_environment_comes_first(zoo):
    first, second = zoo
    late = model_folder(second / "tiny")
    assert resolve("tiny") == late
    early = model_folder(first / "tiny")
    assert resolve("tiny") == early


def test_a_half_entry_is_passed_over(zoo):
    first, second = zoo
    (first / "tiny").mkdir()
    (first / "tiny" / "config.json").write_text("{}")
    late = model_folder(second / "tiny")
    assert resolve("tiny") == late


def test_the_environment_names_the_first_zoo_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FLOWS_ZOO", str(tmp_path))
    assert MODULE.zoo_folders()[0] == tmp_path
    monkeypatch.setenv("LIGHTNING_FLOWS_ZOO", str(tmp_path / "absent"))
    assert tmp_path / "absent" not in MODULE.zoo_folders()


def test_an_unknown_id_says_where_it_was_looked_for(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="ref 'absent-model' leads to no folder") as caught:
        resolve("absent-model")
    assert all(str(place) in str(caught.value) for place in zoo)
    assert "pinned entries of the Hub (none)" in str(caught.value)


@pytest.mark.parametrize("ref", ["./absent", "/absent/place", "../x", "a/b/c", "", "org/name@", Path("absent")])
def test_a_missing_path_is_named_and_never_sought_online(ref, monkeypatch):
    calls = []
    hub(monkeypatch, None, calls)
    with pytest.raises(ValueError, match="leads to no folder"):
        resolve(ref)
    assert calls == []


def test_an_incomplete_folder_says_what_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks model.safetensors"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("ref", "revision", "asked"),
    [
        ("org/name", None, ("org/name", None)),
        ("org/name@v1.0", None, ("org/name", "v1.0")),
        ("org/name", "abc", ("org/name", "abc")),
        ("tiny@abc", None, ("lightning-flows/tiny", "abc")),
    ],
)
def test_references_to_the_hub(ref, revision, asked, tmp_path, monkeypatch):
    calls, folder = [], model_folder(tmp_path / "cached")
    hub(monkeypatch, folder, calls)
    assert resolve(ref, revision=revision) == folder
    assert calls == [(*asked, ["*.json", "*.safetensors", "*.md", "*.yaml"])]


def test_two_revisions_contradict_each_other():
    with pytest.raises(ValueError, match="revision='b' contradicts"):
        resolve("org/name@a", revision="b")


def test_a_pinned_id_is_downloaded_at_its_revision_and_checked(zoo, tmp_path, monkeypatch):
    calls, folder = [], model_folder(tmp_path / "cached")
    hub(monkeypatch, folder, calls)
    pin = Pin("f" * 40, sha256(folder / "model.safetensors"))
    monkeypatch.setitem(MODULE.PINNED, "tiny", pin)
    assert resolve("tiny") == folder
    assert calls[0][:2] == ("lightning-flows/tiny", "f" * 40)
    model_folder(folder, seed=1)
    with pytest.raises(ValueError, match=f"instead of the pinned {pin.sha256}"):
        resolve("tiny")


def test_a_failing_download_names_the_reference_in_one_line(tmp_path, monkeypatch):
    hub(monkeypatch, None, [])
    with pytest.raises(
        ValueError, match=r"'org/name'.*org/name@main on the Hub \(no such repository long explanation\)"
    ) as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_is_refused(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, [])
    with pytest.raises(ValueError, match=r"it lacks config.json and model.safetensors"):
        resolve("org/name")


SHA = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = """
from lightning_flows.store import load_tensors, read_config, resolve
folder = resolve("org/name")
print(folder.name, read_config(folder)["class_path"], sorted(load_tensors(folder / "model.safetensors")))
assert resolve("org/name@" + folder.name) == folder
try:
    resolve("org/other")
except ValueError as error:
    print(error)
"""


def test_a_cached_repository_is_found_offline(tmp_path):
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    model_folder(repo / "snapshots" / SHA)
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    found, missing = result.stdout.strip().split("\n")
    assert found == f"{SHA} torch.nn.Linear ['bias', 'weight']", result.stderr
    assert missing.startswith("ref 'org/other' leads to no folder")
