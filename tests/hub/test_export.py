"""What of a run's configuration becomes its recipe."""

import yaml

from lightning_flows.hub.export import recipe_of


def test_the_folder_of_the_data_sets_is_named_by_its_variable(monkeypatch):
    options = {
        "run_name": "a",
        "data": {"class_path": "Arrays", "init_args": {"root": "/here/sets/mnist", "size": None}},
    }
    monkeypatch.setenv("LIGHTNING_FLOWS_DATA", "/here/sets/")
    assert yaml.safe_load(recipe_of(options))["data"]["init_args"] == {
        "root": "${oc.env:LIGHTNING_FLOWS_DATA,data}/mnist"
    }
    for other in ("/here/sets2", ""):
        monkeypatch.setenv("LIGHTNING_FLOWS_DATA", other)
        assert yaml.safe_load(recipe_of(options))["data"]["init_args"]["root"] == "/here/sets/mnist"
    assert "run_name" not in yaml.safe_load(recipe_of(options))
