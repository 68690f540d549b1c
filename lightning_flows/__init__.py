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
    from lightning_flows.modules import NormalizingFlow as NormalizingFlow
    from lightning_flows.modules import SymmFlow as SymmFlow
    from lightning_flows.modules import from_pretrained as from_pretrained
    from lightning_flows.networks import add_lora as add_lora
    from lightning_flows.networks import load_adapter as load_adapter
    from lightning_flows.networks import merge_adapters as merge_adapters
    from lightning_flows.networks import remove_adapters as remove_adapters
    from lightning_flows.networks import save_adapter as save_adapter
    from lightning_flows.networks import use_adapters as use_adapters

__version__ = "0.1.0"

_HOMES = {
    "Condition": "flow",
    "Tokens": "flow",
    "GenerativeModule": "modules",
    "LatentFlowMatching": "modules",
    "NormalizingFlow": "modules",
    "SymmFlow": "modules",
    "add_lora": "networks",
    "from_pretrained": "modules",
    "load_adapter": "networks",
    "merge_adapters": "networks",
    "remove_adapters": "networks",
    "save_adapter": "networks",
    "use_adapters": "networks",
}
_ROOMS = ("flow", "networks", "store", "codecs", "data", "modules", "callbacks", "metrics", "hub")

__all__ = [
    "Condition",
    "GenerativeModule",
    "LatentFlowMatching",
    "NormalizingFlow",
    "SymmFlow",
    "Tokens",
    "__version__",
    "add_lora",
    "from_pretrained",
    "load_adapter",
    "merge_adapters",
    "remove_adapters",
    "save_adapter",
    "use_adapters",
]


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
