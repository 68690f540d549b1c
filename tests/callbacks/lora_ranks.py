"""Two steps with an adapter and two more after a resume, on the number of processes given; see `test_lora`."""

import sys
from pathlib import Path

import torch

from lightning_flows.callbacks import EMA, LoRA
from tests.modules.ddp_runs import OneNoise, build, digits, trainer


def fit_on(folder, devices):
    """LOCAL_RANK in the environment says which process this is."""
    for steps, start, end in ((2, None, "first.ckpt"), (4, "first.ckpt", "resumed.ckpt")):
        lora = LoRA(2, train=["y_embedder.*"])
        run = trainer(folder, devices, [EMA(0.5), lora], max_steps=steps)
        run.fit(build(OneNoise), digits(devices), ckpt_path=start and folder / start)
        run.save_checkpoint(folder / end)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_on(Path(sys.argv[1]), int(sys.argv[2]))
