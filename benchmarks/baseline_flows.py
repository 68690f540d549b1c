"""Flows of zuko as baselines of densities of images: their settings, and their training on a budget of CPU time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_flows.flow import StepNoise, dequantize

LEVELS = 256
LOOKS = 40  # at the held-out images, evenly over the budget

LogProb = Callable[[Tensor], Tensor]


class Settings(NamedTuple):
    """A flow of zuko and how it is trained.

    Attributes:
        flow: ``"MAF"`` or ``"NSF"``.
        transforms: number of autoregressive transforms; the order of the pixels is turned round between them.
        hidden: widths of the masked networks. Below 784, zuko leaves later pixels blind to some of the earlier ones.
        options: further arguments of the flow.
        lr: highest learning rate.
        units: what a unit is after the fixed affine map: ``"pixel"``, the deviation of each pixel, but at least
            ``least``; ``"image"``, the deviation over all pixels.
        least: smallest unit of a pixel.
        weight_decay: of AdamW.
        batch_size: images in a step.
        clip: largest norm of the gradient of the loss in nats per dimension.
        decay: of the averaged weights.
        warmup: share of the budget in which the rate rises.
    """

    flow: Literal["MAF", "NSF"]
    transforms: int
    hidden: tuple[int, ...]
    options: dict[str, Any]
    lr: float
    units: Literal["pixel", "image"] = "image"
    least: float = 0.1
    weight_decay: float = 1e-4
    batch_size: int = 256
    clip: float = 1.0
    decay: float = 0.998
    warmup: float = 0.02


# Compared by bits/dim of the held-out images after 60 CPU seconds of one thread, with a cosine of that length, seed 0:
#   MAF, 5 transforms: image units, 1e-3: 4.43; pixel units of at least 0.1, 1e-3: 4.07; of at least 0.03, 3e-3: 3.80;
#     the last with residual networks: diverged.
#   NSF, 8 bins, 1 transform: 1e-3: 3.75; 3e-3: 3.13; pixel units of at least 0.4, 3e-3: 3.15;
#     2 transforms (half as many steps), 3e-3: 3.48.
SETTINGS = {
    "maf": Settings("MAF", 5, (784, 784), {}, lr=3e-3, units="pixel", least=0.03),
    "nsf": Settings("NSF", 1, (784, 784), {"bins": 8}, lr=3e-3),
}


class Standardized(nn.Module):
    """A flow of zuko behind a fixed affine map, z = (x - shift) / unit, as a density of images.

    Args:
        flow: lazy distribution over rows (B, D).
        shift: of the pixels, shape (D,).
        unit: of the pixels, positive, shape (D,).
    """

    shift: Tensor
    unit: Tensor

    def __init__(self, flow: nn.Module, shift: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("shift", shift)
        self.register_buffer("unit", unit)

    def log_prob(self, x: Tensor, condition: None = None) -> Tensor:
        """Nats (B,) of images ``x`` (B, C, H, W): log p(z) - sum log unit."""
        z = (x.flatten(1) - self.shift) / self.unit  # (B, D)
        return self.flow().log_prob(z) - self.unit.log().sum()


def build(settings: Settings, images: Tensor, seed: int) -> Standardized:
    """A baseline with weights from ``seed``; its affine map is that of the training ``images`` (N, C, H, W)."""
    import zuko

    pixels = images.flatten(1)  # (N, D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = getattr(zuko.flows, settings.flow)(
            pixels.shape[1], transforms=settings.transforms, hidden_features=settings.hidden, **settings.options
        )
    shift, unit = pixels.mean(0), pixels.std(0).clamp(min=settings.least)
    if settings.units == "image":
        shift, unit = torch.full_like(shift, pixels.mean().item()), torch.full_like(unit, pixels.std().item())
    return Standardized(flow, shift, unit)


class Clock:
    """CPU seconds of this process, all threads together, since it was made; `stopped` leaves out what is within."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.process_time()

    @property
    def used(self) -> float:
        """Seconds so far."""
        return time.process_time() - self._start

    @property
    def share(self) -> float:
        """Share of the budget so far; 1 and more: it is spent."""
        return self.used / self.seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done within does not count."""
        before = time.process_time()
        yield
        self._start += time.process_time() - before


class Best:
    """The weights that were best on held-out images, and what all looks have found.

    Args:
        score: density to bits per dimension of those images.
    """

    def __init__(self, score: Callable[[LogProb], float]) -> None:
        self.score, self.bits = score, math.inf
        self.looks: list[list[float | None]] = []  # [share of the budget, bits/dim]
        self.state: dict[str, Tensor] = {}

    def look(self, model: Standardized, share: float) -> None:
        """Score a model; one that is better than all before is kept."""
        found = self.score(model.log_prob)
        self.looks.append([round(share, 4), found if math.isfinite(found) else None])
        if found < self.bits:
            self.bits, self.state = found, {name: value.clone() for name, value in model.state_dict().items()}


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one shuffled batch after the other, without end; what does not fill the last of an epoch is left out."""
    if count < size:
        raise ValueError(f"batch_size={size} is more than the {count} training images")
    epoch = 0
    while True:
        order = torch.randperm(count, generator=StepNoise(seed, epoch).generator("order"))
        yield from order[: count // size * size].split(size)
        epoch += 1


def rate(share: float, settings: Settings) -> float:
    """Learning rate at a share of the budget: a short rise, then a cosine to zero."""
    falling = max(0.0, share - settings.warmup) / (1 - settings.warmup)
    return settings.lr * min(1.0, (share + 1e-3) / settings.warmup) * (1 + math.cos(math.pi * min(1.0, falling))) / 2


def averaged(settings: Settings) -> Callable[..., None]:
    """An exponential average whose memory grows to ``settings.decay``."""

    def update(average: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(settings.decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(average, current, 1 - decay)

    return update


def fit(
    model: Standardized,
    images: Tensor,
    score: Callable[[LogProb], float],
    settings: Settings,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Train a baseline until ``seconds`` of CPU time are spent; it then holds its best averaged weights.

    Args:
        model: is trained.
        images: to train on, (N, C, H, W) in [-1, 1], of 256 grey levels.
        score: density to bits per dimension of held-out images.
        settings: of the training.
        seconds: of this process, all threads together; scoring does not count.
        seed: of order and noise.

    Raises:
        RuntimeError: no score was finite.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    average = AveragedModel(model, multi_avg_fn=averaged(settings))
    best, start, clock, steps, skipped = Best(score), time.perf_counter(), Clock(seconds), 0, 0
    for rows in batches(len(images), settings.batch_size, seed):
        if (share := clock.share) >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate(share, settings)
        x = dequantize(images[rows], LEVELS, StepNoise(seed, steps))
        skipped += not step(model, optimizer, x, settings.clip)
        average.update_parameters(model)
        steps += 1
        if share >= (len(best.looks) + 1) / LOOKS:
            with clock.stopped():
                best.look(average.module, share)
    used = clock.used
    best.look(average.module, clock.share)
    if not best.state:
        raise RuntimeError(f"no finite bits/dim of the held-out images in {len(best.looks)} looks: lower the rate")
    model.load_state_dict(best.state)
    seen = steps * settings.batch_size
    return {
        "held_out_bits_per_dim": best.bits, "steps": steps, "skipped_steps": skipped,
        "epochs": seen / len(images), "images_per_cpu_second": seen / used, "cpu_seconds": used,
        "wall_seconds": time.perf_counter() - start, "looks": best.looks,
    }  # fmt: skip


def step(model: Standardized, optimizer: torch.optim.Optimizer, x: Tensor, clip: float) -> bool:
    """One step on dequantised images (B, C, H, W), in nats per dimension; False where the gradient is not finite."""
    optimizer.zero_grad()
    (-model.log_prob(x).mean() / x[0].numel()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not norm.isfinite():
        return False
    optimizer.step()
    return True
