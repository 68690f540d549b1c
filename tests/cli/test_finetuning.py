"""A new run from weights of other sizes, with frozen parts and rates by depth, from the command line."""

import torch

from lightning_flows.cli import dispatch
from tests.cli.conftest import RECIPE, SMALL
from tests.cli.test_trainer_verbs import refused

TABLE = "network.y_embedder.embedding_table.weight"


def test_a_run_is_fitted_frozen_and_slowed_down(in_run, tmp_path, monkeypatch):
    ckpt = str(in_run / "runs/digits/checkpoints/last.ckpt")
    monkeypatch.chdir(tmp_path)
    cli = dispatch(
        [
            "fit", *RECIPE, *SMALL, "--run_name", "twelve", "--init_from", ckpt, "--resize", "true",
            "--model.init_args.network.init_args.num_classes=12",
            "--trainer.callbacks+=Freeze",
            '--trainer.callbacks.parts=["network.blocks.*"]',
            "--trainer.callbacks+=Freeze",
            '--trainer.callbacks.parts=["network.x_embedder.*"]',
            "--trainer.callbacks.until_step=100",
            "--trainer.callbacks+=LearningRates",
            '--trainer.callbacks.factors={"network.final_layer.*": 0.5}',
            "--trainer.max_steps=2",
        ]
    )  # fmt: skip
    source = torch.load(ckpt, weights_only=True)["state_dict"]
    state = cli.model.state_dict()
    assert state[TABLE].shape == (13, 16)
    frozen = [name for name in source if name.startswith(("network.blocks.", "network.x_embedder."))]
    assert all(torch.equal(state[name], source[name]) for name in frozen)
    assert not torch.equal(state["network.final_layer.linear.weight"], source["network.final_layer.linear.weight"])
    groups = {group["name"] for group in cli.trainer.optimizers[0].param_groups}
    assert groups == {"x1", "x1/vectors", "x0.5", "x0.5/vectors"}


def test_resize_goes_with_init_from():
    assert "--resize" in refused(["fit", *RECIPE, "--resize", "true", "--run_name", "x"])
