"""`guided-diffusion`: the U-Nets of openai/guided-diffusion, files such as ``256x256_diffusion_uncond.pt``.

Pixel-space networks that predict the noise of a DDPM with 1000 discrete steps s = 0..999 (0 next to the data) and,
in further channels, variances that are left out here. They are translated as `dit` files are: the network exactly,
at ``s = 999 (1 - t)``; the path as the continuous limit of their schedule; the sampler as Euler-Maruyama with 250
steps. Two formats, because a file does not say its schedule:

- ``guided-diffusion``: linear betas (all published files but one). `VariancePreserving` with betas 0.1..20; at equal
  signal-to-noise ratio the two clocks differ by at most 3.4 of the 1000 steps, 1.4 on average;
- ``guided-diffusion-cosine``: ``64x64_diffusion.pt``. `Trigonometric`; their schedule starts 0.008 late, so the
  clocks differ by up to 9 steps next to the data, by none next to the noise.

The files do not say the heads either: 64 channels each by default, ``num_heads=4`` for ``128x128_diffusion.pt`` and
``64_256_upsampler.pt``; the 64x64 network writes q, k and v by kind (the default of its format). The size is 8 at
the last level by default; ``128_512_upsampler.pt`` needs ``input_size=512``. Upsamplers read the low-resolution
image, enlarged bilinearly to full size, from ``condition.spatial``.

These networks were trained with labels that were never dropped and have no null row: classifier-free guidance is not
possible. Published figures use a separate classifier, which is not converted.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021).
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import Identity
from lightning_flows.flow import Diffusion, EulerMaruyama, FlowMatching, Path, Trigonometric, VariancePreserving
from lightning_flows.hub.convert.adm import load_adm
from lightning_flows.hub.convert.common import Format
from lightning_flows.hub.convert.dit import LAST_STEP
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import ReversedTime

CHANNELS = 3
HEAD_CHANNELS = 64


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """The noise predictor in our direction of time; see `adm.load_adm` for ``sizes`` and errors."""
    if "num_heads" not in sizes and "head_channels" not in sizes:
        sizes["head_channels"] = HEAD_CHANNELS
    network = load_adm(tensors, channels=CHANNELS, coarsest=8, time_scale=float(LAST_STEP), **sizes)
    return ReversedTime(network, prediction="noise")


def load_cosine(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """As `load_network`, with q, k and v written by kind unless ``qkv_order`` says otherwise."""
    return load_network(tensors, **{"qkv_order": "kind", **sizes})


def module(network: nn.Module, path: Path) -> LatentFlowMatching:
    """The published model around the network, in continuous time."""
    return LatentFlowMatching(
        network=network,
        codec=Identity(),
        # A floor below alpha(0) = 6.6e-3 of the linear schedule leaves every conversion exact.
        objective=FlowMatching(path=path, prediction="noise", floor=0.005),
        solver=EulerMaruyama(diffusion=Diffusion("sbdm"), last="tweedie"),
        steps=250,
    )


_COMMON: dict[str, Any] = {
    "source": "guided diffusion, github.com/openai/guided-diffusion",
    "licence": "mit",
    "licence_note": "The repository is MIT; the weights have no licence text of their own (data: ImageNet, LSUN).",
    "options": ("num_heads", "head_channels", "qkv_order", "input_size"),
}
FORMAT = Format(
    name="guided-diffusion",
    load_network=load_network,
    module=partial(module, path=VariancePreserving(0.1, 20.0)),
    **_COMMON,
)
COSINE = Format(
    name="guided-diffusion-cosine",
    load_network=load_cosine,
    module=partial(module, path=Trigonometric()),
    **_COMMON,
)
