"""From a reference to a folder: a path, the id of a zoo entry, or ``org/name@revision`` on the Hub.

A zoo id is looked up in the folder named by ``LIGHTNING_FLOWS_ZOO``, in the repository's ``zoo/``, among the
entries inside the wheel, and last on the Hub, where its revision and checksum are pinned in this file: an id
names the same weights for ever. What was looked at stands in every error.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from lightning_flows.store.folder import CONFIG, WEIGHTS

ORGANISATION = "lightning-flows"
PATTERNS = ("*.json", "*.safetensors", "*.md", "*.yaml")
_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_REPO = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


class Pin(NamedTuple):
    """What a zoo id means on the Hub: a commit and the SHA-256 of its ``model.safetensors``."""

    revision: str
    sha256: str


PINNED: dict[str, Pin] = {}


def resolve(ref: str | Path, *, revision: str | None = None, files: tuple[str, str] = (CONFIG, WEIGHTS)) -> Path:
    """Folder that holds ``config.json`` and ``model.safetensors``, or two other files.

    Args:
        ref: a folder, a zoo id, ``org/name`` or ``org/name@revision``.
        revision: commit, tag or branch on the Hub, where ``ref`` does not carry one.
        files: names of the configuration and of the weights, without which a folder is not complete.

    Returns:
        A folder on this machine; files from the Hub lie in its client's cache.

    Raises:
        ValueError: nothing complete was found; names the reference and every place that was looked at.
    """
    text, looked = str(ref), []
    if revision is None and Path(ref).expanduser().is_dir():
        folder = Path(ref).expanduser()
        if is_complete(folder, files):
            return folder
        looked.append(f"folder {folder} (lacks {_lacking(folder, files)})")
    if not isinstance(ref, Path):
        if match := _ID.fullmatch(text):
            return _zoo_entry(text, match["name"], _one(ref, match["revision"], revision), looked, files)
        if match := _REPO.fullmatch(text):
            return _download(text, match["name"], _one(ref, match["revision"], revision), looked, files)
    raise _nothing(text, looked or [f"folder {text}"], files)


def is_complete(folder: Path, files: tuple[str, str] = (CONFIG, WEIGHTS)) -> bool:
    """True for a folder that holds both files of a model."""
    return not _lacking(folder, files)


def zoo_folders() -> list[Path]:
    """Local folders of zoo entries in the order in which they are asked, existing ones only."""
    package = Path(__file__).resolve().parents[1]
    named = os.environ.get("LIGHTNING_FLOWS_ZOO")
    places = [Path(named).expanduser()] if named else []
    if (package.parent / "pyproject.toml").is_file():  # a checkout, not some other site-packages/zoo
        places.append(package.parent / "zoo")
    places.append(package / "_assets" / "zoo")
    return [place for place in places if place.is_dir()]


def sha256(file: Path) -> str:
    """Checksum of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def one_line(error: Exception, length: int = 200) -> str:
    """Message of an error of the Hub's client, which spreads over lines, as one line of limited length."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _zoo_entry(ref: str, name: str, revision: str | None, looked: list[str], files: tuple[str, str]) -> Path:
    if revision is not None:
        return _download(ref, f"{ORGANISATION}/{name}", revision, looked, files)
    for place in zoo_folders():
        if is_complete(place / name, files):
            return place / name
        looked.append(f"zoo {place}")
    pin = PINNED.get(name)
    if pin is None:
        pinned = ", ".join(sorted(PINNED)) or "none"
        raise _nothing(ref, [*looked, f"the pinned entries of the Hub ({pinned})"], files)
    folder = _download(ref, f"{ORGANISATION}/{name}", pin.revision, looked, files)
    if (found := sha256(folder / files[1])) != pin.sha256:
        raise ValueError(f"{ref!r}: {folder / files[1]} has SHA-256 {found} instead of the pinned {pin.sha256}.")
    return folder


def _download(ref: str, repo: str, revision: str | None, looked: list[str], files: tuple[str, str]) -> Path:
    import huggingface_hub  # slow to import, and needed for no local reference

    looked = [*looked, f"{repo}@{revision or 'main'} on the Hub"]
    try:
        path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(PATTERNS))
    except Exception as error:  # the client's errors share no base class; the cause stays attached
        raise _nothing(ref, looked, files, one_line(error)) from error
    folder = Path(path)
    if not is_complete(folder, files):
        raise _nothing(ref, looked, files, f"it lacks {_lacking(folder, files)}")
    return folder


def _lacking(folder: Path, files: tuple[str, str]) -> str:
    return " and ".join(name for name in files if not (folder / name).is_file())


def _one(ref: str | Path, inside: str | None, given: str | None) -> str | None:
    if inside and given and inside != given:
        raise ValueError(f"revision={given!r} contradicts the reference {str(ref)!r}: give one revision.")
    return inside or given


def _nothing(ref: str, looked: list[str], files: tuple[str, str], reason: str = "") -> ValueError:
    because = f" ({reason})" if reason else ""
    return ValueError(
        f"ref {ref!r} leads to no folder with {files[0]} and {files[1]}; looked at {', '.join(looked)}{because}."
    )
