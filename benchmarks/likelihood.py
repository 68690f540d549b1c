r"""Error of our likelihood on a Gaussian whose density is known, N(2, 0.3^2) in 8 dimensions, in nats.

The exact velocity of the straight path from N(0, I) to it is known in closed form, so what remains is the
error of the solver. 64 points, float64, exact divergence, as rows (8) and as images (2, 2, 2). Bars on the
worst of the points: 25 midpoint steps 1e-2; Dormand-Prince at 1e-5 5e-4, at 1e-7 1e-5.
"""

from __future__ import annotations

from benchmarks import common

common.single_thread()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lightning_flows.flow import DormandPrince, Midpoint, Solver, log_prob, time_grid  # noqa: E402

MEAN, STD, POINTS = 2.0, 0.3, 64
SHAPES = {"rows (8)": (8,), "images (2, 2, 2)": (2, 2, 2)}
CASES: dict[str, tuple[Solver, int, float]] = {
    "Midpoint, 25 steps": (Midpoint(), 25, 1e-2),
    "Dormand-Prince 1e-5": (DormandPrince(rtol=1e-5, atol=1e-5), 1, 5e-4),
    "Dormand-Prince 1e-7": (DormandPrince(rtol=1e-7, atol=1e-7), 1, 1e-5),
}


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t = x] for x0 ~ N(0, I), x1 ~ N(mean, std^2 I) and x_t = t x1 + (1 - t) x0."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def worst(solver: Solver, steps: int, shape: tuple[int, ...]) -> tuple[float, int]:
    """Largest error over the points in nats, and the calls of the field."""
    generator = torch.Generator().manual_seed(0)
    x1 = MEAN + STD * torch.randn(POINTS, *shape, generator=generator, dtype=torch.float64)
    density = log_prob(velocity, x1, solver=solver, grid=time_grid(steps, dtype=torch.float64))
    exact = torch.distributions.Normal(MEAN, STD).log_prob(x1).flatten(1).sum(1)
    return (density.log_prob.detach() - exact).abs().max().item(), density.nfe


def main() -> None:
    args = common.parser(__doc__).parse_args()
    figures = []
    for name, (solver, steps, bar) in CASES.items():
        for shape_name, shape in SHAPES.items():
            error, nfe = worst(solver, steps, shape)
            figures.append({"solver": name, "shape": shape_name, "nfe": nfe, "worst_nats": error, "bar": bar})
    rows = [[f["solver"], f["shape"], f["nfe"], f"{f['worst_nats']:.1e}", f"{f['bar']:.0e}"] for f in figures]
    common.show(common.table(["solver", "shape", "calls", "worst error, nats", "bar"], rows))
    failed = [f"{f['solver']}, {f['shape']}: {f['worst_nats']:.1e}" for f in figures if f["worst_nats"] > f["bar"]]
    common.finish({"likelihood": figures}, failed, args.json)


if __name__ == "__main__":
    main()
