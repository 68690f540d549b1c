"""Cost of pairing a batch by optimal transport: ours beside the same assignment and gather by hand.

Both solve the same problem on the same batch; the bar is 1.10 of the bare time at batch 256.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import common

common.single_thread()

import torch  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from torch import Tensor  # noqa: E402

from lightning_flows.flow import OptimalTransport  # noqa: E402

BAR = 1.10
BATCH = 256


def bare(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (B, D) reordered to lie nearest to the data (B, D)."""
    cost = x1 @ x0.T * -2  # the squared norms add the same to every assignment
    _, columns = linear_sum_assignment(cost.numpy())
    return x0[torch.from_numpy(columns)], x1


def ours() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    coupling = OptimalTransport()
    return lambda x0, x1: coupling(x0, x1)[:2]


def cost(pair: tuple[Tensor, Tensor]) -> float:
    return (pair[0] - pair[1]).square().sum(1).mean().item()


def measure(dims: int, rounds: int, batches: int = 8) -> dict[str, float]:
    """Times of ``batches`` batches in one call, and whether both pair equally well."""
    generator = torch.Generator().manual_seed(dims)
    pairs = [torch.randn(2, BATCH, dims, generator=generator).unbind() for _ in range(batches)]
    pairs = [(x0, x1 * 0.5 + 1) for x0, x1 in pairs]
    contenders = {"bare": bare, "ours": ours()}
    timed = common.compare(
        {name: (lambda f=f: [f(*pair) for pair in pairs]) for name, f in contenders.items()}, rounds, "bare"
    )
    return {
        "batch": BATCH,
        "dims": dims,
        "bare_ms": timed["bare"].seconds / batches * 1e3,
        "ours_ms": timed["ours"].seconds / batches * 1e3,
        "ratio": timed["ours"].ratio,
        "cost_bare": cost(bare(*pairs[0])),
        "cost_ours": cost(ours()(*pairs[0])),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 3072])
    args = parser.parse_args()
    figures = [measure(dims, args.rounds) for dims in args.dims]
    head = ["batch", "dims", "bare ms", "ours ms", "ours / bare", "cost bare", "cost ours"]
    rows = [
        [f["batch"], f["dims"], f"{f['bare_ms']:.2f}", f"{f['ours_ms']:.2f}", f"{f['ratio']:.3f}",
         f"{f['cost_bare']:.4f}", f"{f['cost_ours']:.4f}"]
        for f in figures
    ]  # fmt: skip
    common.show(common.table(head, rows))
    failed = [f"{f['dims']} dims: {f['ratio']:.3f} > {BAR}" for f in figures if f["ratio"] > BAR]
    failed += [f"{f['dims']} dims: pairs cost more" for f in figures if f["cost_ours"] > f["cost_bare"] * 1.00001]
    common.finish({"coupling": figures, "bar": BAR}, failed, args.json)


if __name__ == "__main__":
    main()
