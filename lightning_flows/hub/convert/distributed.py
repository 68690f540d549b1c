"""Folders of `torch.distributed.checkpoint`, which sharded training (FSDP) writes: read in one process, without code.

torch unpickles the index of such a folder (``.metadata``) and every value that is no tensor as they come, which would
execute what a stranger put there. Here the index may name the classes of an index alone, and other values are not read.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

INDEX = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_distributed(path: Path) -> bool:
    """Whether this is a folder that `torch.distributed.checkpoint` wrote."""
    return (path / INDEX).is_file()


def read_distributed(folder: Path) -> dict[str, Any]:
    """What was saved, with its own nesting; None in the place of whatever is no tensor.

    Raises:
        ValueError: no such folder, an index that is broken or names foreign classes, missing or broken shards.
    """
    if not is_distributed(folder):
        raise ValueError(f"folder {folder} has no {INDEX}: it is not what torch.distributed.checkpoint writes")
    try:
        reader = _Reader(folder)
        index = reader.read_metadata()
        entries = index.state_dict_metadata
        tensors = {name: _empty(about) for name, about in entries.items() if isinstance(about, TensorStorageMetadata)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.load(tensors, storage_reader=reader)
    except pickle.UnpicklingError as error:
        raise ValueError(f"folder {folder} cannot be read safely: {error}") from error
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"folder {folder} is broken or incomplete: {error}") from error
    except dcp.CheckpointException as error:
        raise ValueError(f"folder {folder} is broken or incomplete: {_first(error)}") from error
    return _nested({name: tensors.get(name) for name in entries}, index.planner_data or {})


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The classes of an index, and dtypes.

        Raises:
            UnpicklingError: any other name.
        """
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no index of tensors needs")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, of its own classes only."""
        with Path(self.path, INDEX).open("rb") as stream:
            index = _Index(stream).load()
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, Mapping):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(index).__name__}, not an index")
        for part in (index.storage_data or {}).values():
            if Path(part.relative_path).name != part.relative_path:
                raise pickle.UnpicklingError(f"{INDEX} names {part.relative_path!r}, a file that is not in the folder")
        return index


def _empty(about: TensorStorageMetadata) -> torch.Tensor:
    return torch.empty(about.size, dtype=about.properties.dtype)


def _first(error: Any) -> str:
    return str(next(iter(error.failures.values()))[0])


def _nested(flat: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the keys that were saved: ``{"model": {"blocks.0.w": ...}}`` is kept as ``model.blocks.0.w``."""
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = paths.get(name, (name,))
        place = whole
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return whole
