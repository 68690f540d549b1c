"""Floor 3: LightningModules of the families."""

from lightning_flows.modules.base import GenerativeModule
from lightning_flows.modules.latent_flow import LatentFlowMatching
from lightning_flows.modules.pretrained import from_pretrained, init_from
from lightning_flows.modules.schedules import WarmupConstant, WarmupCosine

__all__ = [
    "GenerativeModule",
    "LatentFlowMatching",
    "WarmupConstant",
    "WarmupCosine",
    "from_pretrained",
    "init_from",
]
