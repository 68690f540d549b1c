"""A few steps of a tiny transformer with label dropout, and all that a callback must not change."""

import copy
import functools
import pickle

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_flows.callbacks import EMA
from lightning_flows.data import Digits
from lightning_flows.flow import ClassifierFree, Heun
from tests.modules.tiny import dit, model

STEPS = 4


def build():
    return model(
        dit(input_size=8, patch_size=4, num_classes=10, depth=2),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        solver=Heun(),
        guidance=ClassifierFree(3.0),
    )


def digits():
    return Digits(batch_size=12, val_fraction=0.01, test_fraction=0.9)


class Record(Callback):
    """Losses, and what ``save_pretrained`` writes in the middle of the fit."""

    def __init__(self, folder):
        self.losses, self.folder = [], folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == 2:
            module.save_pretrained(self.folder / ("inside" if trainer.is_global_zero else "inside-1"))


def short_fit(folder, *callbacks, steps=STEPS, module=None, ckpt_path=None, **options):
    """Losses, the fitted module and its last checkpoint."""
    L.seed_everything(1, verbose=False)
    record, module = Record(folder), module or build()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        default_root_dir=folder,
        logger=False,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=options.pop("limit_val_batches", 0),
        callbacks=[EMA(0.9), record, *callbacks, ModelCheckpoint(folder, "last", every_n_train_steps=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, digits(), ckpt_path=ckpt_path)
    return record.losses, module, torch.load(folder / "last.ckpt", weights_only=True)


def assert_untouched(module):
    """No trace of the callback: the network computes by its own methods, and can be copied and pickled."""
    assert not any("forward" in vars(part) for part in module.modules())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module.network)))
    assert twin.state_dict().keys() == module.network.state_dict().keys()
