"""A training step of `networks.DiT` (S/2, latents 4 x 32 x 32, batch 8) beside the same network made of timm's parts.

Three contenders take the same step - forward, flow-matching loss, backward, AdamW - from the same weights, in turn,
over many rounds of one process on two threads of a CPU:

    timm    float32; DiT as published, composed of timm's `PatchEmbed`, `Attention` and `Mlp`
    ours    float32
    mixed   ours under bfloat16 autocast, which is what Lightning's precision ``bf16-mixed`` is

Before anything is timed the first two must give the same output. The figures are ratios of two wall times of the same
round, and the median of them over rounds; beside them stands the ratio of CPU times, which neighbours disturb less.
Bars: ours / timm at most 1.03, mixed / ours at most 0.70. The second is measured where the processor multiplies
bfloat16 (AVX512-BF16 or AMX); elsewhere products are emulated, a step takes minutes, and it is left out (``--mixed``
runs it all the same). ``--parts`` also times forward, backward and optimizer apart.

    python -m benchmarks.dit_step --json dit_step.json
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from contextlib import nullcontext
from typing import Any

from benchmarks.common import STEP_PARTS, finish, measure, parser, ratio, show, table

THREADS = 2
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.layers import Mlp, PatchEmbed  # noqa: E402
from timm.models.vision_transformer import Attention  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_flows.flow import Condition  # noqa: E402
from lightning_flows.networks import DiT  # noqa: E402

BARS = {"float32": 1.03, "bf16-mixed": 0.70}
PAIRS = {"float32": ("ours", "timm"), "bf16-mixed": ("mixed", "ours")}
SIZE = {"hidden_size": 384, "depth": 12, "num_heads": 6}
CLASSES, SIDE, CHANNELS, PATCH = 1000, 32, 4, 2


# ---------------------------------------------------------------------- the published network, from its formulas


class TimmBlock(nn.Module):
    """``x += gate * part(LN(x) (1 + scale) + shift)`` for attention and MLP; six chunks of ``Linear(SiLU(c))``."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(size, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(size, 4 * size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, gate, d, e, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate * self.attn(self.norm1(x) * (1 + b) + a)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + e) + d)


class TimmFinal(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(size, PATCH * PATCH * CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimmDiT(nn.Module):
    """DiT out of timm's parts, with the names and the weights of ours."""

    def __init__(self, like: DiT) -> None:
        super().__init__()
        size = SIZE["hidden_size"]
        self.x_embedder = PatchEmbed(SIDE, PATCH, CHANNELS, size, bias=True)
        self.pos_embed = nn.Parameter(like.pos_embed.clone(), requires_grad=False)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, size)})
        self.blocks = nn.ModuleList(TimmBlock(size, SIZE["num_heads"]) for _ in range(SIZE["depth"]))
        self.final_layer = TimmFinal(size)
        self.load_state_dict({**like.state_dict(), "pos_embed": like.pos_embed})

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = t[:, None] * frequency
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1))  # (B, D)
        c = c + self.y_embedder["embedding_table"](label)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, N, p p C)
        side = SIDE // PATCH
        x = x.reshape(len(x), side, side, PATCH, PATCH, CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), CHANNELS, SIDE, SIDE)


# ---------------------------------------------------------------------- the step


class Contender:
    """A network with its optimizer, and the seconds that its steps took."""

    def __init__(self, network: nn.Module, batch: tuple[Tensor, ...], *, mixed: bool = False, fused: bool) -> None:
        self.network, self.batch, self.mixed = network, batch, mixed
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=fused or None)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in STEP_PARTS}

    def output(self) -> Tensor:
        x, t, label, _ = self.batch
        if isinstance(self.network, DiT):
            return self.network(x, t, Condition(label=label))
        return self.network(x, t, label)

    def step(self) -> None:
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16) if self.mixed else nullcontext():
            loss = F.mse_loss(self.output().float(), self.batch[-1])
        marks.append(time.perf_counter())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        for name, start, end in zip(STEP_PARTS, marks, marks[1:], strict=False):
            self.parts[name].append(end - start)

    def timed(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def network() -> DiT:
    """DiT-S/2 whose gates are open, so that every part of it counts."""
    made = DiT(SIDE, patch_size=PATCH, in_channels=CHANNELS, num_classes=CLASSES, label_dropout=0.1, **SIZE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def contenders(size: int, fused: bool, mixed: bool) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(size, CHANNELS, SIDE, SIDE, generator=generator) for _ in range(2))
    t = torch.rand(size, generator=generator)
    s = t[:, None, None, None]
    batch = (s * x1 + (1 - s) * x0, t, torch.arange(size) * 7 % CLASSES, x1 - x0)
    ours = network()
    made = {"timm": Contender(TimmDiT(ours), batch, fused=fused), "ours": Contender(ours, batch, fused=fused)}
    if mixed:
        made["mixed"] = Contender(copy.deepcopy(ours), batch, fused=fused, mixed=True)
    with torch.no_grad():
        gap = float((made["timm"].output() - made["ours"].output()).abs().max())
    if gap > 1e-5:
        raise RuntimeError(f"the two networks differ by {gap:.1e}: they are not the same")
    return made


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9, help="steps of each contender")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--threads", type=int, default=THREADS)
    options.add_argument("--fused", action="store_true", help="AdamW(fused=True) for all contenders")
    options.add_argument("--mixed", action="store_true", help="bf16-mixed also where it is emulated")
    options.add_argument("--parts", action="store_true", help="also show forward, backward and optimizer")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    native = multiplies_bfloat16()
    made = contenders(given.batch, given.fused, native or given.mixed)
    measure(made, given.rounds)
    pairs = {name: pair for name, pair in PAIRS.items() if pair[0] in made}
    figures = {name: _figures(made[own], made[bare]) for name, (own, bare) in pairs.items()}
    rows = [
        (name, " / ".join(pairs[name]), *(f"{f[key]:.3f}" for key in ("bare_seconds", "own_seconds", "ratio", "cpu")))
        for name, f in figures.items()
    ]
    show(table(("", "of", "second (s)", "first (s)", "ratio", "ratio of CPU time"), rows))
    seconds = {name: {part: statistics.median(taken) for part, taken in c.parts.items()} for name, c in made.items()}
    if given.parts:
        rows = [(name, *(f"{1e3 * found[part]:.0f}" for part in STEP_PARTS)) for name, found in seconds.items()]
        show(table(("ms", *STEP_PARTS), rows))
    if not native:
        show("bf16-mixed has no bar here: this processor has no instructions for bfloat16")
    asked = [name for name in figures if native or name == "float32"]
    failed = [f"{n}: {figures[n]['ratio']:.3f} above {BARS[n]}" for n in asked if figures[n]["ratio"] > BARS[n]]
    settings: dict[str, Any] = {
        "batch": given.batch,
        "rounds": given.rounds,
        "fused": given.fused,
        "threads": given.threads,
    }
    settings |= {"bars": BARS, "native_bfloat16": native}
    finish({"settings": settings, **figures, "parts": seconds}, failed, given.json)


def _figures(own: Contender, bare: Contender) -> dict[str, float]:
    return {
        "bare_seconds": statistics.median(bare.wall),
        "own_seconds": statistics.median(own.wall),
        "ratio": ratio(own.wall, bare.wall),
        "cpu": ratio(own.cpu, bare.cpu),
    }


if __name__ == "__main__":
    main()
