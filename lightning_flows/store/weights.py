"""Tensors in and out of safetensors: no pickles, nothing half-written, nothing loaded by halves.

A file is written under a temporary name and renamed. Loading is strict: a missing, unknown or misshapen
tensor is an error that names it, before the first value is copied, unless it was named in ``reinit``. Files
may hold 16-bit floats; the module keeps its own dtype.
"""

from __future__ import annotations

import fnmatch
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip archive, in old versions a bare pickle
_POINTER = b"version https://git-lfs"
SIXTEEN_BITS = ("float16", "bfloat16")
_SMALL = 1024  # entries up to which a tensor keeps its 32 bits


def save_tensors(file: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors of any shape to a safetensors file, whole or not at all.

    Args:
        file: target; its folder exists.
        tensors: name to tensor, on any device; tensors that share memory are written once each.
        metadata: strings for the file's header, beside ``format: pt``.

    Raises:
        OSError: it cannot be written; names the file and the reason.
    """
    header = {"format": "pt", **(metadata or {})}
    with whole_file(file) as temporary:
        safetensors.torch.save_file(_separate(tensors), temporary, metadata=header)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """A hidden name beside a file, which is renamed to it after the block; a block that fails leaves nothing behind.

    Raises:
        OSError: the file cannot be written (disk full, no permission); names it and the reason.
    """
    target = Path(file)
    temporary = temporary_name(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        text = f"{target} was not written: {reason}"
        if number is None:  # numpy counts bytes where the system would give a reason
            raise OSError(f"{text} (is the disk full?)") from error
        raise OSError(number, text) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(target: Path) -> Path:
    """Unused hidden name beside a file or folder, to be renamed to it when it is complete."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU, as stored.

    Raises:
        ValueError: the file is missing, is a pickle or a Git LFS pointer, is truncated or otherwise no
            safetensors.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist.")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"weights file {path} {_what_it_is(path)} ({error}).") from error


def in_16_bits(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Large float32 tensors in 16 bits, for a file of half the size; a module that loads it keeps its own dtype.

    Tensors of up to 1,024 entries (biases, gains, statistics of latents) stay as they are: they cost little, and
    an error of theirs moves every output the same way.

    Args:
        tensors: name to tensor.
        dtype: ``"float16"`` (11 significant bits, magnitudes up to 65504) or ``"bfloat16"`` (8 bits, the range of
            float32).

    Raises:
        ValueError: another ``dtype``, or a value that does not fit into it; names the tensor.
    """
    if dtype not in SIXTEEN_BITS:
        raise ValueError(f"dtype must be one of {', '.join(SIXTEEN_BITS)}, got {dtype!r}.")
    narrow = {}
    for name, value in tensors.items():
        large = value.dtype == torch.float32 and value.numel() > _SMALL
        narrow[name] = value.to(getattr(torch, dtype)) if large else value
        if large and not torch.equal(narrow[name].isfinite(), value.isfinite()):
            raise ValueError(f"dtype={dtype!r} cannot hold the values of {name}: use bfloat16 or float32.")
    return narrow


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, reinit: Sequence[str] = ()) -> list[str]:
    """Copy tensors into a module's parameters and buffers, strictly.

    Args:
        module: receives the values in its own dtypes and on its own devices.
        tensors: name to tensor, the names of ``module.state_dict()``.
        reinit: names or patterns (``head.*``) of tensors that keep their fresh values, whatever the file
            holds.

    Returns:
        Names of the module's tensors that were left as they are.

    Raises:
        ValueError: names every tensor that is missing, unknown or of another shape or kind, and every pattern
            of ``reinit`` that fits nothing; the module is then untouched.
    """
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    fresh = _matching([*expected, *tensors], reinit)
    problems = _problems(expected, tensors, fresh)
    if problems:
        advice = "name changed tensors in reinit=[...] to start them afresh"
        raise ValueError(f"the weights do not fit {type(module).__name__}: {'; '.join(problems)} ({advice}).")
    state = {name: tensors[name].to(value.dtype) for name, value in expected.items() if name not in fresh}
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta and fresh:
        raise ValueError(f"reinit={list(reinit)}: a module on the meta device has no fresh values to keep.")
    module.load_state_dict(state, strict=False, assign=on_meta)
    return [name for name in expected if name in fresh]


def _what_it_is(path: Path) -> str:
    """Why a file is no safetensors file; asked after the attempt: a good file may begin with any byte."""
    with path.open("rb") as stream:
        head = stream.read(len(_POINTER))
    if head.startswith(_PICKLES):
        return "is a pickle, which is not loaded: only safetensors files are"
    if head == _POINTER:
        return "is a Git LFS pointer, not the weights: fetch them with git lfs pull"
    return "is truncated or no safetensors file"


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors without shared memory, which safetensors refuses."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen or _is_view(tensor) else tensor
        seen.add(address)
    return separate


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ValueError(f"reinit={patterns!r} is a string; give a list of tensor names or patterns.")
    names = set(names)
    hits = {pattern: {n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)} for pattern in patterns}
    if idle := [pattern for pattern, found in hits.items() if not found]:
        raise ValueError(f"reinit={idle} names no tensor; tensors are called like {sorted(names)[:8]}.")
    return set().union(*hits.values())


def _problems(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], fresh: set[str]) -> list[str]:
    missing = [name for name in expected if name not in tensors and name not in fresh]
    unknown = [name for name in tensors if name not in expected and name not in fresh]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unknown {', '.join(unknown)}"] if unknown else []
    for name, wanted in expected.items():
        given = tensors.get(name)
        if given is None or name in fresh:
            continue
        if given.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(given.shape)} instead of {tuple(wanted.shape)}")
        elif given.is_floating_point() != wanted.is_floating_point() or given.is_complex() != wanted.is_complex():
            problems.append(f"{name} has dtype {given.dtype} instead of {wanted.dtype}")
    return problems
