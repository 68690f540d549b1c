r"""Low-rank adapters on a trained network: small tensors to train, to keep apart, to blend and to merge.

A layer with weight ``W`` (out, in) computes with

    W + sum_a w_a (alpha_a / r_a) B_a A_a,        A (r, in) random, B (out, r) zero at the start

where every adapter ``a`` has a name and a weight ``w_a`` (0 is off). The layers are those of the ``peft`` package.
Besides, an adapter may train some tensors in full (a table of new classes): it moves them from their base value
``T`` to ``T_a``, and the model holds ``T + sum_a w_a (T_a - T)``.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_flows.networks.adapters import (
    adaptable,
    attach,
    factors,
    forget,
    listed,
    lora_layers,
    peft,
    plain_parameters,
    put_in_use,
    stash,
    state_of,
    summed,
    unwrap,
)
from lightning_flows.networks.parallel import blocks_of, is_sharded


def add_lora(
    model: nn.Module,
    rank: int = 8,
    *,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    train: Sequence[str] = (),
    dropout: float = 0.0,
    name: str = "default",
    seed: int = 0,
) -> dict[str, int]:
    """Give a model a new adapter and freeze everything else. The model computes what it did before.

    Patterns (``*`` stands for anything) are compared with whole dotted names and with their ends, so that ``attn.*``
    finds ``network.blocks.0.attn.qkv``.

    Args:
        model: changed in place: a module of this package, or any network.
        rank: r of the factors.
        alpha: the product of the factors is scaled by ``alpha / rank``; ``rank`` by default.
        targets: patterns of the layers (Linears, convolutions) to adapt; by default all Linears and 1x1
            convolutions of the network's blocks: attention, MLP and modulation.
        train: patterns of parameters that are trained in full, such as ``y_embedder.*``. Parameters that started
            afresh (``reinit``) must be among them.
        dropout: rate before the first factor, in training.
        name: of the adapter. It alone is used and trained from now on; those before it are kept (see `use_adapters`).
        seed: of the factor A.

    Returns:
        Number of entries of every trained parameter, by its name.

    Raises:
        ValueError: an argument out of its range, a pattern that hits nothing, a name that is taken, parameters that
            started afresh and would be frozen.
        ModuleNotFoundError: peft is not installed; names the extra.
    """
    alpha = rank if alpha is None else alpha
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"rank must be at least 1, alpha positive and dropout in [0, 1), got {rank}, {alpha} and {dropout}"
        )
    parameters = plain_parameters(model)
    full = set(_hits(parameters, train, "train"))
    if fresh := [name for name in vars(model).get("started_afresh", ()) if name in parameters and name not in full]:
        raise ValueError(f"train must name what started afresh, or it stays random: {fresh[:8]}")
    values = {name: parameter for name, parameter in parameters.items() if name in full}
    layers = _targets(model, targets, {name.rpartition(".")[0] for name in values})
    attach(model, name, layers, full=values, seed=seed, r=rank, lora_alpha=alpha, lora_dropout=dropout)
    use_adapters(model, [name], train=[name])
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def use_adapters(
    model: nn.Module, weights: Sequence[str] | Mapping[str, float], *, train: Sequence[str] = ()
) -> nn.Module:
    """Choose the adapters that a model computes with.

    Args:
        model: with adapters; changed in place.
        weights: names, or a weight for each name; 1 is the adapter as it was trained. None of them (``[]``) gives the
            base model.
        train: those of them that are trained from now on; everything else is frozen.

    Returns:
        The model.

    Raises:
        ValueError: an unknown adapter, a weight that is not finite, or adapters that cannot be trained together
            because they hold the same tensors in full.
    """
    state = state_of(model)
    used = {name: float(weights[name]) if isinstance(weights, Mapping) else 1.0 for name in listed(weights)}
    if unknown := [name for name in [*used, *train] if name not in state.full]:
        raise ValueError(f"adapters {unknown} are not in the model, which has {sorted(state.full)}")
    if not all(math.isfinite(weight) for weight in used.values()):
        raise ValueError(f"weights of adapters must be finite, got {used}")
    _check_trained(state.full, used, listed(train))
    stash(model, state)
    state.used, state.trained = used, list(listed(train))
    put_in_use(model, state)
    return model


def adapters_of(model: nn.Module) -> dict[str, float]:
    """Weights of the adapters of a model by name: 0 for those that are not in use; empty without adapters."""
    state = getattr(model, "_adapters", None)
    return {} if state is None else {name: state.used.get(name, 0.0) for name in state.full}


@torch.no_grad()
def merge_adapters(model: nn.Module, weights: Sequence[str] | Mapping[str, float] | None = None) -> nn.Module:
    """Add the adapters in use to the weights: a plain model again, with the names and classes from before.

    Sums are made in float32 and rounded once to the model's own dtype. What was trainable before is so again.

    Args:
        model: with adapters; changed in place.
        weights: see `use_adapters`; the adapters in use by default.

    Returns:
        The model.

    Raises:
        ValueError: no adapters, parameters that are spread over devices, merged weights that are not finite (the
            model is then as before).
    """
    if weights is not None:
        use_adapters(model, weights)
    state = state_of(model)
    if is_sharded(model):
        raise ValueError("a sharded model is not merged: save its adapter and merge it in one process")
    stash(model, state)
    layers = lora_layers(model)
    merged = {name: summed(layer.base_layer.weight, factors(layer)) for name, layer in layers.items()}
    for name, layer in layers.items():
        merged[name] = merged[name].to(layer.base_layer.weight.dtype)
        if not bool(merged[name].isfinite().all()):
            raise ValueError(f"{name}: the merged weight is not finite in {merged[name].dtype}: nothing is merged")
    for name, layer in layers.items():
        layer.base_layer.weight.copy_(merged[name])
    unwrap(model, layers)
    return forget(model, state)


def remove_adapters(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Take adapters off a model; without any left it is the base model that it was.

    Args:
        model: with adapters; changed in place.
        names: of the adapters; all by default.

    Returns:
        The model.

    Raises:
        ValueError: no adapters, or an unknown one.
    """
    state = state_of(model)
    gone = list(state.full) if names is None else list(listed(names))
    if unknown := [name for name in gone if name not in state.full]:
        raise ValueError(f"adapters {unknown} are not in the model, which has {sorted(state.full)}")
    kept = {name: weight for name, weight in state.used.items() if name not in gone}
    use_adapters(model, kept, train=[name for name in state.trained if name in kept])
    for name in gone:
        peft().functional.delete_adapter(model, name, prefix="lora_")
        del state.full[name], vars(model)["peft_config"][name]
    unwrap(model, {name: layer for name, layer in lora_layers(model).items() if not layer.scaling})
    return model if state.full else forget(model, state)


def _targets(model: nn.Module, patterns: Sequence[str] | None, in_full: set[str]) -> list[str]:
    """Names of the layers to adapt, without those that are trained in full."""
    layers = adaptable(model)
    if patterns is not None:
        chosen = _hits(layers, listed(patterns), "targets")
    else:
        inside = _places(model)
        chosen = [name for name, layer in layers.items() if name.startswith(inside) and _maps_channels(layer)]
    chosen = [name for name in chosen if name not in in_full]
    if not chosen:
        raise ValueError(f"targets={patterns} leaves no layer to adapt; there are {list(layers)[:8]}")
    return chosen


def _places(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names in the blocks of a network, or of the ``network`` of a module; all without blocks."""
    inner = getattr(model, "network", None)
    network, prefix = (inner, "network.") if isinstance(inner, nn.Module) else (model, "")
    try:
        return tuple(f"{prefix}{name}." for name in blocks_of(network))
    except ValueError:
        return (prefix,)


def _maps_channels(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or getattr(layer, "kernel_size", None) == (1, 1)


def _hits(names: Iterable[str], patterns: Sequence[str], argument: str) -> list[str]:
    """The names that patterns hit, from their beginning or from a dot on, in order."""
    names = list(names)
    hits = {p: {n for n in names if fnmatchcase(n, p) or fnmatchcase(n, f"*.{p}")} for p in listed(patterns)}
    if idle := [pattern for pattern, found in hits.items() if not found]:
        raise ValueError(f"{argument}={idle} hits nothing; names are like {names[:8]}")
    return [name for name in names if any(name in found for found in hits.values())]


def _check_trained(full: Mapping[str, Mapping[str, object]], used: Mapping[str, float], train: Sequence[str]) -> None:
    """A tensor that an adapter trains in full is its own only while no other adapter moves it."""
    for name in train:
        if name not in used:
            raise ValueError(f"train={list(train)}: adapter {name!r} is not among those in use, {sorted(used)}")
        rivals = [other for other in used if other != name and set(full[other]) & set(full[name])]
        if full[name] and (rivals or used[name] != 1.0):
            raise ValueError(
                f"train={list(train)}: adapter {name!r} trains {sorted(full[name])[:4]} in full, so its weight must be "
                f"1 and no other adapter in use may hold them, got {dict(used)}"
            )
