"""Behind `lora`: the layers of peft inside a model, and what a model must know of its adapters beside them.

Nothing here adds to what peft computes. It finds layers, and keeps values of tensors that adapters train in full.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.networks.parallel import sharded_like, whole
from lightning_flows.networks.spatial import SemanticRescaler

# These read the weights of their layers without calling them: an adapter in there would be passed over.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, SemanticRescaler)
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.(?P<adapter>[^.]+)\.weight")


@dataclass
class Adapters:
    """What a model knows of its adapters.

    Attributes:
        trainable: names of the parameters that were trainable without adapters.
        base: values without adapters of the tensors that some adapter trains in full.
        full: for each adapter the values of those tensors.
        used: weight of each adapter in use.
        trained: adapters in training.
    """

    trainable: list[str]
    base: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)


def peft() -> ModuleType:
    """The package peft.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    try:
        import peft
        import peft.functional
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('LoRA needs peft: pip install "lightning-flows[peft]"') from error
    return peft


def state_of(model: nn.Module) -> Adapters:
    """What the model knows of its adapters.

    Raises:
        ValueError: it has none.
    """
    state = vars(model).get("_adapters")
    if state is None:
        raise ValueError(f"{type(model).__name__} has no adapters: add_lora or load_adapter gives it one")
    return state


def listed(names: Iterable[str]) -> list[str]:
    """Names as a list.

    Raises:
        ValueError: one string in the place of a list.
    """
    if isinstance(names, str):
        raise ValueError(f"{names!r} is a string: give a list of names or patterns")
    return list(names)


# ------------------------------------------------------------------ layers and parameters


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of peft in a model by name."""
    if "peft_config" not in vars(model):
        return {}
    kind = peft().tuners.tuners_utils.BaseTunerLayer
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def adaptable(model: nn.Module) -> dict[str, Any]:
    """Layers by name that an adapter may be put on: Linears and plain convolutions, adapted already or not."""
    adapted = lora_layers(model)
    found: dict[str, Any] = {}
    closed: tuple[str, ...] = ()
    for name, part in model.named_modules():
        if name.startswith(closed) and closed:
            continue
        layer = part.base_layer if name in adapted else part
        if name in adapted or isinstance(part, READERS):
            closed += (f"{name}.",)
        if name and (isinstance(layer, nn.Linear) or _is_plain_convolution(layer)):
            found[name] = layer
    return found


def _is_plain_convolution(layer: nn.Module) -> bool:
    """Whether peft's layer would do the same: it passes kernel, stride and padding on, and nothing else."""
    if not isinstance(layer, nn.Conv2d):
        return False
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base model, under the names that they have without adapters."""
    adapted = lora_layers(model)
    named = {plain_name(name, adapted): parameter for name, parameter in model.named_parameters()}
    return {name: parameter for name, parameter in named.items() if name}


def plain_name(name: str, adapted: Iterable[str]) -> str:
    """Name of a tensor without adapters; empty for a tensor of an adapter."""
    layer, inside, rest = name.partition(".base_layer.")
    if inside and layer in adapted:
        return f"{layer}.{rest}"
    found = _FACTOR.fullmatch(name)
    return "" if found and found["layer"] in adapted else name


def factors(layer: Any) -> list[tuple[Tensor, Tensor, float]]:
    """``(A, B, scale)`` of the adapters in use on a layer."""
    names = [name for name in layer.active_adapters if name in layer.scaling]
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]


def summed(weight: Tensor, parts: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """``W + sum of scale B A``, in float32 at least.

    Args:
        weight: of a Linear, (out, in), or of a convolution, (out, in, h, w).
        parts: A, (r, in) or (r, in, h, w); B, (out, r) or (out, r, 1, 1); and the scale.

    Returns:
        The shape of ``weight``.
    """
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for a, b, scale in parts:
        total = total + scale * (b.to(total).flatten(1) @ a.to(total).flatten(1)).view_as(total)
    return total


# ------------------------------------------------------------------ putting on, using, taking off


def attach(
    model: nn.Module,
    name: str,
    layers: Sequence[str],
    *,
    full: Mapping[str, Tensor],
    seed: int = 0,
    **options: Any,
) -> None:
    """Put an adapter on layers, not yet in use. The global random stream is left alone.

    Args:
        model: changed in place.
        name: of the adapter.
        layers: names of layers, see `adaptable`.
        full: values of tensors that the adapter trains in full.
        seed: of the factors A.
        **options: of ``peft.LoraConfig``.

    Raises:
        ValueError: a name that is taken or not fit to be one, or a layer that is adapted and trained in full.
    """
    package, state = peft(), vars(model).get("_adapters")
    if state is None:
        state = Adapters([parameter for parameter, value in model.named_parameters() if value.requires_grad])
    _check_name(model, name, state)
    in_full = {tensor.rpartition(".")[0] for tensor in [*full, *state.base]}
    if both := sorted(in_full & {*layers, *lora_layers(model)}):
        raise ValueError(f"layers {both[:4]} would be adapted and trained in full: leave them out of one of the two")
    stash(model, state)
    config = package.LoraConfig(target_modules=list(layers), **options)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
        torch.default_generator.manual_seed(seed)
        package.functional.inject_adapter_in_model(config, model, adapter_name=name)
    for layer in lora_layers(model).values():
        layer.train(layer.base_layer.training)  # fresh parts would count as a model in training mode
    present = plain_parameters(model)
    state.base |= {tensor: _copy(present[tensor]) for tensor in full if tensor not in state.base}
    state.full[name] = {tensor: _copy(value) for tensor, value in full.items()}
    vars(model)["_adapters"] = state


def _check_name(model: nn.Module, name: str, state: Adapters) -> None:
    if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict, name) or name.startswith("lora_"):
        raise ValueError(f"name={name!r} is no name for an adapter: use letters, digits, _ and -, such as 'signs'")
    if name in state.full:
        raise ValueError(f"name={name!r} is taken: the model has adapters {sorted(state.full)}")
    if any(name in key.split(".") for key in model.state_dict()):  # peft tells adapters by this part of a key
        raise ValueError(f"name={name!r} is the name of a part of the model: choose another one")


@torch.no_grad()
def stash(model: nn.Module, state: Adapters) -> None:
    """Keep what training has made of the tensors that adapters train in full."""
    present = plain_parameters(model)
    for name in state.trained:
        state.full[name] = {tensor: _copy(present[tensor]) for tensor in state.full[name]}


@torch.no_grad()
def put_in_use(model: nn.Module, state: Adapters) -> None:
    """Make layers, tensors and flags say what the state says."""
    peft().functional.set_adapter(model, list(state.used), inference_mode=True)
    for layer in lora_layers(model).values():
        for name in layer.scaling:
            layer.set_scale(name, state.used.get(name, 1.0))
    present = plain_parameters(model)
    for tensor in state.base:
        value = _blended(tensor, state).to(present[tensor].dtype)
        present[tensor].copy_(sharded_like(value, present[tensor]))
    in_full = {id(present[tensor]) for name in state.trained for tensor in state.full[name]}
    for name, parameter in model.named_parameters():
        factor = _FACTOR.fullmatch(name)
        parameter.requires_grad = bool(factor and factor["adapter"] in state.trained) or id(parameter) in in_full


def _blended(tensor: str, state: Adapters) -> Tensor:
    """``T + sum_a w_a (T_a - T)``; one adapter at weight 1 gives its own value, bit for bit."""
    parts = [(weight, state.full[name][tensor]) for name, weight in state.used.items() if tensor in state.full[name]]
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    base = state.base[tensor]
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    return total + sum(weight * (value.to(total) - base.to(total)) for weight, value in parts)


def unwrap(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Put the base layers back in the places of peft's."""
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)


def forget(model: nn.Module, state: Adapters) -> nn.Module:
    """Take the last traces of adapters off a model whose layers are its own again."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in state.trainable
    del vars(model)["_adapters"], vars(model)["peft_config"]
    return model


def _copy(value: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return whole(value).detach().clone()
