"""Six steps with frozen parts and rates by depth under several strategies; started by `test_parts_on_ranks`.

    python -m tests.callbacks.parts_ranks FOLDER

``FOLDER/NAME/end.ckpt`` is the run after six steps, ``FOLDER/NAME/step=2.ckpt`` before the middle block is let go.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_flows.callbacks import Freeze, LearningRates
from lightning_flows.data import Digits
from tests.strategies.runs import BATCH, model, trainer

STEPS = 6
NEVER = "network.blocks.0."
LATE = "network.blocks.1."


def run(folder, name, strategy, devices, *, ckpt_path=None):
    """A fit of six steps; the first block is frozen, the second one until step 3."""
    L.seed_everything(7, verbose=False)
    folder, fitted = Path(folder) / name, model()
    callbacks = [
        Freeze([f"{NEVER}*"]),
        Freeze([f"{LATE}*", "network.y_embedder.*"], until_step=3),
        LearningRates({"network.final_layer.*": 2.0}, depth_decay=0.8),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1),
    ]
    data = Digits(batch_size=BATCH // devices, val_fraction=0.05, test_fraction=0.75)
    made = trainer(folder, strategy, devices, STEPS, callbacks, limit_val_batches=0)
    made.fit(fitted, data, ckpt_path=ckpt_path)
    made.save_checkpoint(folder / "end.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    run(folder, "ddp", "ddp", 2)
    run(folder, "fsdp2", "fsdp2", 2)
    run(folder, "fsdp2-from-one", "fsdp2", 2, ckpt_path=folder / "one" / "step=2.ckpt")
