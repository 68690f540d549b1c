"""Floor 3: LightningModules of the families."""

from lightning_flows.modules.adversary import Adversary
from lightning_flows.modules.autoencoder import KLAutoencoder
from lightning_flows.modules.base import GenerativeModule
from lightning_flows.modules.inpainting import Inpainted
from lightning_flows.modules.inversion import Inversion, Reconstruction, slerp
from lightning_flows.modules.latent_flow import LatentFlowMatching
from lightning_flows.modules.latent_space import LatentSpace
from lightning_flows.modules.likelihood_uses import Classification
from lightning_flows.modules.normalizing_flow import NormalizingFlow
from lightning_flows.modules.perceptual import Perceptual, TimmFeatures
from lightning_flows.modules.pretrained import from_pretrained, init_from
from lightning_flows.modules.publishable import Publishable
from lightning_flows.modules.schedules import WarmupConstant, WarmupCosine
from lightning_flows.modules.semantic_tasks import Reading
from lightning_flows.modules.symmflow import SymmFlow

__all__ = [
    "Adversary",
    "Classification",
    "GenerativeModule",
    "Inpainted",
    "Inversion",
    "KLAutoencoder",
    "LatentFlowMatching",
    "LatentSpace",
    "NormalizingFlow",
    "Perceptual",
    "Publishable",
    "Reading",
    "Reconstruction",
    "SymmFlow",
    "TimmFeatures",
    "WarmupConstant",
    "WarmupCosine",
    "from_pretrained",
    "init_from",
    "slerp",
]
