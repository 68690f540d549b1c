"""Runs of normalizing flows under several strategies; started by `test_flow_strategies` on two processes.

    python -m tests.strategies.flow_runs FOLDER

``FOLDER/NAME/losses.pt`` holds the losses of all steps, ``end.ckpt`` the run, ``samples.pt`` what was drawn inside of
it with the weights of then, ``own.pt`` what rank 0 alone drew, ``model`` the model.
"""

import functools
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import lightning_flows.strategies  # noqa: F401  (registers fsdp2)
from lightning_flows.data import Digits
from lightning_flows.flow import Condition, GaussianNoise, GaussianProduct, MaximumLikelihood
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import Jacobi, Sequential
from tests.modules.ddp_runs import BATCH, OneNoise
from tests.modules.tiny_flow import star, tar

STEPS = 5
RUNS = (("starflow", "fsdp2"), ("tarflow", "ddp"))
LABELS = Condition(label=torch.tensor([3, 1, 4]))
METHODS = {"sequential": Sequential(), "jacobi": Jacobi(segment=2, threshold=1e-3)}


class SameFlow(NormalizingFlow):
    """Draws the same noise on any number of devices."""

    training_noise = OneNoise.training_noise
    on_after_batch_transfer = OneNoise.on_after_batch_transfer


class Look(Callback):
    """The mean loss over the ranks at every step, and samples with the weights at the end."""

    def __init__(self):
        self.losses, self.samples, self.own = [], {}, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())

    def on_train_end(self, trainer, module):
        for name, method in METHODS.items():
            for guidance in (1.0, 2.0):
                drawn = module.sample(LABELS, seed=5, method=method, guidance=guidance, return_log_prob=True)
                self.samples[name, guidance] = drawn
        for seed in range(5):  # another sample on every rank
            self.own.append(module.sample(LABELS[:1], seed=100 * trainer.global_rank + seed, guidance=1.0))


def flow(kind):
    sizes = {"input_size": 8, "num_classes": 10}
    network = star(**sizes, deep_hidden_size=40) if kind == "starflow" else tar(**sizes, volume_preserving=True)
    return SameFlow(
        network=network,
        objective=MaximumLikelihood(GaussianNoise(0.2), latent_penalty=1e-3),
        guidance=GaussianProduct(2.0),
        denoise=1.0,
        standardize=1,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
    ).train()


def run(folder, kind, strategy, devices, **options):
    L.seed_everything(7, verbose=False)
    folder, look, fitted = Path(folder) / f"{kind}-{strategy}", Look(), flow(kind)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=folder, max_steps=STEPS, max_epochs=-1,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[look], **options,
    )  # fmt: skip
    trainer.fit(fitted, Digits(batch_size=BATCH // devices, val_fraction=0.05, test_fraction=0.75))
    trainer.save_checkpoint(folder / "end.ckpt")
    fitted.save_pretrained(folder / "model")
    if trainer.global_rank == 0:
        torch.save(look.losses, folder / "losses.pt")
        torch.save(look.samples, folder / "samples.pt")
        torch.save(look.own, folder / "own.pt")


if __name__ == "__main__":
    from tests.strategies import flow_runs  # classes of __main__ cannot be named in a config

    torch.set_num_threads(1)
    for kind, strategy in RUNS:
        flow_runs.run(sys.argv[1], kind, strategy, 2)
