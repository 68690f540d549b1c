"""Cost of our solvers per network call, beside loops written by hand over the same network.

The network's width is chosen so that a call takes about 130 microseconds on one thread, as a small one does:
a solver's own work shows there. The hand-written loop calls the network itself; ours goes through `Velocity`
and `Field`, as sampling does. The bar is 1.10 for Euler, Midpoint and Heun; end points must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import common

common.single_thread()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_flows.flow import Condition, Euler, Field, Heun, Midpoint, Velocity, time_grid  # noqa: E402

BAR = 1.10
CALLS = 48
METHODS = {"Euler": (Euler(), CALLS), "Midpoint": (Midpoint(), CALLS // 2), "Heun": (Heun(), CALLS // 2)}


class Net(nn.Module):
    """A perceptron on (B, D) with the time as one more input."""

    streams: tuple[str, ...] = ()

    def __init__(self, dim: int = 64, width: int = 192) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.layers(torch.cat([x, t.expand(len(x), 1)], dim=1))

    def null(self, condition: Condition | None, batch_size: int) -> Condition:
        return Condition()


@torch.no_grad()
def bare(net: Net, method: str, x: Tensor, steps: int) -> Tensor:
    """The method written out."""
    grid = torch.linspace(0, 1, steps + 1)
    for i in range(steps):
        t, h = grid[i], grid[i + 1] - grid[i]
        k = net(x, t)
        if method == "Midpoint":
            k = net(x + h / 2 * k, t + h / 2)
        elif method == "Heun":
            k = (k + net(x + h * k, grid[i + 1])) / 2
        x = x + h * k
    return x


@torch.no_grad()
def ours(net: Net, method: str, x: Tensor) -> Tensor:
    """The same with our solver."""
    solver, steps = METHODS[method]
    return solver.solve(Field(Velocity(net)), x, time_grid(steps)).x


def measure(method: str, net: Net, x: Tensor, rounds: int, repeats: int = 4) -> dict[str, Any]:
    steps = METHODS[method][1]

    def repeat(run: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: [run() for _ in range(repeats)] and None

    contenders = {"bare": lambda: bare(net, method, x, steps), "ours": lambda: ours(net, method, x)}
    timed = common.compare({name: repeat(run) for name, run in contenders.items()}, rounds, "bare")
    per_call = 1e6 / (CALLS * repeats)
    gap = (contenders["bare"]() - contenders["ours"]()).abs().max().item()
    return {
        "method": method,
        "calls": CALLS,
        "bare_us": timed["bare"].seconds * per_call,
        "ours_us": timed["ours"].seconds * per_call,
        "ratio": timed["ours"].ratio,
        "gap": gap,
    }


def network_us(net: Net, x: Tensor) -> float:
    t = torch.tensor(0.5)
    with torch.no_grad():
        timed = common.compare({"net": lambda: [net(x, t) for _ in range(200)]}, 9, "net")
    return timed["net"].seconds / 200 * 1e6


def sized(x: Tensor, target_us: float = 130.0) -> tuple[Net, float]:
    """The network whose call comes nearest to the target on this machine as it is now."""
    nets = [Net(x.shape[1], width).eval() for width in (32, 64, 96, 128, 160, 192, 256, 320)]
    return min(((net, network_us(net, x)) for net in nets), key=lambda pair: abs(pair[1] - target_us))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.batch, 64)
    net, network = sized(x)
    figures = [measure(method, net, x, args.rounds) for method in METHODS]
    common.show(f"network alone: {network:.0f} us per call, batch {args.batch}, one thread\n")
    head = ["solver", "calls", "bare us / call", "ours us / call", "ours / bare", "largest gap"]
    rows = [
        [
            f["method"],
            f["calls"],
            f"{f['bare_us']:.0f}",
            f"{f['ours_us']:.0f}",
            f"{f['ratio']:.3f}",
            f"{f['gap']:.0e}",
        ]
        for f in figures
    ]
    common.show(common.table(head, rows))
    failed = [f"{f['method']}: {f['ratio']:.3f} > {BAR}" for f in figures if f["ratio"] > BAR]
    failed += [f"{f['method']}: end points differ by {f['gap']:.1e}" for f in figures if f["gap"] > 1e-5]
    common.finish({"solvers": figures, "network_us": network, "bar": BAR}, failed, args.json)


if __name__ == "__main__":
    main()
