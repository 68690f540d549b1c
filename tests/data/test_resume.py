"""A run of Lightning's Trainer that stops and resumes sees the batches of one that never stopped."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_flows.data import Digits, Requests

BATCHES = 4  # an epoch


class Probe(L.LightningModule):
    """Notes what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.tested, self.predicted = [], [], []

    def training_step(self, batch):
        self.seen.append((batch["epoch"].tolist(), batch["index"].tolist(), batch["image"].sum().item()))
        return self.weight * 1.0

    def validation_step(self, batch):
        self.validated = batch["index"].tolist()

    def test_step(self, batch):
        self.tested += batch["index"].tolist()

    def predict_step(self, batch):
        self.predicted += batch["id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits(workers=0, **kwargs):
    kwargs = {"val_fraction": 0.1, "test_fraction": 0.0, **kwargs}
    return Digits(batch_size=400, size=8, resize=9, crop="random", num_workers=workers, seed=3, **kwargs)


def trainer(folder, steps=-1, epochs=-1, callbacks=(), **kwargs):
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=steps, max_epochs=epochs, logger=False,
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=bool(callbacks), use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def run(folder, *, ckpt_path=None, workers=0, callbacks=(), **kwargs):
    model = Probe()
    trainer(folder, callbacks=callbacks, **kwargs).fit(model, digits(workers), ckpt_path=ckpt_path)
    return model.seen


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


STEPS = 2 * BATCHES + 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run sees, and the folder of its checkpoints: ``step=K.ckpt`` after each step.

    Its workers have prepared later batches whenever it saves.
    """
    folder = tmp_path_factory.mktemp("whole")
    save = ModelCheckpoint(folder, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    return run(folder, steps=STEPS, workers=2, callbacks=[save]), folder


def test_a_run_sees_the_same_with_and_without_workers(tmp_path, whole):
    assert run(tmp_path, steps=STEPS) == whole[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, BATCHES, BATCHES + 1, 2 * BATCHES])
def test_a_checkpoint_of_any_step_is_resumed_exactly(tmp_path, whole, workers, stop):
    seen, folder = whole
    rest = run(tmp_path, steps=STEPS, workers=workers, ckpt_path=folder / f"step={stop}.ckpt")
    assert rest == seen[stop:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, BATCHES])
def test_k_steps_and_k_more_are_2k_steps(tmp_path, whole, workers, stop):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=stop, filename="half")
    first = run(tmp_path / "first", steps=stop, workers=workers, callbacks=[save])
    rest = run(tmp_path / "rest", steps=2 * stop, workers=workers, ckpt_path=tmp_path / "half.ckpt")
    assert first + rest == whole[0][: 2 * stop]


@pytest.mark.parametrize("by", ["epochs", "steps"])
def test_a_checkpoint_at_the_end_of_the_epoch_begins_the_next_one(tmp_path, by):
    goal = {"epochs": 3} if by == "epochs" else {"steps": 3 * BATCHES}
    save = ModelCheckpoint(tmp_path, every_n_epochs=1, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run(tmp_path / "whole", callbacks=[save], **goal)
    rest = run(tmp_path / "rest", ckpt_path=tmp_path / "epoch=1.ckpt", **goal)
    assert rest == whole[2 * BATCHES :]


def test_a_checkpoint_after_validation_inside_the_epoch_is_resumed_exactly(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    options = {"steps": 2 * BATCHES, "val_check_interval": 2}
    whole = run(tmp_path / "whole", callbacks=[save], **options)
    for step in (2, 4, 6):
        rest = run(tmp_path / f"rest{step}", ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert rest == whole[step:], step


def test_epochs_limited_by_the_trainer_are_resumed_exactly(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    whole = run(tmp_path / "whole", steps=7, limit_train_batches=2, callbacks=[save])
    assert [epochs[0] for epochs, *_ in whole] == [0, 0, 1, 1, 2, 2, 3]
    for step in (4, 5):  # at the end of an epoch, and inside
        ckpt = tmp_path / f"step={step}.ckpt"
        assert run(tmp_path / f"rest{step}", steps=7, limit_train_batches=2, ckpt_path=ckpt) == whole[step:]


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *others):
        if trainer.global_step == 3:
            trainer.save_checkpoint(trainer.default_root_dir + "/now.ckpt")
            raise RuntimeError("power cut")


def test_a_crash_after_a_saved_step_loses_nothing(tmp_path, whole):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "first", steps=6, workers=2, callbacks=[Interrupt()])
    assert run(tmp_path / "rest", steps=6, ckpt_path=tmp_path / "first" / "now.ckpt") == whole[0][3:6]


def test_checkpoint_with_the_state_of_the_data_loads_with_weights_only(tmp_path):
    run(tmp_path, steps=3, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="three")])
    loops = torch.load(tmp_path / "three.ckpt", weights_only=True)["loops"]
    (state,) = loops["fit_loop"]["state_dict"]["combined_loader"]
    assert state == {
        "epoch": 0,
        "trainer_epoch": 0,
        "batches": 3,
        "global_batch": 400,
        "length": 1617,
        "seed": 3,
    }


def test_fit_without_validation_items_and_the_other_verbs(tmp_path):
    model, items = Probe(), digits(val_fraction=0.0, test_split="train")
    runner = trainer(tmp_path, steps=2)
    runner.fit(model, items)
    assert len(model.seen) == 2
    runner.test(model, items, verbose=False)
    assert sorted(model.tested) == list(range(1797))
    runner.predict(model, Requests(n=5, batch_size=2))
    assert model.predicted == [f"{i:05d}" for i in range(5)]


def test_overfit_batches_is_honoured(tmp_path):
    model = Probe()
    with pytest.warns(UserWarning, match="overfit"):
        trainer(tmp_path, steps=3, overfit_batches=1).fit(model, digits())
    assert model.seen[0] == model.seen[1] == model.seen[2]


def _two_devices(folder, use_distributed_sampler):
    model = Probe()
    runner = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", default_root_dir=folder, max_steps=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=use_distributed_sampler, callbacks=[Report(folder)],
    )  # fmt: skip
    requests = Requests(labels=[0, 1, 2, 3, 4], batch_size=2)
    runner.fit(model, digits())
    runner.predict(model, requests)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


class Report(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save({"seen": module.seen}, self.folder / f"{trainer.global_rank}.pt")

    def on_predict_end(self, trainer, module):
        path = self.folder / f"{trainer.global_rank}.pt"
        torch.save({**torch.load(path), "ids": module.predicted}, path)


@pytest.mark.parametrize("use_distributed_sampler", [False, True])
def test_two_devices_share_the_data_and_repeat_no_request(tmp_path, use_distributed_sampler):
    ranks = _two_devices(tmp_path, use_distributed_sampler)
    assert ranks[0]["ids"] == ["00000-label0", "00002-label2", "00004-label4"]
    assert ranks[1]["ids"] == ["00001-label1", "00003-label3"]
    loader = Digits(batch_size=800, val_fraction=0.1, test_fraction=0.0, seed=3).train_dataloader()
    one = next(iter(loader))["index"].tolist()
    assert ranks[0]["seen"][0][1] == one[0::2]
    assert ranks[1]["seen"][0][1] == one[1::2]
