"""Teach a published model one class more from a few pictures, without forgetting the others.

    python examples/new_class.py [lfm-digits | FOLDER | org/name@revision] [--data FOLDER] [--steps 300]

FOLDER holds the pictures of the new class; they are fitted to the size and channels of the model. Without it the new
class is a bright diagonal stroke, 100 of them. The rows of the old classes are kept bit for bit, and the new one
starts at their mean. So that the old classes are not forgotten, half of each batch are samples of them that the model
itself drew before: the data that it was trained on are not needed.
"""

import argparse

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader, WeightedRandomSampler

import lightning_flows as lf
from lightning_flows.callbacks import EMA
from lightning_flows.data import ImageFolder

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="lfm-digits")
parser.add_argument("--data", default="", help="folder with pictures of the new class")
parser.add_argument("--size", type=int, default=8, help="side of the model's images in pixels")
parser.add_argument("--channels", type=int, default=1, help="of the model's images: 1 (grey) or 3 (colour)")
parser.add_argument("--replay", type=int, default=100, help="samples of each old class that are seen again")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--out", default="", help="folder for the new model")
given = parser.parse_args()
L.seed_everything(0)

old = lf.from_pretrained(given.model)
classes = old.network.y_embedder.num_classes

if given.data:
    folder = ImageFolder(given.data, size=given.size, channels=given.channels).dataset("train")
    pictures = torch.stack([folder[i]["image"] for i in range(len(folder))])  # (N, C, H, W) in [-1, 1]
else:
    stroke = 2 * torch.eye(given.size).roll(1, 0) - 1
    pictures = (stroke - 0.3 * torch.rand(100, 1, given.size, given.size)).clamp(-1, 1)

labels = torch.arange(classes).repeat(given.replay)
memory = old.sample(lf.Condition(label=labels), seed=0, batch_size=250).clamp(-1, 1)
new_items = [{"image": x, "label": classes} for x in pictures]
old_items = [{"image": x, "label": int(y)} for x, y in zip(memory, labels, strict=True)]
shares = torch.tensor([0.5 / len(new_items)] * len(new_items) + [0.5 / len(old_items)] * len(old_items))
loader = DataLoader(
    ConcatDataset([new_items, old_items]), batch_size=64, sampler=WeightedRandomSampler(shares, 64 * given.steps)
)

# A row more: the old ones stay as they are, and the new one starts at their mean.
model = lf.from_pretrained(
    given.model, num_classes=classes + 1, resize=True, lr_scheduler=None, **{"optimizer.lr": 3e-4}
)
ask = torch.arange(classes + 1).repeat(8)


def mean_pictures() -> torch.Tensor:
    """Mean of eight samples of every class, (K + 1, C, H, W)."""
    samples = model.sample(lf.Condition(label=ask), seed=1)
    return torch.stack([samples[ask == label].mean(0) for label in range(classes + 1)])


before = mean_pictures()
trainer = L.Trainer(
    max_steps=given.steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[EMA(0.99)]
)
trainer.fit(model, loader)
after = mean_pictures()

gap = [(found[classes] - pictures.mean(0)).square().mean().sqrt() for found in (before, after)]
moved = (after - before)[:classes].square().mean().sqrt()
print(f"new class: mean picture is off by {gap[1]:.3f}, before the training by {gap[0]:.3f}")
print(f"old classes: mean pictures moved by {moved:.3f}")
if given.out:
    print(f"wrote {model.save_pretrained(given.out)}")
