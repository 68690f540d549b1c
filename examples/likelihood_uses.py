"""What a likelihood gives for free: digits told apart, strange pictures noticed, holes filled, and ways between digits.

    python examples/likelihood_uses.py [--epochs 12] [--n 8] [--steps 30] [--out FILE.png]

A small TARFlow is trained on the digits of scikit-learn; nothing of what follows is trained for. The picture has a row
for the digits, one for the holes, three for what the flow thinks was in them (by three seeds), and one from the first
digit to the last.
"""

import argparse
import time
from functools import partial

import lightning as L
import torch
from torchvision.utils import save_image

import lightning_flows as lf
from lightning_flows.callbacks import EMA
from lightning_flows.data import Digits
from lightning_flows.flow import GaussianNoise, MaximumLikelihood
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import TARFlow

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--n", type=int, default=8, help="digits in a row of the picture")
parser.add_argument("--steps", type=int, default=30, help="proposals of the Markov chain")
parser.add_argument("--out", default="", help="picture to write")
given = parser.parse_args()
L.seed_everything(0)

network = TARFlow(8, patch_size=2, in_channels=1, hidden_size=64, num_blocks=4, depth=1, head_size=32, num_classes=10)
model = NormalizingFlow(
    network=network,
    objective=MaximumLikelihood(GaussianNoise(0.15)),
    optimizer=partial(torch.optim.AdamW, lr=4e-3),
)
data = Digits(batch_size=32)
trainer = L.Trainer(
    max_epochs=given.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
    gradient_clip_val=1.0, callbacks=[EMA(0.99)],
)  # fmt: skip
start = time.perf_counter()
trainer.fit(model, data)
print(f"trained {given.epochs} epochs in {time.perf_counter() - start:.0f} s")

items = data.dataset("test")
x = torch.stack([items[i]["image"] for i in range(len(items))])  # (180, 1, 8, 8) in [-1, 1]
label = torch.tensor([items[i]["label"] for i in range(len(items))])

found = model.classify(x)
print(f"classified {(found.label == label).float().mean():.3f} of {len(x)} test digits rightly, by p(x | y) p(y)")

held_out = data.dataset("val")
kept = torch.stack([held_out[i]["image"] for i in range(len(held_out))])
reference = model.anomaly_score(kept)  # nats per dimension of digits that were not trained on
some = x[:60]
others = {"digits": some, "negatives": -some, "upside down": some.flip(2), "plain grey": torch.zeros_like(x[:1])}
for name, pictures in others.items():
    nll = model.anomaly_score(pictures).mean()
    strange = model.anomaly_score(pictures, method="typicality", reference=reference).mean()
    print(f"{name}: {nll:.2f} nats/dim, {strange:.2f} from the typical")

shown, condition = x[: given.n], lf.Condition(label=label[: given.n])
mask = torch.zeros(8, 8)
mask[:, 4:] = 1  # the right half is lost
rows = [shown, shown.masked_fill(mask > 0, 0)]
for seed in range(3):
    filled = model.inpaint(shown, mask, condition, steps=given.steps, seed=seed)
    rows.append(filled.x)
    off = (filled.x - shown)[..., 4:].square().mean().sqrt()
    print(f"filled: accepted {filled.accepted.mean():.2f} of the proposals, off by {off:.3f}")
known = (filled.x - shown)[..., :4].abs().max()
print(f"what was known is changed by {known:.4f}")

rows.append(model.interpolate(shown[0], shown[-1], given.n, condition[[0, -1]]))
print(f"ends of the interpolation are off by {(rows[-1][[0, -1]] - shown[[0, -1]]).abs().max():.4f}")
if given.out:
    large = torch.cat(rows).repeat_interleave(4, 2).repeat_interleave(4, 3)
    save_image((large.clamp(-1, 1) + 1) / 2, given.out, nrow=given.n, pad_value=0.3)
    print(f"wrote {given.out}")
