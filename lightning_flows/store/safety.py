"""Which classes a file may name: a class path is walked, never trusted for its prefix.

A configuration comes from strangers. A ``class_path`` in it is accepted only if walking an already
allowed package, module by module and submodule by submodule, ends at a class that itself says that it
lives there. A prefix test is no protection: modules hold the modules which they import, so
``torch.nn.parallel.distributed.os.system`` begins with an allowed name and ends in a shell.

Nothing outside the allowed packages is imported for a refused configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from lightning_flows.store import hints

PACKAGE = "lightning_flows"
ALLOWED = (PACKAGE, "torch.nn", "torch.optim")
_KEYS = {"class_path", "init_args"}
_HOME = "is not a class of lightning_flows, torch.nn or torch.optim"
_CONSENT = "pass trust_remote_code=True only if you trust whoever wrote the file"


def public_path(cls: type) -> str:
    """Shortest import path at which a class is found: ``torch.optim.AdamW``, not ``torch.optim.adamw.AdamW``.

    Classes of this package are named at their floor (``lightning_flows.networks.DiT``) where it exports them.
    Only packages that contain the defining module are tried, so the path tells whose class it is.
    """
    parts = cls.__module__.split(".")
    for end in range(_shortest_alias(cls.__module__), len(parts)):
        prefix = ".".join(parts[:end])
        if _lookup(sys.modules.get(prefix), cls.__qualname__) is cls:
            return f"{prefix}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def is_entry(value: Any) -> bool:
    """True for a JSON object that names a class: it has the key ``class_path``."""
    return isinstance(value, dict) and "class_path" in value


def find_class(path: str, *, where: str = "class_path") -> type:
    """The class that an allowed path names.

    Args:
        path: a class path such as ``lightning_flows.networks.DiT`` or ``torch.nn.Linear``.
        where: name of the argument, for the error.

    Raises:
        ValueError: the path leaves the allowed packages, ends at something that is not a class, or at a class
            that lives elsewhere.
    """
    root = _root(path, where)
    names = path[len(root) + 1 :].split(".")
    if not all(name.isidentifier() and not name.startswith("_") for name in names):
        raise ValueError(f"{where}: {path!r} {_HOME}; {_CONSENT}.")
    found: Any = importlib.import_module(root)
    for name in names:
        found = _step(found, name)
    if not isinstance(found, type) or path not in (_full_path(found), public_path(found)):
        raise ValueError(f"{where}: {path!r} {_HOME}; {_CONSENT}.")
    return found


def import_class(path: str, *, where: str = "class_path") -> type:
    """The class at any import path: imports whatever the path names (only under ``trust_remote_code``).

    Raises:
        ValueError: nothing importable lies at the path, or it is not a class.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        try:
            module = importlib.import_module(prefix)
        except ModuleNotFoundError as error:
            if error.name and f"{prefix}.".startswith(f"{error.name}."):
                continue  # this prefix is a class, not a module: try a shorter one
            raise
        found = _lookup(module, ".".join(parts[end:]))
        if isinstance(found, type):
            return found
        break
    raise ValueError(f"{where}: no class is found at {path!r}.")


def check(config: Any, base: type | None = None, *, trust_remote_code: bool = False) -> None:
    """Refuse a configuration that names anything but allowed classes of the right kind.

    All class paths of the raw JSON are compared with the allowed packages first; only then are the classes
    looked up and compared with what the arguments ask for.

    Args:
        config: ``{"class_path", "init_args"}``, JSON values with such entries at any depth.
        base: class of which the outermost entry must be a subclass.
        trust_remote_code: accept class paths of any package, importing them.

    Raises:
        ValueError: names the place, the class path and what is allowed.
    """
    if not is_entry(config):
        raise ValueError(f"config: expected an object with 'class_path' and 'init_args', got {brief(config)}.")
    for where, entry in entries(config):
        _check_shape(entry, where)
        if not trust_remote_code:
            _root(entry["class_path"], where)
    _check_value(config, base if base is not None else Any, "config", trust_remote_code)


def entries(value: Any, where: str = "config") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every ``class_path`` entry of a JSON value with its place, outermost first."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield where, value
        for key, item in value.items():
            yield from entries(item, where if key == "init_args" else f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from entries(item, f"{where}[{index}]")


def _check_shape(entry: Mapping[str, Any], where: str) -> None:
    path, init_args = entry["class_path"], entry.get("init_args", {})
    if not isinstance(path, str) or not isinstance(init_args, Mapping):
        raise ValueError(f"{where}: class_path must be a string and init_args an object, got {brief(entry)}.")
    if extra := sorted(set(entry) - _KEYS):
        raise ValueError(f"{where}: an entry has the keys class_path and init_args only, got also {extra}.")


def _check_value(value: Any, annotation: Any, where: str, trust: bool) -> None:
    if is_entry(value):
        path = value["class_path"]
        cls = import_class(path, where=where) if trust else find_class(path, where=where)
        _check_kind(cls, annotation, where, path)
        types = hints.argument_types(cls)
        for name, item in value.get("init_args", {}).items():
            _check_value(item, types.get(name, Any), f"{where}.{name}", trust)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(item, hints.element(annotation, str(key)), f"{where}.{key}", trust)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_value(item, hints.element(annotation, index), f"{where}[{index}]", trust)


def _check_kind(cls: type, annotation: Any, where: str, path: str) -> None:
    wanted = hints.asked_for(annotation)
    if wanted is None:
        return
    try:
        fits = issubclass(cls, wanted)
    except TypeError:  # a protocol that cannot be compared with a class
        return
    if not fits:
        names = " or ".join(public_path(kind) for kind in wanted)
        raise ValueError(f"{where}: {path!r} is not a subclass of {names}, which the argument asks for.")


def _root(path: str, where: str) -> str:
    for root in ALLOWED:
        if path.startswith(root + "."):
            return root
    raise ValueError(f"{where}: {path!r} {_HOME}; {_CONSENT}.")


def _step(parent: Any, name: str) -> Any:
    """One step of the walk: a submodule that really is one, or a class; None for anything else."""
    if isinstance(parent, type):
        return vars(parent).get(name)
    if not isinstance(parent, ModuleType):
        return None
    child = vars(parent).get(name)
    if isinstance(child, type):
        return child
    if (submodule := _submodule(parent, name)) is not None:
        return submodule
    lazy = getattr(parent, name, None)  # a package may resolve its public names on first use
    return lazy if isinstance(lazy, type) else None


def _submodule(parent: ModuleType, name: str) -> ModuleType | None:
    full = f"{parent.__name__}.{name}"
    if full not in sys.modules:
        if not hasattr(parent, "__path__") or importlib.util.find_spec(full) is None:
            return None
        importlib.import_module(full)
    module = sys.modules[full]
    return module if isinstance(module, ModuleType) and module.__name__ == full else None


def _lookup(module: ModuleType | None, qualname: str) -> Any:
    found: Any = module
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _full_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _shortest_alias(module: str) -> int:
    """Number of leading parts of a module path from which an alias is looked for."""
    if module.split(".")[0] == PACKAGE:
        return 2
    roots = [root for root in ALLOWED if f"{module}.".startswith(f"{root}.")]
    return len(roots[0].split(".")) if roots else 1


def brief(value: Any) -> str:
    """Short text of a value for an error message; callables by their name, without an address."""
    if (name := getattr(value, "__qualname__", None)) is not None:
        return f"{type(value).__name__} {getattr(value, '__module__', '')}.{name}"
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
