"""k steps, a stop, and k steps more are 2k steps: bit for bit, with all that a recipe switches on."""

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_flows.callbacks import EMA
from lightning_flows.data import Digits
from lightning_flows.flow import FlowMatching, Stratified
from lightning_flows.modules import WarmupCosine
from tests.modules.tiny import dit, model

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")

BATCHES = 5  # micro-batches of an epoch
STEPS = {1: 5, 2: 3}  # optimizer steps of an epoch, by accumulation: the last micro-batch stands alone


class Record(Callback):
    """What every micro-batch saw, and the state of the global random stream at the end."""

    def __init__(self):
        self.losses, self.rates, self.random = [], [], None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, module):
        self.random = torch.get_rng_state()


def build():
    return model(
        dit(input_size=8, patch_size=4, num_classes=10),
        objective=FlowMatching(times=Stratified()),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=12, warmup_steps=3),
        standardize=1,
    )


def digits(workers):
    """The 90 digits that the fractions leave for training, in five batches."""
    parts = {"val_fraction": 0.01, "test_fraction": 0.94}
    return Digits(batch_size=90 // BATCHES, crop="random", resize=9, size=8, flip=True, num_workers=workers, **parts)


def run(folder, steps, *, ckpt_path=None, accumulate=1, workers=0, callbacks=(), **options):
    """One process's share of a run: everything it recorded, and its last checkpoint."""
    L.seed_everything(42, verbose=False)
    record, every = Record(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        callbacks=[EMA(decay=0.9, update_every=2), LearningRateMonitor(), record, *callbacks, every],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(build(), digits(workers), ckpt_path=ckpt_path)
    return record, torch.load(step(folder, steps), weights_only=True)


def step(folder, k):
    """The checkpoint after k optimizer steps."""
    return Path(folder) / f"step={k}.ckpt"


def differences(a, b, where="checkpoint"):
    """Places at which two nested values differ in a single bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [where]
    if isinstance(a, dict):
        keys = [] if a.keys() == b.keys() else [f"{where}: keys"]
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} and {b}"]


STATE = (
    "state_dict",  # the average, and the measured statistics of the latents
    "current_model_state",  # the raw weights
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "global_step",
    "epoch",
)


def assert_same_end(whole, first, rest):
    """The two halves lose, rate by rate and loss by loss, nothing of the whole."""
    (one, end), (head, _), (tail, resumed) = whole, first, rest
    assert head.losses + tail.losses == one.losses
    assert head.rates + tail.rates == one.rates
    assert torch.equal(tail.random, one.random)
    for part in STATE:
        assert differences(end[part], resumed[part], part) == []
    data = "combined_loader"
    loops = [state["loops"]["fit_loop"]["state_dict"][data] for state in (end, resumed)]
    assert loops[0] == loops[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that never stop, once each."""
    made = {}

    def get(steps, accumulate):
        if (steps, accumulate) not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[steps, accumulate] = run(folder, steps, accumulate=accumulate)
        return made[steps, accumulate]

    return get


@pytest.fixture(autouse=True)
def _restore_random_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("stop", "accumulate"),
    [(2, 1), (STEPS[1], 1), (STEPS[1] + 1, 1), (1, 2), (STEPS[2], 2), (STEPS[2] + 1, 2)],
    ids=[
        "middle",
        "end of epoch",
        "start of epoch",
        "middle, accumulated",
        "end, accumulated",
        "start, accumulated",
    ],
)
def test_k_steps_and_k_more_are_2k_steps(tmp_path, uninterrupted, stop, accumulate):
    whole = uninterrupted(2 * stop, accumulate)
    first = run(tmp_path / "first", stop, accumulate=accumulate)
    rest = run(tmp_path / "rest", 2 * stop, accumulate=accumulate, ckpt_path=step(tmp_path / "first", stop))
    assert_same_end(whole, first, rest)


@pytest.mark.parametrize("stop", [2, STEPS[1]])
def test_workers_change_nothing(tmp_path, uninterrupted, stop):
    whole = uninterrupted(2 * stop, 1)
    first = run(tmp_path / "first", stop, workers=2)
    rest = run(tmp_path / "rest", 2 * stop, workers=2, ckpt_path=step(tmp_path / "first", stop))
    assert_same_end(whole, first, rest)


def test_a_checkpoint_of_a_run_that_goes_on_is_resumed_exactly(tmp_path, uninterrupted):
    """With validation inside the epochs, which must leave no trace in the training."""
    options = {"val_check_interval": 2}
    one = run(tmp_path / "one", 2 * STEPS[1], **options)
    plain = uninterrupted(2 * STEPS[1], 1)
    assert one[0].losses == plain[0].losses
    for part in STATE:
        assert differences(one[1][part], plain[1][part], part) == []
    for stop in (2, 3, 6):  # after a validation, between two, in the second epoch
        saved = step(tmp_path / "one", stop)
        rest = run(tmp_path / f"rest{stop}", 2 * STEPS[1], ckpt_path=saved, **options)
        assert rest[0].losses == one[0].losses[stop:]
        for part in STATE:
            assert differences(one[1][part], rest[1][part], part) == []


class PowerCut(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("power cut")


def test_a_crash_between_steps_loses_nothing_that_was_saved(tmp_path, uninterrupted):
    whole = uninterrupted(2 * STEPS[1], 1)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "first", 2 * STEPS[1], callbacks=[PowerCut()])
    rest, end = run(tmp_path / "rest", 2 * STEPS[1], ckpt_path=step(tmp_path / "first", 3))
    assert rest.losses == whole[0].losses[3:]
    for part in STATE:
        assert differences(end[part], whole[1][part], part) == []


def test_another_seed_is_another_run(tmp_path, uninterrupted, monkeypatch):
    """The comparison can fail: noise follows the seed of the run."""
    import lightning_flows.modules.publishable as publishable

    whole = uninterrupted(2, 1)
    monkeypatch.setattr(publishable, "run_seed", lambda: 43)
    other = run(tmp_path, 2)
    assert other[0].losses != whole[0].losses
    assert differences(other[1]["state_dict"], whole[1]["state_dict"]) != []
