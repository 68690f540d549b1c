"""EMA: the recursion, what holds the average when, and that interrupted runs equal uninterrupted ones."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_flows.callbacks import EMA
from lightning_flows.callbacks.averaged_weights import AveragedWeights
from tests.callbacks.toy import Late, Tied, Toy, data, trainer


class Record(Callback):
    """Raw weights after every batch and at the start of every epoch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.net.weight.detach().clone())


def equal(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def file(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("warmup", [True, False])
def test_average_follows_the_recursion(tmp_path, warmup):
    record, ema, model = Record(), EMA(0.6, warmup=warmup), Toy()
    trainer(tmp_path, ema, record, max_steps=20).fit(model, data())
    average = record.weights[0].double()
    for n, weights in enumerate(record.weights[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n)) if warmup else 0.6
        average = decay * average + (1 - decay) * weights.double()
    torch.testing.assert_close(model.net.weight.double(), average, atol=1e-6, rtol=0)
    assert ema.updates == 20
    assert not torch.equal(model.net.weight, record.weights[-1])


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (2, 5)])
def test_constant_decay_equals_lightning(tmp_path, every, start):
    ours, theirs = Toy(), Toy()
    trainer(tmp_path, EMA(0.8, warmup=False, update_every=every, start_step=start), max_steps=14).fit(ours, data())
    lightnings = EMAWeightAveraging(
        decay=0.8, use_buffers=False, update_every_n_steps=every, update_starting_at_step=start or None
    )
    trainer(tmp_path, lightnings, max_steps=14).fit(theirs, data())
    torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), atol=1e-6, rtol=1e-6)


def test_constant_decay_equals_lightnings_foreach_bit_for_bit(tmp_path):
    ours, theirs = Toy(), Toy()
    trainer(tmp_path, EMA(0.8, warmup=False), max_steps=9).fit(ours, data())
    average = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=False)
    trainer(tmp_path, average, max_steps=9).fit(theirs, data())
    assert equal(dict(ours.net.state_dict()), dict(theirs.net.state_dict()))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_counts_optimizer_steps_not_micro_batches(tmp_path, accumulate):
    record, ema, model = Record(), EMA(0.5, warmup=False), Toy()
    trainer(tmp_path, ema, record, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, data(16, 2))
    steps = 2 * 8 // accumulate
    assert ema.updates == steps
    after_steps = record.weights[accumulate - 1 :: accumulate]
    average = after_steps[0]
    for weights in after_steps[1:]:
        average = average.lerp(weights, 0.5)
    torch.testing.assert_close(model.net.weight.detach(), average)


def test_average_before_the_first_update_is_the_weights(tmp_path):
    plain, model = Toy(), Toy()
    ema = EMA(0.9, start_step=100)
    fit = trainer(tmp_path, ema, max_steps=5)
    fit.fit(model, data(), data())
    trainer(tmp_path, max_steps=5).fit(plain, data())
    assert ema.updates == 0
    assert equal(dict(model.state_dict()), dict(plain.state_dict()))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = file(tmp_path / "a.ckpt")
    assert equal(dict(saved["state_dict"]), dict(saved["current_model_state"]))


@pytest.mark.parametrize("kind", [Toy, Late, Tied])
def test_validation_sees_the_average_and_training_the_raw_weights(tmp_path, kind):
    class Watch(Callback):
        def on_validation_start(self, trainer, pl_module):
            self.average = [a.clone() for a in ema._weights.average]

        def on_validation_epoch_end(self, trainer, pl_module):
            assert torch.equal(pl_module.net.weight, self.average[0])

    record, ema, model, plain = Record(), EMA(0.9), kind(), kind()
    trainer(tmp_path, Watch(), ema, record, max_epochs=3).fit(model, data(), data(2))
    plain_record = Record()
    trainer(tmp_path, plain_record, max_epochs=3).fit(plain, data(), data(2))
    assert equal(record.weights, plain_record.weights)
    assert len(model.validated) == 3
    assert all(not torch.equal(v, w) for v, w in zip(model.validated, record.weights[5::6], strict=True))
    assert torch.equal(model.validated[-1], model.net.weight)


def test_frozen_parameters_and_buffers_are_not_averaged(tmp_path):
    ema, model, plain = EMA(0.9), Toy(), Toy()
    frozen = copy.deepcopy(model.frozen.state_dict())
    trainer(tmp_path, ema, max_epochs=2).fit(model, data(), data(2))
    trainer(tmp_path, max_epochs=2).fit(plain, data())
    assert equal(dict(model.frozen.state_dict()), dict(frozen))
    assert torch.equal(model.mean, plain.mean)
    assert model.count == 12
    assert len(ema._weights.params) == 2


def test_parameters_unfrozen_later_join_with_their_own_value(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.frozen.requires_grad_(True)

    ema, model = EMA(0.9), Toy()
    frozen = copy.deepcopy(dict(model.frozen.state_dict()))
    trainer(tmp_path, Unfreeze(), ema, max_epochs=3).fit(model, data(), data(2))
    assert len(ema._weights.params) == 4
    torch.testing.assert_close(dict(model.frozen.state_dict()), frozen)  # no gradient step: it is not in the optimizer


@pytest.mark.parametrize("kind", [Toy, Late, Tied])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kind, options):
    def run(folder, steps, ckpt=None):
        ema, model = EMA(0.9, update_every=2), kind()
        save = ModelCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit = trainer(tmp_path, ema, save, max_steps=steps, num_sanity_val_steps=1, **options)
        fit.fit(model, data(), data(2), ckpt_path=ckpt)
        return model, ema

    whole, whole_ema = run("whole", 12)
    run("half", 6)
    rest, rest_ema = run("rest", 12, tmp_path / "half" / "step=6.ckpt")
    assert equal(dict(rest.state_dict()), dict(whole.state_dict()))
    assert rest_ema.updates == whole_ema.updates == 6
    a, b = file(tmp_path / "whole" / "step=12.ckpt"), file(tmp_path / "rest" / "step=12.ckpt")
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert equal(a[key], b[key])
    assert not equal(dict(a["state_dict"]), dict(a["current_model_state"]))


@pytest.mark.parametrize("kind", [Toy, Late, Tied])
def test_checkpoint_saved_after_fit_equals_the_one_saved_in_it(tmp_path, kind):
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5, filename="inside")
    fit = trainer(tmp_path, EMA(0.9), save, max_steps=5)
    fit.fit(kind(), data())
    fit.save_checkpoint(tmp_path / "after.ckpt")
    inside, after = file(tmp_path / "inside.ckpt"), file(tmp_path / "after.ckpt")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert equal(dict(inside[key]), dict(after[key]))
    assert not equal(dict(after["state_dict"]), dict(after["current_model_state"]))


def test_resuming_a_finished_run_leaves_the_average_in_the_module(tmp_path):
    first, second = Toy(), Toy()
    fit = trainer(tmp_path, EMA(0.9), max_epochs=2)
    fit.fit(first, data(), data(2))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, EMA(0.9), max_epochs=2).fit(second, data(), data(2), ckpt_path=tmp_path / "a.ckpt")
    assert equal(dict(second.state_dict()), dict(first.state_dict()))


def test_weights_replaced_after_fit_are_saved_as_they_are(tmp_path):
    model, fit = Toy(), trainer(tmp_path, EMA(0.9), max_steps=4)
    fit.fit(model, data())
    torch.nn.init.ones_(model.net.weight)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = file(tmp_path / "a.ckpt")
    assert torch.equal(saved["state_dict"]["net.weight"], torch.ones(4, 4))
    assert "current_model_state" not in saved


@pytest.mark.parametrize("save_weights_only", [True, False])
@pytest.mark.parametrize("moment", ["step", "validation", "inside validation"])
def test_every_checkpoint_publishes_the_average(tmp_path, save_weights_only, moment):
    class Save(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if moment == "inside validation":
                trainer.save_checkpoint(tmp_path / "c" / "x.ckpt", weights_only=save_weights_only)

    class Average(Callback):
        def on_validation_start(self, trainer, pl_module):
            self.average, self.raw = ema._weights.average[0].clone(), ema._weights.raw

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.trained = pl_module.net.weight.detach().clone()

    ema, watch, model = EMA(0.9), Average(), Toy()
    when = {"every_n_train_steps": 6} if moment == "step" else {"every_n_epochs": 1}
    options = {"save_weights_only": save_weights_only, **when}
    save = ModelCheckpoint(dirpath=tmp_path / "c", filename="x", **options)
    callbacks = (Save(), watch, ema) if moment == "inside validation" else (watch, ema, save)
    trainer(tmp_path, *callbacks, max_epochs=1).fit(model, data(), data(2))
    saved = file(tmp_path / "c" / "x.ckpt")
    assert torch.equal(saved["state_dict"]["net.weight"], watch.average)
    assert saved["state_dict"]["count"] == 6
    assert ("current_model_state" in saved) is not save_weights_only
    if not save_weights_only:
        assert torch.equal(saved["current_model_state"]["net.weight"], watch.trained)
    assert "on_save_checkpoint" not in vars(model)


def test_exception_in_validation_leaves_raw_weights_and_a_resumable_checkpoint(tmp_path):
    whole, broken, rest = Toy(), Toy(fail_at=12), Toy()
    record = Record()
    trainer(tmp_path, EMA(0.9), record, max_epochs=3).fit(whole, data(), data(2))
    save = ModelCheckpoint(dirpath=tmp_path / "c", save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer(tmp_path, EMA(0.9), save, max_epochs=3).fit(broken, data(), data(2))
    assert torch.equal(broken.net.weight, record.weights[11])
    (path,) = (tmp_path / "c").glob("*.ckpt")
    saved = file(path)
    assert torch.equal(saved["current_model_state"]["net.weight"], record.weights[11])
    assert torch.equal(saved["state_dict"]["net.weight"], broken.validated[-1])
    trainer(tmp_path, EMA(0.9), max_epochs=3).fit(rest, data(), data(2), ckpt_path=path)
    assert equal(dict(rest.state_dict()), dict(whole.state_dict()))


def test_exception_between_step_and_update_loses_no_update(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                raise RuntimeError("broke before the average was updated")

    whole_ema, ema = EMA(0.9), EMA(0.9)
    whole = Toy()
    trainer(tmp_path, whole_ema, max_steps=5).fit(whole, data())
    save = ModelCheckpoint(dirpath=tmp_path / "c", save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="broke before"):
        trainer(tmp_path, Break(), ema, save, max_steps=9).fit(Toy(), data())
    (path,) = (tmp_path / "c").glob("*.ckpt")
    assert torch.equal(file(path)["state_dict"]["net.weight"], whole.net.weight)
    assert file(path)["averaging_state"]["n_averaged"] == 5


@pytest.mark.parametrize("direction", ["ours to Lightning", "Lightning to ours"])
def test_checkpoints_are_read_across(tmp_path, direction):
    def ours():
        return EMA(0.8, warmup=False)

    def theirs():
        return WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=False)

    first, second = (ours, theirs) if direction == "ours to Lightning" else (theirs, ours)
    whole, half, rest = Toy(), Toy(), Toy()
    trainer(tmp_path, ours(), max_steps=12).fit(whole, data())
    save = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=6, filename="x")
    trainer(tmp_path, first(), save, max_steps=6).fit(half, data())
    trainer(tmp_path, second(), max_steps=12).fit(rest, data(), ckpt_path=tmp_path / "c" / "x.ckpt")
    assert equal(dict(rest.net.state_dict()), dict(whole.net.state_dict()))
    assert torch.equal(rest.mean, whole.mean)


def test_plain_checkpoint_resumes_with_a_warning(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=6, filename="x")
    trainer(tmp_path, save, max_steps=6).fit(Toy(), data())
    ema, model, plain = EMA(0.9), Toy(), Toy()
    record, plain_record = Record(), Record()
    with pytest.warns(UserWarning, match="without weight averaging"):
        trainer(tmp_path, ema, record, max_steps=9).fit(model, data(), ckpt_path=tmp_path / "c" / "x.ckpt")
    trainer(tmp_path, plain_record, max_steps=9).fit(plain, data(), ckpt_path=tmp_path / "c" / "x.ckpt")
    assert equal(record.weights, plain_record.weights)
    assert ema.updates == 3


@pytest.mark.parametrize("kind", [Toy, Late, Tied])
def test_other_stages_load_the_average_of_a_checkpoint(tmp_path, kind):
    model, fit = kind(), trainer(tmp_path, EMA(0.9), max_steps=6)
    fit.fit(model, data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    fresh = kind()
    trainer(tmp_path, EMA(0.9)).test(fresh, data(2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(fresh.validated[0], model.net.weight)
    fit.test(model, data(2), verbose=False)
    assert torch.equal(model.validated[0], model.net.weight)


def test_float32_average_of_bf16_weights_is_not_rounded_by_validation(tmp_path):
    averages = []
    for loader in (None, data(2)):
        ema, model = EMA(0.99, warmup=False), Toy()
        trainer(tmp_path, ema, max_epochs=3, precision="bf16-true").fit(model, data(), loader)
        assert model.net.weight.dtype == torch.bfloat16
        averages.append(ema._weights.average[0])
    assert averages[0].dtype == torch.float32
    assert torch.equal(*averages)
    assert not torch.equal(averages[0], averages[0].bfloat16().float())


def test_bf16_update_equals_float32_update_of_the_same_weights():
    torch.manual_seed(0)
    low = torch.nn.Linear(8, 8).bfloat16()
    high = copy.deepcopy(low).float()
    a, b = AveragedWeights(), AveragedWeights()
    for module, weights in ((low, a), (high, b)):
        weights.bind(module)
        weights.update(1.0)
    for _ in range(5):
        with torch.no_grad():
            low.weight.add_(torch.randn(8, 8).bfloat16())
            high.weight.copy_(low.weight)
        a.update(0.01)
        b.update(0.01)
    torch.testing.assert_close(a.average, b.average, atol=1e-7, rtol=1e-6)


def test_sharded_parameters_are_averaged_shard_by_shard(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = torch.nn.Linear(4, 4)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        weights = AveragedWeights()
        weights.bind(module)
        weights.update(1.0)
        before = module.weight.full_tensor().detach().clone()
        torch._foreach_add_([p.detach() for p in module.parameters()], 1.0)
        weights.update(0.25)
        assert weights.enter()
        torch.testing.assert_close(module.weight.full_tensor(), before + 0.25)
        weights.leave()
        torch.testing.assert_close(module.weight.full_tensor(), before + 1.0)
    finally:
        destroy_process_group()


def test_manual_optimization_with_two_steps_per_batch_updates_once(tmp_path):
    class Manual(Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(2)]

    ema = EMA(0.9, update_every=2)
    trainer(tmp_path, ema, max_epochs=1).fit(Manual(), data())
    assert ema.updates == 6


def test_step_costs_no_python_loop_over_parameters():
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    weights = AveragedWeights()
    weights.bind(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(20)]))
    weights.update(1.0)
    with Count():
        weights.update(0.1)
    assert calls == ["aten._foreach_lerp_.Scalar"]


def test_second_averaging_callback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one averaging callback"):
        trainer(tmp_path, EMA(0.9), EMAWeightAveraging(), max_steps=1).fit(Toy(), data())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"decay": 1.0}, "decay"),
        ({"decay": -0.1}, "decay"),
        ({"update_every": 0}, "update_every"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        EMA(**arguments)


def test_a_new_fit_starts_a_new_average(tmp_path):
    ema, model = EMA(0.9), Toy()
    trainer(tmp_path, ema, max_steps=5).fit(model, data())
    trainer(tmp_path, ema, max_steps=3).fit(model, data())
    assert ema.updates == 3
    assert isinstance(model, L.LightningModule)
