"""One small SymmFlow on coloured shapes: it draws them from masks and labels, reads both back, votes, and repaints.

    python examples/draw_and_read.py OUT [--steps 600] [--n 8]

Trains for about a minute on one core (fewer ``--steps`` are quicker and worse) and writes to the folder OUT:
``drawn.png`` (masks that are asked for, and what is drawn for them), ``read.png`` (pictures, their true masks, what is
read in one step, and where eight votes disagree) and ``edited.png`` (pictures, their repainted masks, and the result).
"""

import argparse
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torchvision.utils import save_image

import lightning_flows as lf
from lightning_flows.callbacks import EMA
from lightning_flows.codecs import JointSemantics, OneHot, painted
from lightning_flows.data import Shapes, shape_mask
from lightning_flows.flow import SymmetricMatching
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import ADMUNet, Preconditioned

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path, help="folder for the pictures")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--n", type=int, default=8, help="pictures in a row")
given = parser.parse_args()
L.seed_everything(0)

data = Shapes(size=16, n_train=4000, batch_size=32, cache=True)
code = JointSemantics([OneHot(6), OneHot(5, per="image")])  # background and five shapes; the main shape
network = ADMUNet(
    input_size=16, in_channels=3 + code.channels, hidden_size=32, channel_mult=(1, 2), num_blocks=1,
    attention_factors=(2,), head_channels=32,
)  # fmt: skip
model = SymmFlow(
    network=Preconditioned(network, codes=code.channels),
    semantic=code,
    objective=SymmetricMatching(read_rate=0.2, drop_rate=0.1),
    optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0),
)
trainer = L.Trainer(
    max_steps=given.steps, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
    gradient_clip_val=1.0, callbacks=[EMA(0.99)],
)  # fmt: skip
trainer.fit(model, data)

batch = next(iter(data.test_dataloader()))
x, mask, label = (batch[name][: given.n] for name in ("image", "mask", "label"))


def write(name: str, *rows: torch.Tensor) -> None:
    """Rows of pictures (B, 3, H, W) in [-1, 1], four times as large."""
    given.out.mkdir(parents=True, exist_ok=True)
    large = torch.cat(rows).clamp(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    save_image((large + 1) / 2, given.out / name, nrow=given.n)
    print(f"wrote {given.out / name}")


drawn = model.sample(lf.Condition(spatial=mask[:, None], label=label), seed=0)
either = model.sample(lf.Condition(label=label), seed=0)  # drop_rate: it was also trained without masks
print(f"drawn: {(shape_mask(drawn) == mask).float().mean():.3f} of the pixels show the mask that was asked for")
write("drawn.png", painted(mask, code.colours()), drawn, either)

found = model.segment(x)  # one call of the network
print(f"segmented: {(found.labels == mask).float().mean():.3f} of the pixels rightly in one step")
print(f"classified: {(model.classify(x).labels == label).float().mean():.3f} of the pictures rightly in one step")
votes = model.read(x, steps=5, votes=8)  # in one step, all noises read nearly the same
print(f"eight votes of five steps: {(votes.decoded['mask'].labels == mask).float().mean():.3f} of the pixels rightly")
wrong, unsure = votes.decoded["mask"].labels != mask, votes.uncertainty["mask"]
print(f"uncertainty of right pixels {unsure[~wrong].mean():.5f}, of wrong ones {unsure[wrong].mean():.5f}")
grey = (2 * unsure / unsure.max() - 1)[:, None].expand_as(x)
write("read.png", x, painted(mask, code.colours()), painted(found.labels, code.colours()), grey)

carried = model.read(x, steps=25)  # with many steps the image goes to noise, and comes back from it
back = model.draw_from(carried.noise, carried.code, steps=25)
print(f"to noise and back: off by {(back - x).square().mean().sqrt():.3f} (root mean square)")

repainted = torch.where(mask > 0, mask % 5 + 1, 0)  # every shape becomes one of the next kind
edited = model.edit(x, repainted, mask != repainted)
kept = mask == 0
inside = (shape_mask(edited) == repainted)[~kept].float().mean()
print(f"edited: {inside:.3f} of the repainted pixels have their new class")
write("edited.png", x, painted(repainted, code.colours()), edited)
