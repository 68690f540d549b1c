"""Freeze: frozen parts stay bit for bit, are let go at their step, and interrupted runs equal uninterrupted ones."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_flows.callbacks import EMA, Freeze
from tests.callbacks.test_ema import equal
from tests.callbacks.toy import Toy, data, trainer


class Net(nn.Module):
    """Three parts; the first has a running statistic and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Parts(Toy):
    """Adam with momentum and decay over a network of three parts."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        torch.manual_seed(int(self.trainer.fit_loop.epoch_loop.total_batch_idx))  # the dropout of this batch
        return self.loss(batch)

    def loss(self, batch):
        (x,) = batch
        return (self.net(x) - self.frozen(x)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.loss(batch)

    def configure_optimizers(self):
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1, **self.options)


class Record(Callback):
    """The parameters after every batch, those in training mode, and the norm that clipping sees."""

    def __init__(self):
        self.weights, self.training, self.norms = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.net.named_parameters()})
        self.training.append({n for n, m in pl_module.net.named_modules() if m.training})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append({n for n, p in pl_module.net.named_parameters() if p.grad is not None})


def moved(record, before, after):
    """Parts that changed between two batches."""
    a, b = record.weights[before], record.weights[after]
    return {name.partition(".")[0] for name in a if not torch.equal(a[name], b[name])}


def test_frozen_parts_are_no_part_of_the_optimizer_and_free_again_after_the_fit(tmp_path):
    model, record = Parts(), Record()
    before = {n: v.clone() for n, v in model.net.state_dict().items()}
    run = trainer(tmp_path, Freeze(["net.first.*", "net.second.weight"]), record, max_steps=4)
    run.fit(model, data())
    after = model.net.state_dict()
    still = {n for n, _ in model.net.named_parameters() if torch.equal(before[n], after[n])}
    assert still == {"first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias", "second.weight"}
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == 3
    assert record.norms[0] == {"second.bias", "third.weight", "third.bias"}
    assert all(p.requires_grad for p in model.net.parameters())
    assert not model.frozen.weight.requires_grad  # what was frozen by the module stays so


def test_parts_are_let_go_at_their_steps(tmp_path):
    record = Record()
    callbacks = [Freeze(["net.first.*"], until_step=4), Freeze(["net.second.*"], until_step=2), record]
    run = trainer(tmp_path, *callbacks, max_steps=6)
    run.fit(Parts(), data())
    assert moved(record, 0, 1) == {"third"}
    assert moved(record, 1, 2) == moved(record, 2, 3) == {"second", "third"}
    assert moved(record, 3, 4) == {"first", "second", "third"}
    first = Parts().net.state_dict()
    assert all(torch.equal(record.weights[3][n], first[n]) for n in record.weights[3] if n.startswith("first"))
    steps = [int(run.optimizers[0].state[p]["step"]) for p in run.lightning_module.net.parameters()]
    assert steps == [2] * 4 + [4] * 2 + [6] * 2  # moments begin when a part is let go
    assert callbacks[0].state_key != callbacks[1].state_key


def test_frozen_until_a_step_equals_frozen_for_good_before_it(tmp_path):
    wait, never = Record(), Record()
    options = {"gradient_clip_val": 0.05, "max_steps": 5}
    trainer(tmp_path, Freeze(["net.first.*"], until_step=9), wait, **options).fit(Parts(), data())
    trainer(tmp_path, Freeze(["net.first.*"]), never, **options).fit(Parts(), data())
    assert equal(wait.weights, never.weights)  # the norm that clips is that of the trained parts alone
    assert wait.norms == never.norms


def test_steps_are_those_of_the_optimizer(tmp_path):
    record = Record()
    trainer(tmp_path, Freeze(["net.first.*"], until_step=2), record, max_steps=3, accumulate_grad_batches=3).fit(
        Parts(), data(18)
    )
    assert moved(record, 2, 5) == {"second", "third"}
    assert moved(record, 5, 8) == {"first", "second", "third"}


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_that_stops_around_the_step_equals_one_that_does_not(tmp_path, at):
    def callbacks():
        return [Freeze(["net.first.*"], until_step=3, eval_mode=True), EMA(0.5)]

    whole, half, rest = Parts(), Parts(), Parts()  # an epoch is a step: this loader cannot resume inside one
    trainer(tmp_path, *callbacks(), max_steps=6).fit(whole, data(4, 4))
    save = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=at, filename="x")
    trainer(tmp_path, *callbacks(), save, max_steps=at).fit(half, data(4, 4))
    trainer(tmp_path, *callbacks(), max_steps=6).fit(rest, data(4, 4), ckpt_path=tmp_path / "c" / "x.ckpt")
    assert equal(dict(rest.net.state_dict()), dict(whole.net.state_dict()))
    assert not torch.equal(whole.net.first[0].weight, Parts().net.first[0].weight)


@pytest.mark.parametrize("until", [None, 3])
def test_the_average_of_frozen_parts_is_what_they_are(tmp_path, until):
    model = Parts()
    before = model.net.first[0].weight.detach().clone()
    trainer(tmp_path, EMA(0.9), Freeze(["net.first.*"], until_step=until), max_steps=3).fit(model, data())
    assert torch.equal(model.net.first[0].weight, before)


def test_frozen_parts_are_in_eval_mode_if_asked(tmp_path):
    quiet, usual = Record(), Record()
    model = Parts()
    freeze = Freeze(["net.first.*", "net.second.weight"], until_step=2, eval_mode=True)
    trainer(tmp_path, freeze, quiet, max_steps=3, val_check_interval=1).fit(model, data(), data(2))
    trainer(tmp_path, Freeze(["net.first.*"], until_step=2), usual, max_steps=3).fit(Parts(), data())
    everything = {"", "first", "first.0", "first.1", "first.2", "second", "third"}
    assert quiet.training == [everything - {"first", "first.0", "first.1", "first.2"}] * 2 + [everything]
    assert usual.training == [everything] * 3
    assert model.net.first[1].num_batches_tracked == 1


class Scaled(Callback):
    """Infinite gradients in the first part, before the scaler looks at them."""

    def on_before_backward(self, trainer, pl_module, loss):
        if not getattr(self, "handle", None):
            self.handle = pl_module.net.first[0].weight.register_hook(lambda grad: grad * torch.inf)


def test_gradients_of_frozen_parts_do_not_make_a_scaler_skip(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    record, plugin = Record(), MixedPrecision("16-mixed", "cpu", scaler)
    trainer(tmp_path, Scaled(), Freeze(["net.first.*"], until_step=9), record, max_steps=2, plugins=[plugin]).fit(
        Parts(), data()
    )
    assert moved(record, 0, 1) == {"second", "third"}
    assert scaler.get_scale() == 8.0


def test_an_interrupted_fit_leaves_the_module_free(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    model = Parts()
    callbacks = [Freeze(["net.first.*"], eval_mode=True), Freeze(["net.*.0.*"]), Break()]
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, *callbacks, max_steps=2).fit(model, data())
    assert all(p.requires_grad for p in model.net.parameters())
    assert all(part.training for part in model.net.modules())


def test_gradients_of_sharded_parameters_are_dropped(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Sharded(Parts):
        def on_fit_start(self):
            for part in (*self.net.children(), self.net):
                fully_shard(part, mesh=init_device_mesh("cpu", (1,)))

        def configure_optimizers(self):
            self.on_fit_start()
            self.on_fit_start = lambda: None
            return super().configure_optimizers()

    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        record = Record()
        trainer(tmp_path, Freeze(["net.first.*"], until_step=1), record, max_steps=2).fit(Sharded(), data())
    finally:
        destroy_process_group()
    assert record.norms[0] == {"second.weight", "second.bias", "third.weight", "third.bias"}
    assert len(record.norms[1]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": []}, "parts must name"),
        ({"parts": ["net.*"], "until_step": 0}, "until_step must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Freeze(**arguments)


@pytest.mark.parametrize(
    ("parts", "until", "message"),
    [
        (["net.fourth.*"], None, r"Freeze.parts=\['net.fourth.\*'\] names no parameter; .*'net.first.0.weight'"),
        ("net.*", None, "is a string"),
        (["*"], None, "leaves no parameter of Parts to train"),
        (["net.*"], 5, "leaves no parameter of Parts to train"),
    ],
)
def test_parts_that_cannot_be_meant_are_named_when_the_fit_starts(tmp_path, parts, until, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, Freeze(parts, until_step=until), max_steps=1).fit(Parts(), data())
