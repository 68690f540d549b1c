"""Digits to noise and back, halfway to other digits, and changed a little or a lot.

    python examples/inversion.py [lfm-digits | FOLDER | org/name@revision] [--n 8] [--steps 12] [--out FILE.png]

The picture has a row for the digits, one for what came back, one for each strength, and one from the first to the last.
"""

import argparse

import torch
from torchvision.utils import save_image

import lightning_flows as lf
from lightning_flows.data import Digits
from lightning_flows.flow import Midpoint

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="lfm-digits")
parser.add_argument("--n", type=int, default=8)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="", help="picture to write")
given = parser.parse_args()

model = lf.from_pretrained(given.model, solver=Midpoint())  # inversion needs a deterministic solver
batch = next(iter(Digits(batch_size=given.n).test_dataloader()))
x, condition = batch["image"], lf.Condition(label=batch["label"])  # (n, 1, 8, 8) in [-1, 1]
rows = [x]

for steps in (given.steps, 2 * given.steps, 4 * given.steps):
    back = model.reconstruct(x, condition, steps=steps)
    print(f"{steps} steps: latent error {back.rms.mean():.6f}, PSNR {back.psnr.mean():.1f} dB")
print(f"noise: mean {back.noise.mean():.3f}, deviation {back.noise.std():.3f}")
rows.append(back.x)

for strength in (0.3, 0.6, 0.9):
    rows.append(model.vary(x, strength, condition, seed=0))
    print(f"strength {strength}: changed by {(rows[-1] - x).square().mean().sqrt():.3f} (root mean square)")

ends = condition[[0, -1]]  # each half of the way is solved under the label of its own end
rows.append(model.interpolate(x[0], x[-1], given.n, ends, steps=4 * given.steps))
print(f"ends of the interpolation are off by {(rows[-1][[0, -1]] - x[[0, -1]]).abs().max():.4f}")
if given.out:
    save_image((torch.cat(rows).clamp(-1, 1) + 1) / 2, given.out, nrow=given.n)
    print(f"wrote {given.out}")
