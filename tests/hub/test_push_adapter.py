"""An adapter goes to the Hub by itself and comes back to its base; what others could not load is refused."""

import json

import pytest
import torch

import lightning_flows as lf
from lightning_flows.hub import adapter_card, check_folder, push, read_header, write_adapter_card
from lightning_flows.networks.adapter_folder import read_adapter
from tests.hub.fake_hub import FakeHub
from tests.modules.tiny import model


@pytest.fixture
def adapter(tmp_path):
    """A base model in one folder and an adapter of it, without a card, in another."""
    module = model()
    module.save_pretrained(tmp_path / "base")
    lf.add_lora(module, rank=2, train=["y_embedder.*"])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    return lf.save_adapter(module, tmp_path / "adapter", base="org/base@v1")


def rename(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_card_names_the_base_model(adapter):
    write_adapter_card(adapter, {"kid": {"value": 0.25, "samples": 10}}, licence="cc-by-4.0", data="signs")
    header = read_header(adapter)
    assert header["base_model"] == "org/base"
    assert header["base_model_relation"] == "adapter"
    assert header["library_name"] == "lightning_flows"
    assert header["license"] == "cc-by-4.0"
    assert "lora" in header["tags"]
    text = (adapter / "README.md").read_text()
    assert 'lf.from_pretrained("org/base@v1")' in text
    assert 'lf.load_adapter(model, "adapter")' in text
    assert "| kid | 0.25 | 10 |" in text
    assert check_folder(adapter) == adapter


def test_a_zoo_id_is_the_base_by_its_place_on_the_hub(adapter):
    rename(adapter, base_model_name_or_path="lfm-fashion-mnist", revision=None)
    text = adapter_card(read_adapter(adapter)[0], licence="mit")
    assert "base_model: lightning-flows/lfm-fashion-mnist" in text
    assert 'lf.from_pretrained("lfm-fashion-mnist")' in text


@pytest.mark.parametrize(
    ("base", "tags"),
    [
        ("lfm-digits", ["lora", "flow-matching", "lightning"]),
        ("tarflow-mnist", ["lora", "normalizing-flow", "lightning"]),
        ("org/base", ["lora", "lightning"]),
    ],
)
def test_the_family_in_the_tags_is_that_of_the_base_where_it_is_known(adapter, base, tags):
    rename(adapter, base_model_name_or_path=base, revision=None)
    write_adapter_card(adapter, licence="mit")
    assert read_header(adapter)["tags"] == tags


@pytest.mark.parametrize("base", [None, "", "/data/base", "./base", "~/base", "a/b/base", "runs/last.ckpt", "here"])
def test_a_base_on_this_machine_is_refused_with_the_fix(adapter, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    write_adapter_card(adapter, licence="mit")
    rename(adapter, base_model_name_or_path=base, revision=None)
    with pytest.raises(ValueError, match=r"base_model_name_or_path=.*lightning-flows push FOLDER org/name"):
        push(adapter, "org/tiny")


def test_other_unfit_folders_are_refused(adapter):
    with pytest.raises(ValueError, match=r"states no licence.*--licence"):
        push(adapter, "org/tiny")
    with pytest.raises(ValueError, match="licence='' says nothing"):
        push(adapter, "org/tiny", licence="")
    write_adapter_card(adapter, licence="mit")
    with pytest.raises(ValueError, match="for an adapter without a card"):
        push(adapter, "org/tiny", licence="mit")
    rename(adapter, use_dora=True)
    with pytest.raises(ValueError, match="not supported"):
        push(adapter, "org/tiny")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x80\x02}.")
    rename(adapter, use_dora=False)
    with pytest.raises(ValueError, match="is a pickle"):
        push(adapter, "org/tiny")


THERE_AND_BACK = """
import torch
import lightning_flows as lf
from lightning_flows.cli import dispatch
dispatch(["push", {folder!r}, "org/signs", "--licence", "mit"])
model = lf.from_pretrained("org/base")
x, t, c = torch.ones(2, 1, 4, 4), torch.tensor([0.2, 0.7]), lf.Condition(label=torch.tensor([0, 2]))
plain = model.network(x, t, c)
lf.load_adapter(model, "org/signs", name="signs")
there = model.network(x, t, c)
local = lf.load_adapter(lf.from_pretrained({base!r}), {folder!r}).network(x, t, c)
print(model.origin)
print(bool((there == local).all()), bool((there == plain).all()))
try:
    lf.load_adapter(model, "org/base", name="wrong")
except ValueError as error:
    print(error)
lf.save_adapter(model, {out!r})
"""


def test_to_the_hub_and_back(adapter, client, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    with FakeHub() as hub:
        sha = hub.commit("org/base", "main", {path.name: path.read_bytes() for path in base.iterdir()})
        lines = client(THERE_AND_BACK.format(folder=str(adapter), base=str(base), out=str(out)), hub.url)
        ((_, files),) = hub.repos["org/signs"]["main"]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert lines[-3] == f"org/base@{sha}"
    assert lines[-2] == "True False"
    assert "leads to no folder with adapter_config.json and adapter_model.safetensors" in lines[-1]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", sha)
