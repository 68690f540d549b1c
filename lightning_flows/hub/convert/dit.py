"""`dit`: the original diffusion transformers (facebookresearch/DiT), files such as ``DiT-XL-2-256x256.pt``.

They were not trained as flows: the network predicts the noise of a DDPM with 1000 discrete steps s = 0..999
(0 next to the data) and betas that rise linearly from 1e-4 to 0.02. What converts honestly:

- the network: noise prediction, exactly, at ``s = 999 (1 - t)``: `ReversedTime` with ``prediction="noise"``
  (no change of sign) around a `DiT` with ``time_scale=999``;
- the path: `VariancePreserving` with ``beta_min=0.1, beta_max=20``, the continuous limit of that schedule. At
  equal signal-to-noise ratio the two clocks differ by at most 3.4 of the 1000 steps, 1.4 on average;
- the sampler: Euler-Maruyama on the reverse diffusion with 250 steps, the continuous form of the ancestral
  sampler. It is not that sampler step for step, and the learned variances (second head) are dropped, so
  published figures are approached, not reproduced.

References:
    Scalable Diffusion Models with Transformers (Peebles and Xie, 2023).
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_flows.codecs import AutoencoderKL
from lightning_flows.flow import Diffusion, EulerMaruyama, FlowMatching, VariancePreserving
from lightning_flows.hub.convert.common import Format
from lightning_flows.hub.convert.transformer import OPTIONS, load_dit
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import ReversedTime

LAST_STEP = 999  # of the training schedule


def load_network(tensors: Mapping[str, Tensor], **sizes: Any) -> ReversedTime:
    """The noise predictor in our direction of time; see `transformer.load_dit` for ``sizes`` and errors."""
    return ReversedTime(load_dit(tensors, time_scale=float(LAST_STEP), **sizes), prediction="noise")


def module(network: nn.Module) -> LatentFlowMatching:
    """The published model around the network, in continuous time."""
    return LatentFlowMatching(
        network=network,
        codec=AutoencoderKL(repo="stabilityai/sd-vae-ft-ema", scale=0.18215),
        # alpha is 6.6e-3 at t = 0: a floor below it leaves every conversion exact.
        objective=FlowMatching(path=VariancePreserving(0.1, 20.0), prediction="noise", floor=0.005),
        solver=EulerMaruyama(diffusion=Diffusion("sbdm"), last="tweedie"),
        steps=250,
    )


FORMAT = Format(
    name="dit",
    source="DiT, github.com/facebookresearch/DiT",
    licence="cc-by-nc-4.0",
    licence_note="Code and weights are CC-BY-NC 4.0: no commercial use.",
    load_network=load_network,
    module=module,
    options=OPTIONS,
)
