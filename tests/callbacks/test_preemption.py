"""A run that is told to go, at any moment, and goes on later is one that never stopped."""

import os
import signal
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_flows.callbacks import EMA, Preemption
from lightning_flows.callbacks.preemption import EXIT_STATUS
from tests.callbacks.toy import Toy, data, trainer
from tests.modules.test_resume import STATE, differences, run, step

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")

VALIDATE = {"val_check_interval": 2, "num_sanity_val_steps": 0}
STEPS = 7  # more than the five batches of an epoch


class Warn(Callback):
    """Sends this process a signal at one call of one hook."""

    def __init__(self, hook, call, name="SIGUSR1", times=1):
        self.calls, self.call, self.name, self.times = 0, call, name, times
        setattr(self, hook, self._count)

    def _count(self, *_, **__):
        self.calls += 1
        if self.calls == self.call:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))


def interrupted(folder, *callbacks, steps=STEPS, **options):
    """Run until the signal; the checkpoint that it left."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as end:
        run(folder, steps, callbacks=[Preemption(), *callbacks], **options)
    assert end.value.code == EXIT_STATUS
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)] == before
    return folder / "last.ckpt"


def assert_same_rest(whole, rest):
    """The resumed run saw what the whole one saw after that point, and ended in the same state."""
    (one, end), (tail, resumed) = whole, rest
    assert 0 < len(tail.losses) < len(one.losses)
    assert tail.losses == one.losses[-len(tail.losses) :]
    assert tail.rates == one.rates[-len(tail.rates) :]
    for part in STATE:
        assert differences(end[part], resumed[part], part) == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made = {}

    def get(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("whole"), STEPS, **options)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("hook", "call", "options", "steps_done"),
    [
        ("on_train_batch_start", 3, {}, 3),  # the step under way is ended
        ("on_train_batch_end", 5, {}, 5),  # in the last batch of an epoch
        ("on_train_epoch_end", 1, {}, 6),  # between two epochs: after the next step
        ("on_train_batch_start", 3, {"accumulate": 2}, 2),  # in the first of two micro-batches
        ("on_train_batch_start", 5, {"accumulate": 2}, 3),  # the step of an epoch's last, single micro-batch
        ("on_validation_batch_start", 1, VALIDATE, 2),  # the average stands in the module
        ("on_validation_end", 1, VALIDATE, 2),
        (
            "on_validation_batch_start",
            1,
            {**VALIDATE, "val_check_interval": 3, "accumulate": 2},
            2,
        ),  # half a step is done
    ],
    ids=["step", "end of epoch", "between epochs", "accumulated", "last", "validation", "after it", "half a step"],
)
def test_a_run_that_was_told_to_go_is_one_that_never_stopped(tmp_path, uninterrupted, hook, call, options, steps_done):
    saved = interrupted(tmp_path / "first", Warn(hook, call), **options)
    content = torch.load(saved, weights_only=True)
    assert content["global_step"] == steps_done
    assert content["current_model_state"].keys() == content["state_dict"].keys()  # the average and the raw weights
    rest = run(tmp_path / "rest", STEPS, ckpt_path=saved, callbacks=[Preemption()], **options)
    assert_same_rest(uninterrupted(**options), rest)


def test_the_file_equals_the_one_that_is_saved_at_that_step(tmp_path):
    """Also in what callbacks remember, whatever their order in the list."""
    saved = torch.load(interrupted(tmp_path, Warn("on_train_batch_start", 2)), weights_only=True)
    other = torch.load(step(tmp_path, 2), weights_only=True)
    for part in (*STATE, "loops"):
        assert differences(saved[part], other[part], part) == []
    (keeper,) = (state for name, state in saved["callbacks"].items() if name.startswith("ModelCheckpoint"))
    assert keeper["best_model_path"] == str(step(tmp_path, 2))
    assert keeper["last_model_path"] == str(tmp_path / "last.ckpt")


def test_many_signals_are_one(tmp_path):
    saved = interrupted(tmp_path, Warn("on_train_batch_start", 1, "SIGTERM", times=3), Warn("on_save_checkpoint", 2))
    assert torch.load(saved, weights_only=True)["global_step"] == 1


def test_a_signal_during_the_check_before_training_saves_nothing(tmp_path):
    callbacks = [Preemption(), Warn("on_validation_batch_start", 1)]
    with pytest.raises(SystemExit) as end:
        trainer(tmp_path, *callbacks, max_steps=3, num_sanity_val_steps=1).fit(Toy(), data(), data(2))
    assert end.value.code == EXIT_STATUS
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_run_is_ended_by_its_signals_only(tmp_path):
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("mine"))
    try:
        callbacks = [Preemption(["SIGTERM"]), Warn("on_train_batch_start", 2)]
        fit = trainer(tmp_path, *callbacks, max_steps=3)
        fit.fit(Toy(), data())
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert fit.global_step == 3
    assert heard == ["mine"]


def test_without_a_model_checkpoint_it_goes_to_the_root_of_the_run(tmp_path):
    with pytest.raises(SystemExit):
        trainer(tmp_path, EMA(), Preemption(), Warn("on_train_batch_start", 2), max_steps=3).fit(Toy(), data())
    resumed = trainer(tmp_path, EMA(), Preemption(), max_steps=3)
    resumed.fit(Toy(), data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.global_step == 3


def test_a_link_named_last_is_replaced_and_what_it_pointed_to_is_kept(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")
    with pytest.raises(SystemExit):
        trainer(tmp_path, keeper, Preemption(), Warn("on_train_batch_start", 2), max_steps=5).fit(Toy(), data())
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert torch.load(tmp_path / "step=2.ckpt", weights_only=True)["global_step"] == 2
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    more = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")
    trainer(tmp_path, more, Preemption(), max_steps=4).fit(Toy(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not list(tmp_path.glob("last-v*"))


def test_outside_the_main_thread_it_says_that_it_cannot_listen(tmp_path):
    fit = trainer(tmp_path, Preemption(), max_steps=1)

    def in_a_thread():
        thread = threading.Thread(target=fit.fit, args=(Toy(), data()))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="main thread"):
        in_a_thread()
    assert fit.global_step == 1


@pytest.mark.parametrize("signals", [[], "SIGTERM", ["SIGKILL"], ["SIGNAL"]])
def test_names_that_are_no_signals_are_refused(signals):
    with pytest.raises(ValueError, match="signals must be a list of names among"):
        Preemption(signals)
