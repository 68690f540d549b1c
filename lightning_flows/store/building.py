"""From a config back to the object: check all of it, then construct from the inside out.

The inverse of ``config_of``: ``config_of(build(config)) == config`` for every config in normal form.
Optimizers and schedulers come back as ``functools.partial`` of their class, because the arguments which hold
them are callables; JSON lists become tuples where the constructor asks for a tuple.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch

from lightning_flows.store import hints, safety

_LATE = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # called once the parameters exist


def build(
    config: Mapping[str, Any], base: type | None = None, trust_remote_code: bool = False, **overrides: Any
) -> Any:
    """Construct the object that a config describes.

    Args:
        config: ``{"class_path", "init_args"}``.
        base: class of which the result must be an instance.
        trust_remote_code: accept class paths outside lightning_flows, torch.nn and torch.optim.
        **overrides: arguments that replace recorded ones: of the outermost class by name, of an inner one by
            its dotted place (``**{"network.depth": 4}``) or by its name alone where that stands in one place
            only.

    Returns:
        The object; for an optimizer or scheduler a ``functools.partial`` of the class.

    Raises:
        ValueError: the config is refused (see `check`), or an override fits nowhere or in several places.
    """
    merged = override(config, **overrides)
    safety.check(merged, base, trust_remote_code=trust_remote_code)
    return _make(merged, Any, trust_remote_code)


def override(config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Copy of a config with some arguments replaced; see `build` for how they are named.

    Raises:
        ValueError: an override fits nowhere, or in several places.
    """
    merged = {key: _copied(value) for key, value in config.items()}
    for name, value in overrides.items():
        entry, key = _place(merged, name)
        entry.setdefault("init_args", {})[key] = value
    return merged


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value if not isinstance(value, (bytearray, set)) else copy.copy(value)


def _place(config: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The entry and the argument of it that an override names."""
    places = {
        f"{where}.{key}".removeprefix("config."): (entry, key)
        for where, entry in safety.entries(config)
        for key in entry.get("init_args", {})
    }
    if name in places:
        return places[name]
    fitting = sorted(place for place in places if place.endswith(f".{name}"))
    if len(fitting) == 1:
        return places[fitting[0]]
    if fitting:
        raise ValueError(f"override {name!r} fits several arguments: say which of {fitting}.")
    raise ValueError(f"override {name!r} is no argument of {config.get('class_path')}; known are {sorted(places)}.")


def _make(value: Any, annotation: Any, trust: bool) -> Any:
    if safety.is_entry(value):
        return _instantiate(value, annotation, trust)
    if isinstance(value, dict):
        return {key: _make(item, hints.element(annotation, key), trust) for key, item in value.items()}
    if isinstance(value, list):
        items = [_make(item, hints.element(annotation, i), trust) for i, item in enumerate(value)]
        return tuple(items) if hints.wants_tuple(annotation) else items
    return value


def _instantiate(entry: dict[str, Any], annotation: Any, trust: bool) -> Any:
    path = entry["class_path"]
    cls = safety.import_class(path) if trust else safety.find_class(path)
    types = hints.argument_types(cls)
    given = entry.get("init_args", {})
    init_args = {name: _make(item, types.get(name, Any), trust) for name, item in given.items()}
    if hints.wants_class(annotation) and not init_args:
        return cls
    if issubclass(cls, _LATE) or hints.wants_factory(annotation):
        return functools.partial(cls, **init_args)
    try:
        return cls(**init_args)
    except TypeError as error:
        raise ValueError(f"{path} cannot be built from the arguments {sorted(init_args)}: {error}.") from error
