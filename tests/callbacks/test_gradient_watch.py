"""Bad steps leave no trace in the weights and the optimizer, and their batches are found on the disk."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lightning_flows.callbacks import EMA, GradientWatch
from lightning_flows.callbacks.gradient_watch import plain, total_norm
from tests.callbacks.toy import Toy, trainer

NAN, HUGE = float("nan"), 1e3


class Counted(Toy):
    """Without the running statistic, which a bad batch spoils whatever the optimizer does."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def batches(*scales):
    """One batch of two rows for each scale; rows differ between places, not between scales."""
    x = torch.randn(len(scales), 2, 4, generator=torch.Generator().manual_seed(1))
    x = x * torch.tensor(scales)[:, None, None]
    return DataLoader(TensorDataset(x.flatten(0, 1)), batch_size=2)


class Steps(Callback):
    """Weights and optimizer state after each batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(copy.deepcopy((module.net.state_dict(), trainer.optimizers[0].state_dict()["state"])))


def fit(folder, loader, watch, *callbacks, model=None, **options):
    steps, model = Steps(), model or Counted()
    fitted = trainer(folder, watch, *callbacks, steps, **{"max_epochs": 1, **options})
    fitted.fit(model, loader)
    return steps.states, fitted, model


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def bad_batches(folder):
    return sorted(file.name for file in (folder / "bad_batches").glob("*"))


def kept(folder, name):
    return torch.load(folder / "bad_batches" / name, weights_only=True)


@pytest.mark.parametrize(
    ("scale", "rule", "reason"),
    [
        (NAN, {}, "norm nan is not finite"),
        (HUGE, {"max_norm": 1e4}, "above max_norm=10000"),
        (HUGE, {"spike": 50.0, "window": 2}, "above spike=50 times the median"),
    ],
    ids=["NaN", "too large", "spike"],
)
def test_a_bad_step_changes_neither_weights_nor_optimizer(tmp_path, scale, rule, reason):
    watch = GradientWatch(**rule)
    states, fitted, _ = fit(tmp_path, batches(1, 1, scale, 1), watch)
    for before, after in zip(states[1], states[2], strict=True):
        assert all(same(before[name], after[name]) for name in before)
    assert states[3][1][0]["step"] == 3  # AdamW counts the good steps only
    assert (watch.skipped, fitted.global_step) == (1, 4)
    content = kept(tmp_path, "step-2-rank-0.pt")
    assert (content["step"], content["rank"], content["index"]) == (2, 0, None)
    assert reason in content["reason"]
    (rows,) = list(batches(1, 1, scale, 1))[2]
    assert torch.equal(content["batches"][0][0].nan_to_num(7.0), rows.nan_to_num(7.0))
    assert bad_batches(tmp_path) == ["step-2-rank-0.pt"]


def test_a_run_goes_on_as_if_the_batch_had_not_been_there(tmp_path):
    _, _, watched = fit(tmp_path / "a", batches(1, 2, NAN), GradientWatch())
    _, _, clean = fit(tmp_path / "b", batches(1, 2, 2), GradientWatch(), max_steps=2)
    assert torch.equal(watched.net.weight, clean.net.weight)


def test_a_good_run_is_not_changed(tmp_path):
    _, _, watched = fit(tmp_path, batches(1, 2, 3), GradientWatch(max_norm=1e9, spike=1e9, window=1))
    _, _, plain_run = fit(tmp_path, batches(1, 2, 3), Callback())
    assert torch.equal(watched.net.weight, plain_run.net.weight)
    assert not (tmp_path / "bad_batches").exists()


def test_all_micro_batches_of_a_bad_step_are_kept_and_no_others(tmp_path):
    states, fitted, _ = fit(tmp_path, batches(1, 2, 3, NAN, 5, 6), GradientWatch(), accumulate_grad_batches=2)
    assert fitted.global_step == 3
    found = kept(tmp_path, "step-1-rank-0.pt")["batches"]
    expected = [rows for (rows,) in batches(1, 2, 3, NAN, 5, 6)][2:4]
    assert [len(batch) for batch in found] == [1, 1]
    for (rows,), other in zip(found, expected, strict=True):
        assert torch.equal(rows.nan_to_num(7.0), other.nan_to_num(7.0))
    assert torch.equal(states[1][0]["weight"], states[3][0]["weight"])


def test_bad_steps_in_a_row_end_the_run_and_single_ones_do_not(tmp_path):
    watch = GradientWatch(stop_after=2, keep=1)
    fit(tmp_path / "single", batches(NAN, 1, NAN, 1), watch)
    assert watch.skipped == 2
    with pytest.raises(RuntimeError, match=r"2 steps in a row .* at step 2; .* nan, nan\. .*bad_batches"):
        fit(tmp_path / "row", batches(1, NAN, NAN, 1), GradientWatch(stop_after=2))
    assert bad_batches(tmp_path / "row") == ["step-1-rank-0.pt", "step-2-rank-0.pt"]
    assert bad_batches(tmp_path / "single") == ["step-0-rank-0.pt"]  # keep=1: the first
    endless = GradientWatch(stop_after=None, keep=0)
    fit(tmp_path / "endless", batches(*[NAN] * 30), endless)
    assert endless.skipped == 30
    assert not (tmp_path / "endless" / "bad_batches").exists()


def test_a_spike_is_measured_against_good_steps_of_a_full_window(tmp_path):
    watch = GradientWatch(spike=50.0, window=3)
    fit(tmp_path, batches(1, HUGE, 1, HUGE, HUGE, 1), watch)
    # the second step finds no full window and is a good one; the median of 1, HUGE, 1 is about that of 1
    assert bad_batches(tmp_path) == ["step-3-rank-0.pt", "step-4-rank-0.pt"]


def test_counts_and_windows_survive_a_resume(tmp_path):
    loader = batches(NAN, 1, NAN, NAN, 1)
    options = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    watch = GradientWatch(stop_after=3)
    fit(tmp_path, loader, watch, ModelCheckpoint(tmp_path, **options), max_steps=3)
    resumed = GradientWatch(stop_after=2)
    more = trainer(tmp_path, resumed, max_steps=4, max_epochs=2)
    with pytest.raises(RuntimeError, match="2 steps in a row"):  # one before the resume, one after
        more.fit(Counted(), batches(NAN), ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.skipped == watch.skipped + 1 == 3
    assert resumed.state_dict()["kept"] == 3
    assert resumed.state_dict()["histories"][0]["good"] == watch.state_dict()["histories"][0]["good"]


def test_norms_and_counts_are_logged(tmp_path):
    rows = []
    logger = CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: rows.append((step, metrics))
    fit(tmp_path, batches(1, NAN, 1, 1), GradientWatch(), logger=logger, log_every_n_steps=2)
    found = {step: row for step, row in rows if "train/grad_norm" in row}
    assert list(found) == [1, 3]
    assert found[1]["train/grad_norm"] != found[1]["train/grad_norm"]  # NaN
    assert found[3]["train/grad_norm"] > 0
    assert [row["train/skipped_steps"] for row in found.values()] == [1, 1]


def test_the_average_goes_on_over_unchanged_weights(tmp_path):
    ema = EMA(decay=0.5, warmup=False)
    states, _, model = fit(tmp_path, batches(1, 1, NAN), GradientWatch(), ema)
    average = states[0][0]["weight"]
    for weights, _ in states[1:]:
        average = 0.5 * average + 0.5 * weights["weight"]
    assert ema.updates == 3
    torch.testing.assert_close(model.net.weight.detach(), average)


class Fused(Counted):
    """Its optimizer divides by the scale inside of its step."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.05, fused=True)


@pytest.mark.parametrize("module", [Counted, Fused])
def test_an_overflow_of_the_scale_is_left_to_the_scaler_and_a_broken_loss_is_not(tmp_path, module):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-30)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    watch = GradientWatch(stop_after=2)
    states, _, _ = fit(tmp_path, batches(1, 1, 1, NAN, 1), watch, model=module(), plugins=[plugin])
    assert max(watch.state_dict()["histories"][0]["good"]) < 100  # of the gradient, not of the scaled one
    assert scaler.get_scale() < 2.0**31
    assert torch.equal(states[0][0]["weight"], Counted().net.weight)  # the scaler left this one out
    assert not torch.equal(states[-1][0]["weight"], states[0][0]["weight"])
    assert bad_batches(tmp_path) == ["step-3-rank-0.pt"]
    assert watch.skipped == 1


class TwoOptimizers(Counted):
    """Takes a step of each of two optimizers in every batch; the second one's loss may be broken."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        own, other = self.optimizers()
        for optimizer, loss in ((own, self.loss(batch)), (other, self.other(batch[0]).mean())):
            optimizer.zero_grad()
            self.manual_backward(loss * (NAN if optimizer is other and batch_idx == 1 else 1.0))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=0.05) for part in (self.net, self.other)]


def test_each_of_two_optimizers_is_watched_for_itself(tmp_path):
    watch, logger, rows = GradientWatch(), CSVLogger(tmp_path), []
    logger.log_metrics = lambda metrics, step=None: rows.append(metrics)
    _, fitted, _ = fit(tmp_path, batches(1, 1, 1), watch, model=TwoOptimizers(), logger=logger)
    assert [o.state_dict()["state"][0]["step"].item() for o in fitted.optimizers] == [3, 2]
    assert [len(h["good"]) for h in watch.state_dict()["histories"]] == [3, 2]
    assert (watch.skipped, len(bad_batches(tmp_path))) == (1, 1)
    assert {"train/grad_norm/0", "train/grad_norm/1"} <= rows[0].keys()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "bad_batches").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept"):
        _, fitted, _ = fit(tmp_path, batches(1, NAN, 1), GradientWatch())
    assert fitted.global_step == 3


def test_total_norm_is_that_of_one_long_vector():
    parts = [torch.randn(3, 4), torch.randn(5).double(), torch.randn(2, dtype=torch.bfloat16)]
    whole = torch.cat([part.flatten().double() for part in parts])
    torch.testing.assert_close(total_norm(parts).double(), whole.norm(), rtol=1e-3, atol=0)


def test_what_is_kept_of_a_batch_can_be_read_without_its_classes(tmp_path):
    view = torch.arange(1000.0)[:2].requires_grad_()
    batch = {"x": view, "caption": ["a"], 3: (1, None), "array": torch.ones(2).numpy(), "odd": {1}}
    torch.save(plain(batch), tmp_path / "batch.pt")
    found = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert found.keys() == {"x", "caption", "3", "array", "odd"}
    assert found["x"].tolist() == [0.0, 1.0]
    assert (found["3"], found["odd"], found["caption"]) == ([1, None], "{1}", ["a"])
    assert (tmp_path / "batch.pt").stat().st_size < 3000  # not the storage behind the view


@pytest.mark.parametrize(
    "wrong",
    [{"max_norm": 0.0}, {"max_norm": NAN}, {"spike": 1.0}, {"window": 0}, {"stop_after": 0}, {"keep": -1}],
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"GradientWatch: {next(iter(wrong))} must"):
        GradientWatch(**wrong)
