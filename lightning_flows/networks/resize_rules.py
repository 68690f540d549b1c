"""Weights of one network for another of the same class: rules by name, and how they are found and applied.

A rule says what one tensor becomes. A network offers its rules by a method

    resize_rules(source) -> {name of a tensor: rule}

where ``source`` holds the constructor arguments of the network that the weights come from (its config, defaults filled
in) and a rule is a function of the old tensor, mostly a `functools.partial` of a function of `resizing`. A rule counts
whatever the shapes are: four rows can mean four classes, or three and a row for "no label".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

Rule = Callable[[Tensor], Tensor]
Rules = dict[str, Rule]


class SizeMismatch(ValueError):
    """Weights are not of the sizes that their config says."""


def rules_of(module: nn.Module, config: Mapping[str, Any]) -> Rules:
    """The rules that a module and its parts offer for weights of another config.

    A part offers rules by its method ``resize_rules``; a part without one is searched, as long as its attributes have
    the names of its constructor's arguments, as ``network`` in a module.

    Args:
        module: built with the sizes that are wanted.
        config: ``{"class_path", "init_args"}`` of the module that the weights come from.

    Returns:
        Name of a tensor in ``module.state_dict()`` -> rule.
    """
    given = config.get("init_args") or {}
    if callable(offer := getattr(module, "resize_rules", None)):
        try:
            return dict(offer({**_defaults(type(module)), **given}))
        except KeyError:  # a subclass that settles sizes by itself: configs do not say them
            return {}
    rules: Rules = {}
    for name, part in module.named_children():
        entry = given.get(name)
        if isinstance(entry, Mapping) and "class_path" in entry:
            rules |= {f"{name}.{inner}": rule for inner, rule in rules_of(part, entry).items()}
    return rules


def resized(
    tensors: Mapping[str, Tensor], rules: Mapping[str, Rule], *, keep: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Apply rules to the tensors that they name.

    Args:
        tensors: name to tensor.
        rules: see `rules_of`.
        keep: names to which no rule is applied.

    Returns:
        All tensors, and a line ``name: old shape -> new shape (rule)`` for each that was changed.

    Raises:
        ValueError: a rule refuses its tensor; names the tensor.
    """
    result, lines = dict(tensors), []
    for name, rule in rules.items():
        if name not in tensors or name in keep:
            continue
        old = tensors[name]
        try:
            new = rule(old)
        except ValueError as error:
            raise ValueError(f"{name} cannot be resized: {error} (or name it in reinit=[...])") from None
        if new is not old:
            result[name] = new
            lines.append(f"{name}: {tuple(old.shape)} -> {tuple(new.shape)} ({_words(rule)})")
    return result, lines


def misread(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> list[str]:
    """Names of tensors that have the shape of those in ``like`` by chance: their rule would change or refuse them."""
    found = []
    for name, rule in rules.items():
        if name not in tensors or name not in like or tensors[name].shape != like[name].shape:
            continue
        try:
            same = rule(tensors[name]) is tensors[name]
        except SizeMismatch:
            same = True  # nothing is known about it
        except ValueError:
            same = False
        found += [] if same else [name]
    return found


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _words(rule: Rule) -> str:
    inner = rule.func if isinstance(rule, functools.partial) else rule
    return getattr(inner, "__name__", type(inner).__name__).removeprefix("resize_").replace("_", " ")
