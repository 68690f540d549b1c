"""Finetune a published model in a script of your own: any DataLoader of dictionaries will do.

    python examples/finetune.py [lfm-digits | FOLDER | org/name@revision] [--steps 60] [--out FOLDER]

The new data are photographic negatives of digits, so that the effect can be read from one number.
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import lightning_flows as lf

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="lfm-digits")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="", help="folder for the finetuned model")
given = parser.parse_args()
L.seed_everything(0)

# Batches are dictionaries: "image" (B, C, H, W) in [-1, 1] and, for a conditional model, "label" (B,).
digits = load_digits()
images = 1 - torch.from_numpy(digits.images).float()[:, None] / 8  # (1797, 1, 8, 8), dark on light
items = [{"image": x, "label": int(y)} for x, y in zip(images, digits.target, strict=True)]
loader = DataLoader(items, batch_size=64, shuffle=True)

model = lf.from_pretrained(given.model, lr_scheduler=None, **{"optimizer.lr": 1e-3})
ask = lf.Condition(label=torch.arange(20) % 10)
before = model.sample(ask, seed=0).mean()

trainer = L.Trainer(max_steps=given.steps, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, loader)

after = model.sample(ask, seed=0).mean()
print(f"mean pixel: before {before:.3f}, after {after:.3f}, new data {images.mean():.3f}")
if given.out:
    print(f"wrote {model.save_pretrained(given.out)}")
