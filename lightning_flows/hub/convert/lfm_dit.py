"""`lfm-dit`: transformers of Latent Flow Matching (VinAIResearch/LFM), files such as ``model_475.pth``.

Their time runs from data (0) to noise (1), so the network is wrapped in `ReversedTime`; the time enters the
sinusoid unscaled; the path keeps 1e-5 of noise at the data end; samples are solved by Dormand-Prince at 1e-5.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_flows.hub.convert import lfm
from lightning_flows.hub.convert.common import Format
from lightning_flows.hub.convert.transformer import OPTIONS, load_dit
from lightning_flows.networks import ReversedTime


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """The network in our direction of time; see `transformer.load_dit` for ``sizes`` and errors."""
    return ReversedTime(load_dit(tensors, absent_label="last", **sizes))


FORMAT = Format(
    name="lfm-dit",
    source=lfm.SOURCE,
    licence="other",
    licence_note=lfm.LICENCE_NOTE,
    load_network=load_network,
    module=lfm.module,
    options=OPTIONS,
)
