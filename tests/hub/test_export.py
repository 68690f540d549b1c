"""What of a run's configuration becomes its recipe."""

import yaml

import lightning_flows.callbacks  # noqa: F401  (a run has imported what it uses)
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


def test_nulls_that_say_something_stay():
    grid = "lightning_flows.callbacks.SampleGrid"
    options = {
        "trainer": {
            "check_val_every_n_epoch": None,
            "gradient_clip_val": None,
            "callbacks": [{"class_path": grid, "init_args": {"every_n_epochs": None, "labels": None}}],
        },
        "global_batch": None,
    }
    recipe = yaml.safe_load(recipe_of(options))
    assert recipe["trainer"]["check_val_every_n_epoch"] is None
    assert "gradient_clip_val" not in recipe["trainer"]
    assert recipe["trainer"]["callbacks"][0]["init_args"] == {"every_n_epochs": None}
    assert "global_batch" not in recipe
