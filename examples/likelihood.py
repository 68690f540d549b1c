"""Bits per dimension of test digits: the exact divergence and Hutchinson's estimate of it.

python examples/likelihood.py [lfm-digits | FOLDER | org/name@revision] [--n 4] [--steps 4]
"""

import argparse
import time

import torch

import lightning_flows as lf
from lightning_flows.data import Digits
from lightning_flows.flow import RK4, Exact, Hutchinson, SampleNoise, bits_per_dim, dequantize, seeds_from

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="lfm-digits")
parser.add_argument("--n", type=int, default=4)
parser.add_argument("--steps", type=int, default=4)
given = parser.parse_args()

model = lf.from_pretrained(given.model)
data = Digits(batch_size=given.n)
batch = next(iter(data.test_dataloader()))
# Grey levels are discrete: spread each over its bin, or the density would be infinite.
x = dequantize(batch["image"], data.levels, SampleNoise(seeds_from(0, given.n)))  # (n, 1, 8, 8)
condition = lf.Condition(label=batch["label"])

for divergence in (Exact(), Hutchinson(probes=1), Hutchinson(probes=8)):
    start = time.perf_counter()
    with torch.no_grad():
        nats = model.log_prob(x, condition, divergence=divergence, solver=RK4(), steps=given.steps)  # (n,)
    bits = bits_per_dim(nats, x[0].numel(), data.levels).mean()
    print(f"{divergence!s:40} {bits:.4f} bits/dim in {time.perf_counter() - start:.1f} s")
