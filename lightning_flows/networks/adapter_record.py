"""What a checkpoint says of adapters, so that a state dict with them becomes one without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_flows.networks.adapters import lora_layers, plain_name, state_of, summed

RECORD = "adapters"  # key of a checkpoint


def record(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint says of the adapters, so that `plain_state` can merge them; None without adapters.

    Of JSON values and tensors: the weights in use, the scale of each adapter on each layer, the base values of
    tensors that are trained in full, and the reference of the base model.
    """
    state = vars(model).get("_adapters")
    if state is None:
        return None
    scales = {
        name: {adapter: float(layer.scaling[adapter]) for adapter in state.used if adapter in layer.scaling}
        for name, layer in lora_layers(model).items()
    }
    return {
        "origin": vars(model).get("origin"),
        "names": list(state.full),
        "used": dict(state.used),
        "scales": scales,
        "base": dict(state.base),
    }


def check_record(model: nn.Module, said: Mapping[str, Any] | None) -> None:
    """Refuse to resume with other adapters than those of the checkpoint.

    Raises:
        ValueError: names both and the fix.
    """
    state = vars(model).get("_adapters")
    here, there = sorted(state.full) if state else [], sorted((said or {}).get("names", ()))
    if here != there:
        raise ValueError(
            f"the checkpoint was written with the adapters {there} and the model has {here}: resume with the callback "
            "lightning_flows.callbacks.LoRA that the run had, or start a new run from its weights with init_from"
        )


def restore_record(model: nn.Module, said: Mapping[str, Any]) -> None:
    """Take the base of a resumed run from its checkpoint: the model was made from merged weights."""
    state = state_of(model)
    state.base |= {name: value for name, value in said["base"].items() if name in state.base}
    vars(model)["origin"] = said["origin"]


def plain_state(tensors: Mapping[str, Tensor], said: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """A state dict without adapters: those in use are merged into their layers, in float32 at least.

    Args:
        tensors: state dict of a model with adapters.
        said: its `record`; None for a model without adapters, whose tensors are returned as they are.
    """
    if said is None:
        return dict(tensors)
    scales, plain = said["scales"], {}
    for name, value in tensors.items():
        target = plain_name(name, scales)
        layer = target.removesuffix(".weight")
        if target and target != name and layer in scales and target.endswith(".weight"):
            used = scales[layer].items()
            inside = {part: f"{layer}.lora_{part}.{{}}.weight".format for part in "AB"}
            value = summed(value, [(tensors[inside["A"](a)], tensors[inside["B"](a)], scale) for a, scale in used])
        if target:
            plain[target] = value
    return plain
