"""One config: every object that can be saved knows the arguments it was built with.

``config_of(obj)`` is ``{"class_path", "init_args"}`` with JSON values only. A class derived from `Recorded`
keeps its constructor's arguments; frozen dataclasses are read by their fields; an optimizer or a scheduler is
a class, a ``functools.partial`` of a class, or such an entry. The command line and Python spell the same
object differently (jsonargparse passes every default of a foreign class, a Python user passes what matters),
so both are brought to one normal form: of our classes all arguments are written, of foreign classes those
that differ from their defaults, and the learning rate always.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from lightning_flows.store import safety

JSON = Any
_CLI_PACKAGES = {"jsonargparse", "lightning", "pytorch_lightning"}
_ALWAYS = {"lr"}  # the first number anyone looks for stands in the config even where it is the default
_EMPTY = inspect.Parameter.empty


class _ConstructorSignature:
    """Shows the signature of ``__init__`` as that of the class, which ``Recorded.__new__`` would hide."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature | None:
        return None if instance is not None else _signature(owner)


class Recorded:
    """Base of networks, codecs, modules and datamodules: remembers the arguments of the constructor.

    The outermost class's arguments are recorded once, before its ``__init__`` runs, so that what a
    constructor does with them later leaves the record alone. Recording happens in ``__new__``: constructors
    run unwrapped, and Lightning's ``save_hyperparameters``, which reads their frames, sees them as they are.

    Raises:
        ValueError: an argument has no JSON form (a lambda, an unrecorded object, NaN, ...); it names the
            argument.
    """

    __signature__ = _ConstructorSignature()
    _recorded_arguments: dict[str, JSON]

    def __new__(cls, *args: Any, **kwargs: Any) -> Recorded:
        following = super().__new__
        self = following(cls) if following is object.__new__ else following(cls, *args, **kwargs)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:
            return self  # wrong arguments: __init__ says so; or a copy, whose record comes with its state
        recorded = _recorded(cls, bound)
        object.__setattr__(self, "_recorded_arguments", recorded)
        return self

    @property
    def config(self) -> dict[str, JSON]:
        """``{"class_path", "init_args"}`` of this object: JSON values, defaults filled in; a fresh copy."""
        arguments = copy.deepcopy(self._recorded_arguments)
        return {"class_path": safety.public_path(type(self)), "init_args": arguments}


def config_of(obj: Any, name: str = "config") -> JSON:
    """JSON form of an object that can be saved.

    Args:
        obj: a `Recorded` object, a frozen dataclass, a class, a ``functools.partial`` of a class, an entry
            ``{"class_path", "init_args"}``, a JSON value, a path, or a list, tuple or mapping of those.
        name: name of the argument, for the error.

    Returns:
        JSON value: objects and classes become entries, tuples become lists, paths become strings.

    Raises:
        ValueError: the object is anything else; the message names the argument.
    """
    if isinstance(obj, Recorded):
        return obj.config
    if isinstance(obj, type):
        return _class_entry(obj, {}, name)
    if isinstance(obj, functools.partial):
        return _class_entry(_partial_class(obj, name), obj.keywords, name)
    if dataclasses.is_dataclass(obj):
        return _class_entry(type(obj), _fields(obj, name), name)
    if type(obj).__module__.split(".")[0] == "jsonargparse" and hasattr(obj, "as_dict"):
        obj = obj.as_dict()
    if isinstance(obj, Mapping) and "class_path" in obj:
        return _dict_entry(obj, name)
    return _plain(obj, name)


def _plain(obj: Any, name: str) -> JSON:
    if isinstance(obj, Mapping):
        if odd := [key for key in obj if not isinstance(key, str)]:
            raise ValueError(f"argument {name!r} has keys {odd}; the keys of a recorded mapping are strings.")
        return {key: config_of(value, f"{name}.{key}") for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [config_of(value, f"{name}[{index}]") for index, value in enumerate(obj)]
    if isinstance(obj, enum.Enum):
        raise ValueError(_no_json(obj, name))
    if obj is None or isinstance(obj, (bool, str)):
        return str(obj) if isinstance(obj, str) else obj
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return _number(obj, name)


def _number(obj: Any, name: str) -> int | float:
    if isinstance(obj, numbers.Integral):
        return int(obj)
    if not isinstance(obj, numbers.Real):
        raise ValueError(_no_json(obj, name))
    if not math.isfinite(obj):
        raise ValueError(f"argument {name!r} is {obj}, which JSON cannot hold: give a finite number or None.")
    return float(obj)


def _no_json(obj: Any, name: str) -> str:
    return (
        f"argument {name!r} is {safety.brief(obj)}, which has no JSON form: give a JSON value, an object "
        "of a class derived from store.Recorded, a frozen dataclass, a class, a functools.partial of a class "
        "with JSON arguments, or {'class_path', 'init_args'}."
    )


def _recorded(cls: type, bound: inspect.BoundArguments) -> dict[str, JSON]:
    """Arguments of a constructor call by name, defaults filled in, as JSON."""
    bound.apply_defaults()
    (_self, *parameters) = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(value)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = value
        elif value:
            raise ValueError(f"argument '*{parameter.name}' of {cls.__name__} cannot be recorded: name the arguments.")
    return {name: config_of(value, name) for name, value in arguments.items()}


def _class_entry(cls: type, given: Mapping[str, Any], name: str) -> dict[str, JSON]:
    """Entry of a class with the given keyword arguments, in normal form."""
    init_args = {key: config_of(value, f"{name}.{key}") for key, value in given.items()}
    return {"class_path": safety.public_path(cls), "init_args": _normal(cls, init_args, name)}


def _normal(cls: type, given: dict[str, JSON], name: str) -> dict[str, JSON]:
    """Arguments in normal form: all of them for our classes, of foreign ones what differs from defaults."""
    parameters = _signature(cls).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not _EMPTY}
    if not _ours(cls):
        given = {key: v for key, v in given.items() if key in _ALWAYS or not _is_default(v, key, defaults)}
        defaults = {key: value for key, value in defaults.items() if key in _ALWAYS}
    filled = {key: config_of(value, f"{name}.{key}") for key, value in defaults.items() if key not in given}
    order = {key: place for place, key in enumerate(parameters)}
    return dict(sorted({**filled, **given}.items(), key=lambda item: order.get(item[0], len(order))))


def _is_default(value: JSON, key: str, defaults: Mapping[str, Any]) -> bool:
    if key not in defaults:
        return False
    try:
        return bool(config_of(defaults[key]) == value)
    except ValueError:
        return False


def _ours(cls: type) -> bool:
    return issubclass(cls, Recorded) or dataclasses.is_dataclass(cls) or cls.__module__.split(".")[0] == safety.PACKAGE


def _dict_entry(entry: Mapping[str, Any], name: str) -> dict[str, JSON]:
    """Entry given as a mapping; its defaults are known only if its class is one that may be loaded."""
    path, given = entry["class_path"], entry.get("init_args") or {}
    init_args = {key: config_of(value, f"{name}.{key}") for key, value in given.items()}
    try:
        cls = safety.find_class(path, where=name)
    except ValueError:
        return {"class_path": path, "init_args": init_args}
    return {"class_path": safety.public_path(cls), "init_args": _normal(cls, init_args, name)}


def _partial_class(partial: functools.partial[Any], name: str) -> type:
    """Class of a partial; jsonargparse hands over ``partial(<its instantiator>, cls, **arguments)``."""
    if isinstance(partial.func, type) and not partial.args:
        return partial.func
    from_cli = getattr(partial.func, "__module__", "").split(".")[0] in _CLI_PACKAGES
    if from_cli and partial.args and isinstance(partial.args[-1], type):
        return partial.args[-1]
    raise ValueError(_no_json(partial, name))


def _fields(obj: Any, name: str) -> dict[str, Any]:
    if not obj.__dataclass_params__.frozen:
        raise ValueError(_no_json(obj, name))
    return {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj) if field.init}


def _signature(cls: type) -> inspect.Signature:
    """Signature of the constructor without ``self``; empty for classes written in C."""
    try:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    except (TypeError, ValueError):
        return inspect.Signature()
    return signature.replace(parameters=list(signature.parameters.values())[1:])
