"""Finetune a published model on pictures of your own with low-rank adapters, in three lines (pip install peft).

    python examples/finetune_lora.py [lfm-digits | FOLDER | org/name@revision] [--data FOLDER] [--rank 8] [--steps 200]

FOLDER holds one subfolder of pictures for each class; they are fitted to the size and channels of the model. Without it
the new data are photographic negatives of digits. What is kept is the adapter alone; it is loaded again on the base.
"""

import argparse
import tempfile

import lightning as L
import torch
from torch.utils.data import DataLoader

import lightning_flows as lf
from lightning_flows.callbacks import EMA, LoRA
from lightning_flows.data import Digits, ImageFolder
from lightning_flows.networks import load_adapter, save_adapter

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="lfm-digits")
parser.add_argument("--data", default="", help="folder with one subfolder of pictures for each class")
parser.add_argument("--size", type=int, default=8, help="side of the model's images in pixels")
parser.add_argument("--channels", type=int, default=1, help="of the model's images: 1 (grey) or 3 (colour)")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="", help="folder for the adapter")
given = parser.parse_args()
L.seed_everything(0)

if given.data:
    data = ImageFolder(given.data, size=given.size, channels=given.channels, batch_size=64, drop_last=False)
    table = ["network.y_embedder.*"]  # your classes have rows of their own, which are trained in full
    changed = {"num_classes": data.num_classes, "reinit": table}
else:
    digits = Digits(batch_size=64).dataset("train")
    items = [{"image": -digits[i]["image"], "label": digits[i]["label"]} for i in range(len(digits))]
    data, table, changed = DataLoader(items, batch_size=64, shuffle=True), [], {}

# The three lines.
base = lf.from_pretrained(given.model, lr_scheduler=None, **{"optimizer.lr": 2e-3}, **changed)
trainer = L.Trainer(
    max_steps=given.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
    callbacks=[LoRA(given.rank, train=table, save_to=None), EMA(0.99)],
)  # fmt: skip
trainer.fit(base, data)

counts = [sum(p.numel() for p in base.parameters() if p.requires_grad in kinds) for kinds in ([True], [True, False])]
print(f"trained {counts[0]} of {counts[1]} parameters")

with tempfile.TemporaryDirectory() as temporary:
    folder = save_adapter(base, given.out or temporary, base=given.model)
    print(f"adapter of {sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB")
    again = load_adapter(lf.from_pretrained(given.model, **changed), folder)
    ask = lf.Condition(label=torch.arange(20) % (changed.get("num_classes") or 10))
    samples = again.sample(ask, seed=0)
    print(f"same samples: {torch.equal(samples, base.sample(ask, seed=0))}")
batch = next(iter(data.train_dataloader() if given.data else data))
print(f"mean pixel: samples {samples.mean():.3f}, new data {batch['image'].mean():.3f}")
