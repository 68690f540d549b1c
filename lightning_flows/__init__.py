"""Flow-based generative models as PyTorch Lightning modules: train, sample, finetune, publish.

Names are loaded when they are first used, so that ``import lightning_flows`` stays quick and light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_flows.flow import Condition as Condition
    from lightning_flows.flow import Tokens as Tokens
    from lightning_flows.modules import GenerativeModule as GenerativeModule
    from lightning_flows.modules import LatentFlowMatching as LatentFlowMatching
    from lightning_flows.modules import from_pretrained as from_pretrained

__version__ = "0.1.0"

_HOMES = {
    "Condition": "flow",
    "Tokens": "flow",
    "GenerativeModule": "modules",
    "LatentFlowMatching": "modules",
    "from_pretrained": "modules",
}
_ROOMS = ("flow", "networks", "store", "codecs", "data", "modules", "callbacks", "metrics", "hub")

__all__ = ["Condition", "GenerativeModule", "LatentFlowMatching", "Tokens", "__version__", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        if _HOMES[name] == "modules":
            import_module("lightning_flows.hub.attach")
        return getattr(import_module(f"lightning_flows.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"lightning_flows.{name}")
    raise AttributeError(f"module 'lightning_flows' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
