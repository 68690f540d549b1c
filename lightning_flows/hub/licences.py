"""The text of an agreement that must lie beside weights, wherever they go."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_flows.hub.convert.common import Format

NOTE = "LICENCE-NOTE.md"


def licence_files(form: Format, file: str | Path) -> dict[str, str | bytes | Path]:
    """What has to lie beside converted weights of a format with an agreement, by name; nothing for other formats.

    That is every file ``LICENSE*`` or ``LICENCE*`` (in any case) beside the original, or in its folder; where there
    is none, a note that says what is known, with a warning.
    """
    if form.agreement is None:
        return {}
    place = Path(file).resolve()
    folders = [place, place.parent] if place.is_dir() else [place.parent]
    found = {path.name: path for folder in reversed(folders) for path in folder.iterdir() if is_licence(path)}
    if found:
        return dict(found)
    warnings.warn(
        f"{file} has no licence beside it (LICENSE*): a note is written to {NOTE}. Fetch the agreement from where the "
        "weights come from, put it beside the converted ones, and remove the note.",
        stacklevel=3,
    )
    return {NOTE: note(form, place.name)}


def note(form: Format, name: str) -> str:
    """What is known of the licence of weights whose agreement is missing."""
    return f"""# Licence of these weights

They were converted from `{name}` ({form.source}) and are a modified form of it: tensors that nothing reads were left
out, and the others were written to another kind of file. No value was changed.

{form.agreement}

This note is not the agreement. Its text must lie beside these weights: fetch it from the place where `{name}` comes
from, put it here (`LICENSE`), and remove this note. Until then do not pass the weights on;
`lightning-flows push` refuses to.
"""


def is_licence(path: Path) -> bool:
    """Whether a file is called ``LICENSE*`` or ``LICENCE*``, in any case, and is not our note."""
    plain = path.name != NOTE and path.is_file()
    return plain and path.name.lower().startswith(("license", "licence"))
