"""An adapter as a folder of two files, in the format of ``peft``: apart from its base model, and small.

``adapter_config.json`` says rank, scale, layers and the base model; ``adapter_model.safetensors`` holds the factors
``base_model.model.<layer>.lora_A.weight`` and ``lora_B``, and beside them, under ``base_model.model.<name>``, the
tensors that are trained in full. Whole layers among those are named as ``modules_to_save``, as peft does.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_flows.networks.adapters import adaptable, attach, peft, plain_parameters, stash, state_of
from lightning_flows.networks.lora import use_adapters
from lightning_flows.networks.parallel import whole
from lightning_flows.store import json_text, load_tensors, resolve, save_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
# Keys of a config that say where an adapter comes from or how it was begun, but not what it computes.
_ABOUT = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_READ = {"peft_type": "LORA", "bias": "none", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}


def save_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None, base: str | None = None) -> Path:
    """Write one adapter of a model, without the model.

    Where several processes call it the first one writes; of a model that is spread over devices all must call it.

    Args:
        model: with adapters.
        folder: made if needed; its two files appear whole or not at all.
        name: of the adapter; may be left out where the model has one.
        base: reference of the base model, a zoo id or ``org/name@revision``; by default where the model's weights
            came from (`from_pretrained`, `init_from`).

    Returns:
        The folder.

    Raises:
        ValueError: no adapter, an unknown one, or several and no name.
    """
    config, tensors = adapter_of(model, name=name, base=base)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_files(folder, {ADAPTER_WEIGHTS: tensors}, {ADAPTER_CONFIG: json_text(config)})
    return Path(folder)


def adapter_of(
    model: nn.Module, *, name: str | None = None, base: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter, as its files hold them; see `save_adapter`."""
    state = state_of(model)
    if name is None and len(state.full) > 1:
        raise ValueError(f"name=None: the model has adapters {sorted(state.full)}, say which of them")
    name = next(iter(state.full)) if name is None else name
    if name not in state.full:
        raise ValueError(f"name={name!r}: the model has adapters {sorted(state.full)}")
    stash(model, state)
    factors = peft().functional.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {f"{_PREFIX}{key}": whole(value).detach() for key, value in factors.items()}
    tensors |= {f"{_PREFIX}{key}": value for key, value in state.full[name].items()}
    layers = sorted({found["layer"] for key in factors if (found := _FACTOR.fullmatch(key))})
    return _config_of(model, name, base, layers), tensors


def _config_of(model: nn.Module, name: str, base: str | None, layers: list[str]) -> dict[str, Any]:
    config = vars(model)["peft_config"][name]
    base = base or vars(model).get("origin")
    model_id, _, revision = (base or "").partition("@")
    in_full = state_of(model).full[name]
    parents = {tensor.rpartition(".")[0] for tensor in in_full} - {""}
    parameters = {parent: dict(model.get_submodule(parent).named_parameters()) for parent in parents}
    saved = [p for p, inside in parameters.items() if all(f"{p}.{tensor}" in in_full for tensor in inside)]
    return {
        "peft_type": "LORA",
        "peft_version": peft().__version__,
        "task_type": None,
        "base_model_name_or_path": model_id or None,
        "revision": revision or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "target_modules": layers,
        "modules_to_save": sorted(saved) or None,
    }


def load_adapter(
    model: nn.Module,
    ref: str | Path,
    *,
    name: str = "default",
    revision: str | None = None,
    train: bool = False,
) -> nn.Module:
    """Put an adapter from a folder or the Hub on a model that has the weights of its base.

    It alone is in use from then on; `use_adapters` blends it with those before it.

    Args:
        model: the base model, with other adapters or none; changed in place.
        ref: a folder, or ``org/name[@revision]`` on the Hugging Face Hub.
        name: under which the model will know it.
        revision: of the Hub repository.
        train: go on with its training; else everything is frozen.

    Returns:
        The model.

    Raises:
        ValueError: nothing was found, the adapter has a kind or option that is not supported, its tensors do not fit
            the model (the message lists them), or the name is taken; the model is then as before.
        ModuleNotFoundError: peft is not installed; names the extra.
    """
    folder = resolve(ref, revision=revision, files=FILES)
    config, tensors = read_adapter(folder)
    factors, full = _divided(tensors)
    if problems := _problems(model, config, factors, full):
        raise ValueError(f"the adapter {ref} does not fit {type(model).__name__}: {'; '.join(problems)}")
    _compare_base(model, config, str(ref))
    layers = list(dict.fromkeys(layer for layer, _ in factors))
    options = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    attach(model, name, layers, full=full, **options)
    values = {f"{layer}.lora_{part}.weight": value for (layer, part), value in factors.items()}
    peft().functional.set_peft_model_state_dict(model, values, adapter_name=name)
    return use_adapters(model, [name], train=[name] if train else [])


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config (what is read of it, and ``base``) and tensors of an adapter folder, by names of the base model.

    Raises:
        ValueError: a file is missing or damaged, or the config asks for more than LoRA on Linears and convolutions.
    """
    file = Path(folder) / ADAPTER_CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        config = {key: said.get(key, default) for key, default in _READ.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is missing or no JSON object ({error})") from error
    foreign = {key: value for key, value in said.items() if key not in _ABOUT and key not in _READ and value}
    foreign |= {key: config[key] for key in ("peft_type", "bias") if config[key] != _READ[key]}
    if foreign:
        raise ValueError(f"{file}: {foreign} is not supported, only plain LoRA is")
    if not isinstance(config["r"], int) or config["r"] < 1:
        raise ValueError(f"{file}: r must be a positive integer, got {config['r']!r}")
    base, revision = said.get("base_model_name_or_path"), said.get("revision")
    config["base"] = f"{base}@{revision}" if base and revision else base
    tensors = load_tensors(Path(folder) / ADAPTER_WEIGHTS)
    return config, {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def _divided(tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
    """Factors by (layer, A or B), and the tensors trained in full."""
    factors, full = {}, {}
    for name, value in tensors.items():
        if found := _FACTOR.fullmatch(name):
            factors[found["layer"], found["part"]] = value
        else:
            full[name] = value
    return factors, full


def _problems(
    model: nn.Module,
    config: Mapping[str, Any],
    factors: Mapping[tuple[str, str], Tensor],
    full: Mapping[str, Tensor],
) -> list[str]:
    """What of an adapter does not fit the names and shapes of a model."""
    layers, parameters, rank = adaptable(model), plain_parameters(model), config["r"]
    problems = [] if factors else ["it holds no factors"]
    for layer in dict.fromkeys(layer for layer, _ in factors):
        if layer not in layers:
            problems.append(f"the model has no layer {layer} to adapt")
            continue
        out, inside = layers[layer].weight.shape[0], tuple(layers[layer].weight.shape[1:])
        wanted = {"A": (rank, *inside), "B": (out, rank, *[1] * (len(inside) - 1))}
        for part, shape in wanted.items():
            given = factors.get((layer, part))
            if given is None or tuple(given.shape) != shape:
                had = "is missing" if given is None else f"has shape {tuple(given.shape)}"
                problems.append(f"{layer}.lora_{part} {had} instead of {shape}")
    for name, value in full.items():
        if name not in parameters:
            problems.append(f"the model has no parameter {name}")
        elif parameters[name].shape != value.shape:
            shape = tuple(parameters[name].shape)
            problems.append(f"{name} has shape {tuple(value.shape)} instead of {shape}: build the base as in training")
    return problems[:8]


def _compare_base(model: nn.Module, config: Mapping[str, Any], ref: str) -> None:
    """Warn where the weights of a model are known to be others than those that an adapter was trained on."""
    here, there = vars(model).get("origin"), config["base"]
    if here and there and here.partition("@")[0] != there.partition("@")[0]:
        warnings.warn(f"the adapter {ref} was trained on {there}, and this model has the weights of {here}")
