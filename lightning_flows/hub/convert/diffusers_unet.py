"""`diffusers-unet`: a U-Net of Stable Diffusion 1.x or 2.x in the files of diffusers, as a start for training.

The folder is a `modules.LatentFlowMatching` in the latents of Stable Diffusion. Its weights predict the noise (or v) of
a diffusion in 1000 steps, not yet a velocity: it is there to be trained, not to be sampled from. A run starts with

    lightning-flows fit -c RECIPE --init_from FOLDER --resize true

and whatever channels the recipe has: those of the same latent are copied as they are, twice as many (image and mask of
SymmFlow) are copies, others begin at zero (`networks.widening`).

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.hub.convert.common import Format, card
from lightning_flows.hub.convert.stable_diffusion import empty_prompt, load_unet, read_unet
from lightning_flows.modules import LatentFlowMatching

LICENCES = {768: "creativeml-openrail-m", 1024: "openrail++"}  # width of the text: version 1.x, version 2.x
SCALE = 0.18215
START = """These weights predict the noise (or v) of a diffusion in 1000 steps, not a velocity: they are a start for
training, not to be sampled from:

```bash
lightning-flows fit -c RECIPE --init_from path/to/this/folder --resize true
```
"""


def from_diffusers(
    file: str | Path,
    out: str | Path,
    *,
    context: str | Path | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> Path:
    """Turn a U-Net of diffusers into a folder from which training starts.

    Args:
        file: its folder, a pipeline's folder with ``unet/``, or the weights file in either.
        out: folder to write.
        context: the embedding of the empty prompt, see `stable_diffusion.empty_prompt`; by default it is computed by
            the text encoder of the pipeline around the U-Net.
        input_size: of the latents; ``sample_size`` of the config by default.

    Raises:
        ValueError: no such folder, a config that `networks.StableDiffusionUNet` does not have, or no text.
    """
    settings, tensors, folder = read_unet(file)
    changes = {} if input_size is None else {"input_size": input_size}
    text = empty_prompt(context if context is not None else _pipeline_of(folder))
    network = load_unet(settings, tensors, text, reads_tokens=True, **changes)
    model = LatentFlowMatching(network=network, codec=AutoencoderKL("stabilityai/sd-vae-ft-mse", scale=SCALE))
    licence = LICENCES.get(int(text.shape[1]), "other")
    about = card(replace(FORMAT, licence=licence), folder).partition("```python")[0]
    return model.save_pretrained(out, {"README.md": about + START})


def _pipeline_of(folder: Path) -> Path:
    if not (folder.parent / "text_encoder").is_dir():
        raise ValueError(
            f"{folder} has no pipeline with a text_encoder around it: give context, a file with the embedding of the "
            "empty prompt (L, D), or the folder of the pipeline"
        )
    return folder.parent


FORMAT = Format(
    name="diffusers-unet",
    source="diffusers.UNet2DConditionModel",
    licence="other",
    licence_note="The licence is that of the original weights (CreativeML OpenRAIL): see where you got them.",
    options=("context", "input_size"),
    convert=from_diffusers,
)
