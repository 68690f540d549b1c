import time

import pytest
import torch

from lightning_flows.callbacks import Throughput
from lightning_flows.callbacks.throughput import batch_size, known_peak
from tests.callbacks.toy import Toy, data, trainer


class Log:
    """What a callback hands to loggers."""

    def __init__(self, tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        self.logger = CSVLogger(tmp_path)
        self.rows = []
        write = self.logger.log_metrics
        self.logger.log_metrics = lambda metrics, step=None: (
            self.rows.append((step, metrics)),
            write(metrics, step),
        )

    @property
    def speeds(self):
        return [(step, row) for step, row in self.rows if "throughput/step_seconds" in row]


class Slow(Toy):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.3)


def fit(tmp_path, model, callback, loaders, **options):
    log = Log(tmp_path)
    trainer(tmp_path, callback, logger=log.logger, **options).fit(model, *loaders)
    return log.speeds


def test_windows_count_samples_per_second_without_validation(tmp_path):
    speeds = fit(tmp_path, Slow(), Throughput(4), (data(), data(2)), max_epochs=2)
    assert [step for step, _ in speeds] == [6, 10]  # two warm-up batches, then windows of four
    for _, row in speeds:
        assert 0.02 < row["throughput/step_seconds"] < 0.06
        product = row["throughput/samples_per_second"] * row["throughput/step_seconds"]
        assert product == pytest.approx(2)
        assert "throughput/model_flops_utilisation" not in row


def test_step_seconds_are_those_of_an_optimizer_step(tmp_path):
    speeds = fit(tmp_path, Slow(), Throughput(2), (data(24),), max_epochs=1, accumulate_grad_batches=2)
    assert speeds
    for _, row in speeds:
        assert row["throughput/step_seconds"] > 0.04
        assert row["throughput/samples_per_second"] * row["throughput/step_seconds"] == pytest.approx(4)


def test_utilisation_is_operations_per_second_over_the_peak(tmp_path):
    callback = Throughput(4, peak_flops=1e9)
    speeds = fit(tmp_path, Toy(), callback, (data(),), max_epochs=1)
    # net: forward and weight gradient; frozen: forward. Each is 2 * batch * 4 * 4 operations.
    assert callback.flops_per_batch == 3 * 2 * 2 * 4 * 4
    ((_, row),) = speeds
    seconds = row["throughput/step_seconds"]
    expected = callback.flops_per_batch / seconds / 1e9
    assert row["throughput/model_flops_utilisation"] == pytest.approx(expected)


def test_counting_does_not_change_the_training(tmp_path):
    weights = []
    for callbacks in ((), (Throughput(2, peak_flops=1e12),)):
        model = Toy()
        trainer(tmp_path, *callbacks, max_steps=7).fit(model, data(), data(2))
        weights.append(model.net.weight.detach())
    assert torch.equal(*weights)


def test_an_exception_in_the_first_batch_leaves_no_counter_behind(tmp_path):
    class Broken(Toy):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        trainer(tmp_path, Throughput(peak_flops=1.0), max_steps=1).fit(Broken(), data())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Some other GPU", None),
    ],
)
def test_peak_is_known_for_exactly_these_boards(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak(torch.device("cuda", 0)) == peak
    assert known_peak(torch.device("cpu")) is None


def test_batch_size_is_the_length_of_the_first_tensor():
    x = torch.zeros(3, 2)
    assert batch_size(x) == batch_size([x]) == batch_size({"caption": ["a"], "image": x}) == 3
    with pytest.raises(ValueError, match="batch must be"):
        batch_size({"caption": ["a"]})


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"peak_flops": 0.0}])
def test_arguments_that_are_not_positive_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Throughput(**arguments)
