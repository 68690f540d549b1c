"""What a constructor asks for, read from its annotations.

Loading needs three answers about an argument: which classes may stand there, what the elements of a
container are, and whether a JSON list must become a tuple. All are read from the type hints of the
constructor; a hint that cannot be resolved answers "anything".
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from typing import Any

_OPEN = (Any, object, dict, collections.abc.Mapping, collections.abc.Callable, inspect.Parameter.empty)
_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def argument_types(cls: type) -> dict[str, Any]:
    """Type hints of the constructor's arguments by name; empty where they cannot be resolved."""
    source = cls if dataclasses.is_dataclass(cls) else cls.__init__  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(source)
    except (NameError, TypeError, AttributeError):
        return {}
    return {name: hint for name, hint in hints.items() if name != "return"}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone; ``Annotated`` is unwrapped."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(part for option in typing.get_args(annotation) for part in members(option))
    return (annotation,)


def asked_for(annotation: Any) -> tuple[type, ...] | None:
    """Classes of which a ``class_path`` at this argument must be a subclass; None is "anything".

    ``Callable[..., R]`` and ``type[R]`` ask for R: a partial of a class stands there.
    """
    classes: list[type] = []
    for option in members(annotation):
        if option in (None, type(None)):
            continue
        origin = typing.get_origin(option)
        if origin in (collections.abc.Callable, type):
            inner = asked_for(typing.get_args(option)[-1])
            if inner is None:
                return None
            classes.extend(inner)
        elif option in _OPEN or origin in _OPEN:
            return None
        elif origin is None:
            if not isinstance(option, type):
                return None  # a string, a TypeVar: nothing to compare with
            classes.append(option)
    return tuple(classes) or None


def element(annotation: Any, key: int | str) -> Any:
    """Annotation of the element ``key`` of a list, tuple or mapping argument."""
    for option in members(annotation):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if not args or not isinstance(origin, type):
            continue
        if isinstance(key, str) and issubclass(origin, collections.abc.Mapping):
            return args[-1]
        if isinstance(key, int) and origin is tuple:
            return args[0] if args[-1] is Ellipsis else args[min(key, len(args) - 1)]
        if isinstance(key, int) and origin in _SEQUENCES:
            return args[0]
    return Any


def wants_tuple(annotation: Any) -> bool:
    """True where a JSON list stands for a tuple: a tuple is allowed and a list is not."""
    kinds = {typing.get_origin(option) or option for option in members(annotation)}
    return tuple in kinds and not kinds.intersection(_SEQUENCES)


def wants_class(annotation: Any) -> bool:
    """True where the class itself is asked for (``type[X]``)."""
    return any(typing.get_origin(option) is type for option in members(annotation))


def wants_factory(annotation: Any) -> bool:
    """True where a callable is asked for (``Callable[..., X]``)."""
    return any(typing.get_origin(option) is collections.abc.Callable for option in members(annotation))
