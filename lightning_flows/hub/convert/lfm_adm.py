"""`lfm-adm`: U-Nets of Latent Flow Matching in the guided-diffusion flavour (flag ``use_origin_adm``).

CelebA-HQ 256 and 512, Church, and the inpainting and semantic networks, whose stem has further channels for the map
(``condition.spatial``). Their time runs from data (0) to noise (1), so the network is wrapped in `ReversedTime`; the
time enters the sinusoid unscaled.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_flows.hub.convert import lfm
from lightning_flows.hub.convert.adm import load_adm
from lightning_flows.hub.convert.common import Format, shape_of
from lightning_flows.hub.convert.unet import load_named
from lightning_flows.networks import ReversedTime, SemanticRescaler


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """The network in our direction of time; see `adm.load_adm` for ``sizes`` and errors.

    By default 4 heads, and latents that are 4x4 at the last level (32x32 for 4 levels, 64x64 for 5).
    """
    return ReversedTime(load_adm(tensors, coarsest=4, **sizes))


def load_rescaler(tensors: Mapping[str, Tensor], *, stages: int = 3, factor: float = 0.5) -> SemanticRescaler:
    """The encoder of semantic maps: ``cond_stage_model_E.pth``, or ``read_state(file, "condition")``.

    Args:
        tensors: official names to tensors.
        stages: how often the map is shrunk.
        factor: of each stage.

    Raises:
        ValueError: unknown, missing or misshapen tensors.
    """
    channels, classes = shape_of(tensors, "channel_mapper.weight", 4)[:2]
    bias = "channel_mapper.bias" in tensors
    rescaler = SemanticRescaler(classes, channels, stages=stages, factor=factor, bias=bias)
    load_named(rescaler, tensors, {"channel_mapper": "channel_mapper"})
    return rescaler


FORMAT = Format(
    name="lfm-adm",
    source=lfm.SOURCE,
    licence="other",
    licence_note=lfm.LICENCE_NOTE,
    load_network=load_network,
    module=lfm.module,
    options=("num_heads", "head_channels", "qkv_order", "input_size"),
)
