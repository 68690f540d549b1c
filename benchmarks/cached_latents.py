"""A training step on cached latents beside one that encodes its images.

DiT-S/2 on latents 4 x 32 x 32 of 256-pixel images, batch 8, the autoencoder of Stable Diffusion's size (83.65 million
parameters, random weights: what it costs does not depend on them). A step fetches the batch, draws from the posterior,
and takes loss, backward and AdamW. Before anything is timed, both must give the same loss. Contenders take turns in
one process on a single thread; the figure is CPU time of the process, and the bar a median ratio of at least 4.

    python -m benchmarks.cached_latents --json cached_latents.json
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import compare, finish, parser, show, single_thread, table

single_thread()

import diffusers  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from lightning_flows.codecs import AutoencoderKL  # noqa: E402
from lightning_flows.data import CachedLatents, FlowDataModule, LatentFormat, LatentWriter  # noqa: E402
from lightning_flows.flow import StepNoise  # noqa: E402
from lightning_flows.modules import LatentFlowMatching  # noqa: E402
from lightning_flows.networks import DiT  # noqa: E402

BAR = 4.0
BATCH, SIDE = 8, 256
PARAMETERS = 83_653_863
LEVELS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}


class Pictures(Dataset):
    """One batch of random 256-pixel images."""

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        return {"image": image, "label": i}


class Live(FlowDataModule):
    """The images as a data module."""

    def read(self, split: str) -> Dataset | None:
        return Pictures() if split == "train" else None


def autoencoder(folder: Path) -> AutoencoderKL:
    """A codec over random weights of Stable Diffusion's size."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **LEVELS
    )
    count = sum(parameter.numel() for parameter in network.parameters())
    if count != PARAMETERS:
        raise ValueError(f"the autoencoder has {count} parameters instead of {PARAMETERS}")
    network.save_pretrained(folder)
    return AutoencoderKL(str(folder))


def module(codec: AutoencoderKL) -> LatentFlowMatching:
    torch.manual_seed(1)
    network = DiT(32, in_channels=4, patch_size=2, hidden_size=384, depth=12, num_heads=6, num_classes=1000)
    return LatentFlowMatching(network=network, codec=codec)


def stepper(model: LatentFlowMatching, data: FlowDataModule) -> Callable[[], float]:
    """A function that takes the next training step and gives its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader, steps = data.train_dataloader(), iter(range(10**9))

    def step() -> float:
        (batch,) = loader
        loss = model.losses(batch, StepNoise(0, next(steps))).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(rounds: int) -> dict[str, Any]:
    """Median CPU seconds of both steps, and the median over rounds of their ratio."""
    with tempfile.TemporaryDirectory() as place:
        codec, live = autoencoder(Path(place) / "vae"), Live(batch_size=BATCH)
        LatentWriter(codec, live, Path(place) / "latents", LatentFormat("float32")).write("train")
        cached = CachedLatents(str(Path(place) / "latents"), batch_size=BATCH)
        steps = {"cached": stepper(module(codec), cached), "encoding": stepper(module(codec), live)}
        first = {name: step() for name, step in steps.items()}  # also the run that warms up
        if abs(first["cached"] - first["encoding"]) > 1e-4 * abs(first["encoding"]):
            raise ValueError(f"the contenders do not compute the same: {first}")
        found = compare(steps, rounds, bare="cached")
    return {
        "cached_seconds": found["cached"].seconds,
        "encoding_seconds": found["encoding"].seconds,
        "ratio": found["encoding"].ratio,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="steps of each contender that count")
    given = options.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    figures = measure(given.rounds)
    row = [f"{figures[name]:.2f}" for name in ("encoding_seconds", "cached_seconds", "ratio")]
    show(table(("encoding (s)", "cached (s)", "ratio"), [row]))
    failed = (
        [f"cached latents are {figures['ratio']:.2f} times faster, less than {BAR}"] if figures["ratio"] < BAR else []
    )
    settings = {"batch": BATCH, "side": SIDE, "rounds": given.rounds, "threads": 1, "bar": BAR}
    finish({"settings": settings, **figures}, failed, given.json)


if __name__ == "__main__":
    main()
