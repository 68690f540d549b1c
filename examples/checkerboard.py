"""The mathematics alone, without Lightning: a flow from noise to a checkerboard in the plane.

python examples/checkerboard.py [--steps 400]
"""

import argparse

import torch
from torch import Tensor, nn

from lightning_flows import flow
from lightning_flows.metrics import sliced_wasserstein_squared


class Network(nn.Sequential):
    """Velocity (B, 2) at points x (B, 2) and times t () or (B,)."""

    streams = ()  # reads no condition

    def __init__(self, width: int = 128) -> None:
        super().__init__(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, condition: flow.Condition | None = None) -> Tensor:
        angles = t.expand(len(x))[:, None] * torch.pi * torch.arange(1, 5)  # (B, 4)
        return super().forward(torch.cat([x, angles.sin(), angles.cos()], 1))

    def null(self, condition: flow.Condition | None, batch_size: int) -> flow.Condition:
        return flow.Condition()


def checkerboard(n: int) -> Tensor:
    """Points (n, 2) on the dark squares of a 4 x 4 board over [-2, 2]^2."""
    row, column = torch.randint(0, 4, (n,)), torch.randint(0, 2, (n,))
    return torch.stack([2 * column + row % 2, row], 1) - 2 + torch.rand(n, 2)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=400)
steps = parser.parse_args().steps
torch.manual_seed(0)

network, objective = Network(), flow.FlowMatching(coupling=flow.OptimalTransport())
optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
for step in range(steps):
    losses = objective(network, checkerboard(256), None, flow.StepNoise(seed=0, step=step))
    optimizer.zero_grad()
    losses.loss.mean().backward()
    optimizer.step()

noise, real = torch.randn(2000, 2), checkerboard(2000)
with torch.no_grad():
    sample, nfe = flow.Midpoint().solve(flow.Field(flow.Velocity(network)), noise, flow.time_grid(20))
for name, points in (("noise", noise), ("samples", sample), ("other data", checkerboard(2000))):
    squared = sliced_wasserstein_squared(points, real, generator=torch.Generator().manual_seed(0))
    print(f"sliced Wasserstein distance to data of {name}: {squared.clamp(min=0).sqrt():.4f}")
print(f"network calls: {nfe}")
