"""`diffusers-vae` and `to-diffusers-vae`: image autoencoders of diffusers into `modules.KLAutoencoder`, and back.

Both kinds of folder want a ``config.json``, so ours becomes ``OUT/vae/``, where pipelines of diffusers look for it
(``AutoencoderKL.from_pretrained(OUT, subfolder="vae")``), and may lie beside ours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_flows.codecs import KLNetwork
from lightning_flows.hub.convert.common import Format, card
from lightning_flows.modules import KLAutoencoder

SUBFOLDER = "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def from_diffusers(file: str | Path, out: str | Path) -> Path:
    """Turn an autoencoder of diffusers into a folder for `from_pretrained`: to finetune it.

    Args:
        file: its folder, a pipeline's folder with ``vae/``, or the weights file in either.
        out: folder to write.

    Raises:
        ValueError: no such folder, or an architecture that `codecs.KLNetwork` does not have.
    """
    folder = _folder_of(Path(file))
    model = KLAutoencoder(network=KLNetwork.from_diffusers(folder))
    return model.save_pretrained(out, {"README.md": card(FORMAT, folder / WEIGHTS, config=model.config)})


def to_diffusers(file: str | Path, out: str | Path, *, scaling_factor: float | None = None) -> Path:
    """Write ``OUT/vae/`` for `diffusers.AutoencoderKL`.

    Args:
        file: folder, zoo id or Hub id of a `KLAutoencoder` of ours, or the checkpoint of a run.
        out: folder to write ``vae/`` into.
        scaling_factor: written to its config: users of diffusers multiply latents by it; one over the latents'
            deviation is usual. The autoencoder's own (1 if none was given) by default.

    Raises:
        ValueError: not an autoencoder of ours, or a factor that is not positive.
    """
    if scaling_factor is not None and not scaling_factor > 0:
        raise ValueError(f"scaling_factor must be positive, got {scaling_factor}")
    network = KLAutoencoder.from_pretrained(file).network
    if not isinstance(network, KLNetwork):
        raise ValueError(f"{file} holds a {type(network).__name__}, only a KLNetwork has the names of diffusers")
    target = Path(out) / SUBFOLDER
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".vae-") as partial:
        network.save_diffusers(partial, scaling_factor)
        for written in sorted(Path(partial).iterdir()):
            written.replace(target / written.name)
    return target


def _folder_of(file: Path) -> Path:
    folder = file.parent if file.is_file() else file
    for place in (folder, folder / SUBFOLDER):
        if (place / "config.json").is_file() and (place / WEIGHTS).is_file():
            return place
    raise ValueError(f"{file} is no folder of a diffusers autoencoder: it needs config.json and {WEIGHTS}")


FORMAT = Format(
    name="diffusers-vae",
    source="diffusers.AutoencoderKL",
    licence="other",
    licence_note="The licence is that of the original weights: see where you got them.",
    convert=from_diffusers,
    family="autoencoder",
)
BACK = Format(
    name="to-diffusers-vae",
    source="lightning_flows",
    licence="other",
    licence_note="The licence is that of the original weights.",
    options=("scaling_factor",),
    convert=to_diffusers,
)
