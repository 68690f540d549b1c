"""A model is a folder: ``config.json``, ``model.safetensors``, and beside them the card and the recipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_flows.store import safety
from lightning_flows.store.weights import save_tensors, temporary_name, whole_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra_files: Mapping[str, str | bytes | Path] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder; every file is complete before the first one appears under its name.

    Args:
        folder: target; made if it does not exist. Other files in it are left alone.
        config: JSON values, ``config_of(model)``.
        tensors: name to tensor, written as stored (cast them before for 16-bit storage).
        extra_files: further files by name: their text, their bytes, or a file to copy.
        metadata: strings for the header of the weights file.

    Returns:
        The folder.

    Raises:
        ValueError: the config is not JSON, or the name of an extra file leaves the folder.
    """
    files = {CONFIG: json_text(config), **_checked(extra_files or {})}
    return save_files(folder, {WEIGHTS: tensors}, files, metadata=metadata)


def save_files(
    folder: str | Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, str | bytes | Path],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write files of any names to a folder; every file is complete before the first one appears under its name.

    Args:
        folder: target; made if it does not exist. Other files in it are left alone.
        tensors: for each safetensors file its tensors by name.
        files: further files by name: their text, their bytes, or a file to copy.
        metadata: strings for the headers of the safetensors files.

    Returns:
        The folder.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target.absolute())
    temporary.mkdir()
    try:
        for name, values in tensors.items():
            save_tensors(temporary / name, values, metadata)
        for name, content in files.items():
            _write(temporary / name, content)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a model folder, as raw JSON: nothing it names has been looked at.

    Raises:
        ValueError: the file is missing, is not JSON, or holds no ``class_path``.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config file {file} is not JSON ({error}).") from error
    if not safety.is_entry(config):
        raise ValueError(f"config file {file} holds no object with a class_path.")
    return dict(config)


def write_text(file: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(config: Mapping[str, Any]) -> str:
    """A config as the text of a file.

    Raises:
        ValueError: it is not made of JSON values.
    """
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config is not made of JSON values ({error}).") from error


def _checked(files: Mapping[str, str | bytes | Path]) -> Mapping[str, str | bytes | Path]:
    for name in files:
        if Path(name).name != name or name in (CONFIG, WEIGHTS):
            raise ValueError(f"extra_files: {name!r} is not the plain name of a further file.")
    return files


def _write(file: Path, content: str | bytes | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content, encoding="utf-8")


def _move(temporary: Path, target: Path) -> None:
    """Rename the finished folder, or its files one by one where the target exists and may hold others."""
    if not target.exists():
        try:
            os.rename(temporary, target)
            return
        except OSError:
            if not target.is_dir():  # else another process, with the same files, came first
                raise
    for file in sorted(temporary.iterdir()):
        os.replace(file, target / file.name)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
