"""Evaluation: what is scored, logged and written."""

import json
import math
import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_flows.callbacks.evaluation import Evaluation
from lightning_flows.networks import Automatic, Sequential


class Gap(Metric):
    """Difference of the means; counts both sides."""

    name, extractor, full_state_update = "gap", "mean", False

    def __init__(self):
        super().__init__()
        for which in ("real", "sample"):
            self.add_state(f"{which}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{which}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x, real):
        which = "real" if real else "sample"
        setattr(self, f"{which}_sum", getattr(self, f"{which}_sum") + x.double().mean((1, 2, 3)).sum())
        setattr(self, f"{which}_count", getattr(self, f"{which}_count") + len(x))

    def compute(self):
        return self.sample_sum / self.sample_count - self.real_sum / self.real_count

    def caution(self, real, samples):
        return f"gap from {samples} samples" if samples < 10 else None


class Both(Gap):
    name = "both"

    def compute(self):
        return {"samples": self.sample_count, "nan": torch.tensor(math.nan), "list": torch.arange(2.0)}


class Short(Gap):
    name = "short"

    def compute(self):
        raise ValueError("2 items, at least 50 are needed")


class MeanLoss(Metric):
    name, consumes, full_state_update = "mean_loss", ("losses",), False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, losses):
        self.total = self.total + losses.sum()

    def compute(self):
        return self.total


class Toy(L.LightningModule):
    steps, solver, guidance = 4, None, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (self.weight - 1).square().sum()

    def validation_step(self, batch, batch_idx):
        return {"losses": torch.ones(len(batch[0]))}

    def test_step(self, batch, batch_idx):
        if self.trainer.testing:
            self.log("test/nats", 2.5)
        assert not torch.is_grad_enabled()
        return {"real": batch[0], "sample": batch[0] + 1, "nfe": 8, "seconds": 0.5}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _loader(n=12):
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, 2, 2).clone()
    return DataLoader(TensorDataset(images), batch_size=4)


def _trainer(tmp_path, *callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | options)


def _read(tmp_path):
    return json.loads((tmp_path / "metrics.json").read_text())


def test_a_test_logs_and_writes_every_value_with_its_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    trainer = _trainer(tmp_path, Evaluation([Gap(), Both()]))
    trainer.test(Toy(), _loader(), verbose=False)
    logged = trainer.callback_metrics
    assert logged["test/gap"] == 1
    assert logged["test/both/samples"] == 12
    assert logged["test/both/list/1"] == 1
    assert "test/both/nan" not in logged
    block = _read(tmp_path)["test"]
    entry = block["values"]["gap"]
    assert entry.pop("device") == "cpu"
    assert entry.pop("precision") == "32-true"
    assert entry == {
        "value": 1.0, "real": 12, "samples": 12, "extractor": "mean", "seed": 11, "guidance_scale": 1.0,
        "guidance": None, "solver": None, "steps": 4, "nfe": 8, "seconds_per_sample": 1.5 / 12,

    }  # fmt: skip
    assert block["values"]["both"]["value"] == {"samples": 12.0, "nan": None, "list": [0.0, 1.0]}
    assert block["logged"] == {"nats": 2.5}
    assert set(block["versions"]) == {"lightning-flows", "torch", "lightning"}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_how_a_normalizing_flow_is_inverted_stands_beside_its_values(tmp_path):
    for method, written in ((None, repr(Automatic())), (Sequential(), "Sequential()")):
        model = Toy()
        model.method, model.denoise = method, 0.5
        _trainer(tmp_path, Evaluation([Gap()])).test(model, _loader(), verbose=False)
        entry = _read(tmp_path)["test"]["values"]["gap"]
        assert (entry["method"], entry["denoise"], entry["solver"]) == (written, 0.5, None)


def test_equal_runs_write_equal_files(tmp_path):
    for name in ("a", "b"):
        _trainer(tmp_path / name, Evaluation([Gap()])).test(Toy(), _loader(), verbose=False)
    assert (tmp_path / "a" / "metrics.json").read_text() == (tmp_path / "b" / "metrics.json").read_text()


def test_a_second_test_starts_from_empty_metrics(tmp_path):
    trainer = _trainer(tmp_path, Evaluation([Gap()]))
    trainer.test(Toy(), _loader(12), verbose=False)
    trainer.test(Toy(), _loader(8), verbose=False)
    assert _read(tmp_path)["test"]["values"]["gap"]["samples"] == 8


def test_samples_bounds_the_samples_and_not_the_real_items(tmp_path):
    _trainer(tmp_path, Evaluation([Gap()], samples=6)).test(Toy(), _loader(), verbose=False)
    entry = _read(tmp_path)["test"]["values"]["gap"]
    assert (entry["real"], entry["samples"]) == (12, 6)
    assert entry["value"] == pytest.approx(3.5 - 5.5)  # samples 1..6 against 0..11
    assert entry["seconds_per_sample"] == 1.5 / 12  # of all that were drawn


def test_too_few_samples_are_warned_about_and_written(tmp_path):
    with pytest.warns(UserWarning, match="gap from 4 samples"):
        _trainer(tmp_path, Evaluation([Gap()])).test(Toy(), _loader(4), verbose=False)
    assert _read(tmp_path)["test"]["values"]["gap"]["caution"] == "gap from 4 samples"


def test_a_metric_that_cannot_be_computed_does_not_cost_the_others(tmp_path):
    with pytest.warns(UserWarning, match="at least 50 are needed"):
        _trainer(tmp_path, Evaluation([Short(), Gap()])).test(Toy(), _loader(), verbose=False)
    values = _read(tmp_path)["test"]["values"]
    assert values["short"]["value"] is None
    assert values["gap"]["value"] == 1


def test_without_metrics_calls_and_seconds_are_written(tmp_path):
    _trainer(tmp_path, Evaluation()).test(Toy(), _loader(), verbose=False)
    entry = _read(tmp_path)["test"]["values"]["sampling"]
    assert (entry["nfe"], entry["samples"], entry["seconds_per_sample"]) == (8, 12, 0.125)


def test_on_validation_it_looks_every_n_epochs_and_not_at_the_sanity_check(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append((trainer.sanity_checking, trainer.callback_metrics.pop("val/gap", None)))

    evaluation = Evaluation([Gap(), MeanLoss()], on="validation", every_n_epochs=2)
    trainer = _trainer(tmp_path, evaluation, Watch(), max_epochs=4, limit_train_batches=1)
    trainer.fit(Toy(), _loader(), _loader())
    assert [(sanity, value is not None) for sanity, value in seen] == [
        (True, False), (False, False), (False, True), (False, False), (False, True)
    ]  # fmt: skip
    values = _read(tmp_path)["val"]["values"]
    assert values["gap"]["value"] == 1
    assert values["gap"]["epoch"] == 3
    assert values["mean_loss"]["value"] == 12
    assert "samples" not in values["mean_loss"]


def test_metrics_of_losses_alone_draw_no_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "test_step", lambda *_: pytest.fail("sampled"))
    trainer = _trainer(tmp_path, Evaluation([MeanLoss()], on="validation"))
    trainer.validate(Toy(), _loader(), verbose=False)
    assert trainer.callback_metrics["val/mean_loss"] == 12


def test_blocks_of_other_stages_stay_in_the_file(tmp_path):
    trainer = _trainer(tmp_path, Evaluation([Gap()]), Evaluation([Gap()], on="validation"))
    trainer.validate(Toy(), _loader(8), verbose=False)
    trainer.test(Toy(), _loader(12), verbose=False)
    content = _read(tmp_path)
    assert content["val"]["values"]["gap"]["samples"] == 8
    assert content["test"]["values"]["gap"]["samples"] == 12


def test_nothing_half_written_is_left_and_a_broken_file_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is no JSON file"):
        _trainer(tmp_path, Evaluation([Gap()])).test(Toy(), _loader(), verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_an_output_that_a_metric_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"mean_loss needs \['losses'\]"):
        _trainer(tmp_path, Evaluation([MeanLoss()])).test(Toy(), _loader(), verbose=False)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"on": "train"}, "on must be 'test' or 'validation'"),
        ({"metrics": [Gap(), Gap()]}, "metrics must have different names"),
    ],
)
def test_wrong_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Evaluation(**options)


def test_the_metrics_of_the_house_fit(tmp_path):
    from lightning_flows.metrics import PRDC, Frechet, KernelDistance, SlicedWasserstein

    metrics = [Frechet(), KernelDistance(subsets=2), PRDC(nearest=2), SlicedWasserstein(directions=8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _trainer(tmp_path, Evaluation(metrics)).test(Toy(), _loader(), verbose=False)
    values = _read(tmp_path)["test"]["values"]
    assert set(values) == {f"{name}[pixels]" for name in ("frechet", "kernel", "prdc", "sliced_wasserstein")}
    assert values["frechet[pixels]"]["value"] == pytest.approx(4.0, abs=1e-6)  # shifted by 1 in 4 pixels
    assert values["sliced_wasserstein[pixels]"]["value"] > 0
    assert set(values["prdc[pixels]"]["value"]) == {"precision", "recall", "density", "coverage"}
