"""A directive that documents one floor of the package, so that no public name can be forgotten.

``{floor} lightning_flows.flow`` writes one section for each module that defines names of the floor's
``__all__``: the docstring of the module (it states the idea and the formula), then every class and function
under its public path.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

PACKAGE = "lightning_flows"
LITERAL = re.compile(r"(``[^`]*``|`[^`]*`)")
BROKEN_MATH = re.compile(r"(^\.\. math:: .*)\n(?=\S)", re.MULTILINE)


class Floor(SphinxDirective):
    """See the module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Sections of the floor."""
        source = self.arguments[0]
        text = page(source)
        container = nodes.section(document=self.state.document)
        nested_parse_with_titles(self.state, StringList(text.splitlines(), source), container)
        return container.children


def page(floor: str) -> str:
    """Sections of a floor as reStructuredText."""
    module = importlib.import_module(floor)
    homes: dict[str, list[str]] = {}
    for name in module.__all__:
        homes.setdefault(home(floor, name, getattr(module, name)), []).append(name)
    order = [name for name in vars(module) if name in module.__all__]  # that of the imports
    parts = [f".. currentmodule:: {floor}", ""]
    for place in sorted(homes, key=lambda place: (place == floor, place)):
        names = sorted(homes[place], key=lambda name: (position(place, module, name), order.index(name)))
        parts += [*section(place, floor), *(line for name in names for line in entry(module, name))]
    return "\n".join(parts)


def home(floor: str, name: str, value: Any) -> str:
    """Module that defines a name: that of a class or function, else the submodule that holds the constant."""
    if inspect.isclass(value) or inspect.isroutine(value):
        place = value.__module__
        return place if place.startswith(floor) else floor
    below = [key for key in sys.modules if key.startswith(f"{floor}.")]
    return next((key for key in sorted(below, key=len, reverse=True) if defines(key, name)), floor)


def defines(place: str, name: str) -> bool:
    """Whether a module assigns a constant itself: ``NAME =`` or ``NAME:`` begins a line of it."""
    source = inspect.getsource(sys.modules[place])
    return any(line.startswith((f"{name} =", f"{name}:")) for line in source.splitlines())


def position(place: str, module: Any, name: str) -> int:
    """Line where a class or function begins; constants come first."""
    value = inspect.unwrap(getattr(module, name))
    try:
        return inspect.getsourcelines(value)[1]
    except TypeError:
        return 0


def section(place: str, floor: str) -> list[str]:
    """Title and docstring of a module."""
    title = place.removeprefix(f"{PACKAGE}.")
    text = BROKEN_MATH.sub(r"\1 ", inspect.cleandoc(sys.modules[place].__doc__ or "")) if place != floor else ""
    lines = text.splitlines()
    tidy(lines)
    return ["", title, "-" * len(title), "", *GoogleDocstring(lines).lines(), ""]


def entry(module: Any, name: str) -> list[str]:
    """Directive for one name."""
    value = getattr(module, name)
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "", *mixed_in(module, value)]
    if not callable(value):
        text = repr(value)
        return [f".. py:data:: {name}", *([f"   :value: {text}"] if len(text) < 80 else []), ""]
    if value.__name__ != name:
        return [f".. py:function:: {name}", "", f"   The same as `{value.__name__}`.", ""]
    return [f".. autofunction:: {name}", ""]


def mixed_in(module: Any, cls: type) -> list[str]:
    """Directives for the methods that a class has from mixins of its floor, which have no entry of their own."""
    public = {getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}
    mixins = [base for base in cls.__mro__ if base.__module__.startswith(module.__name__) and base not in public]
    names = [(name, base) for base in mixins for name, value in vars(base).items() if inspect.isfunction(value)]
    own = [name for name, base in names if not name.startswith("_") and getattr(cls, name) is vars(base)[name]]
    return [line for name in own for line in (f"   .. automethod:: {name}", "")]


def tidy(lines: list[str]) -> None:
    """Escape the stars and bars of formulas in running text, such as ``(B, *shape)`` and ``|x|``."""
    verbatim = -1  # indent of the directive or ``::`` whose block is left alone
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= verbatim:
            verbatim = -1
        if ".. math::" in line or line.rstrip().endswith("::"):
            verbatim = indent
        elif verbatim < 0:
            parts = LITERAL.split(line)
            parts[::2] = [escaped(part) for part in parts[::2]]
            lines[i] = "".join(parts)


def escaped(text: str) -> str:
    """Unpacking stars and bars with a backslash."""
    return re.sub(r"(?<=[(,] )\*(?=\w)|(?<=\()\*(?=\w)", r"\\*", text).replace("|", r"\|")


def tidy_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """`tidy` before napoleon reads the docstring."""
    tidy(lines)


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are in their "Attributes:" section already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Links from annotations: ``flow.paths.Linear`` is documented as ``flow.Linear``."""
    target = node.get("reftarget", "")
    domain = env.domains.python_domain
    name = target.rpartition(".")[2]
    found = [full for full in domain.objects if full.startswith(PACKAGE) and full.rpartition(".")[2] == name]
    if node.get("refdomain") != "py" or not name[:1].isupper() or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive and the two hooks."""
    app.add_directive("floor", Floor)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", tidy_docstring, priority=400)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
