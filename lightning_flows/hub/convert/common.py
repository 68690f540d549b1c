"""Reading official checkpoint files: pickles without code execution, wrappers, prefixes; what a format is.

Nothing here guesses: an unknown key, a file that holds neither a state dict nor a known wrapper of one, or a
choice that the file does not offer is an error that names it.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flows.hub.cards import usage
from lightning_flows.hub.convert.distributed import read_distributed
from lightning_flows.store import load_tensors

Weights = Literal["ema", "raw", "condition"]
WRAPPED: dict[str, tuple[str, ...]] = {
    "ema": ("ema", "ema_state_dict"),
    "raw": ("model", "model_dict", "state_dict"),
    "condition": ("cond_stage_model_dict",),  # the encoder of the condition, in resumed runs of LFM
}
ASIDE = {"opt", "optimizer", "scheduler", "args", "epoch", "global_step", "step", "train_steps"}
PREFIX = "module."
FOLDER = "path/to/this/folder"
SAMPLE = f"""```python
import lightning_flows as lf

model = lf.from_pretrained("{FOLDER}")
images = model.sample(n=4, seed=0)  # conditional weights: lf.Condition(label=...), or of texts
                                    # lf.Condition(tokens=model.text.encode(["a cat"]))
```"""


@dataclass(frozen=True)
class Format:
    """One official checkpoint format.

    Attributes:
        name: as the user writes it.
        source: what wrote such files.
        licence: Hugging Face licence id of the weights.
        licence_note: one or two sentences about it, for the card.
        load_network: ``(tensors, **options) -> network`` in our conventions, with the weights; None where ``convert``
            does it all.
        module: ``(network, **options) -> GenerativeModule``: codec, objective and sampler of the publication.
        options: names of the arguments of the network that say what the file cannot.
        convert: ``(file, out, **options) -> folder`` for a format that is no single state dict, instead of the two.
        module_options: names of the arguments of the module that say what the file cannot.
        agreement: what is known of a licence whose text must lie beside the weights, see `hub.licences`; else None.
        family: tag of the card.
    """

    name: str
    source: str
    licence: str
    licence_note: str
    load_network: Callable[..., nn.Module] | None = None
    module: Callable[[nn.Module], Any] | None = None
    options: tuple[str, ...] = ()
    convert: Callable[..., Path] | None = None
    module_options: tuple[str, ...] = ()
    agreement: str | None = None
    family: str = "flow-matching"

    def network(self, tensors: Mapping[str, Tensor], **options: Any) -> nn.Module:
        """The network of an official state dict.

        Raises:
            ValueError: an option that the format does not have, or a format that is no single state dict.
        """
        self.check_options(options, self.options)
        if self.load_network is None:
            raise ValueError(f"a file of {self.name} holds no network")
        return self.load_network(tensors, **options)

    def check_options(self, given: Mapping[str, Any], known: Sequence[str] | None = None) -> None:
        """Refuse options that the format does not have (by default: neither for its network nor for its module).

        Raises:
            ValueError: naming them and those that it has.
        """
        known = [*self.options, *self.module_options] if known is None else list(known)
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{self.name} has no option {', '.join(unknown)}; it has {known}")


def read_state(file: str | Path, weights: Weights | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, float32, without the prefix that data-parallel training adds.

    Args:
        file: ``.safetensors``, or what ``torch.save`` wrote: a state dict, or one inside
            ``{model, ema, opt, args}``, ``{model_dict, optimizer, ...}`` and the like. A pickled
            ``argparse.Namespace`` is allowed, other classes are not. Or a folder with the same content that
            ``torch.distributed.checkpoint`` wrote.
        weights: ``"ema"`` or ``"raw"`` where a file holds both; by default the average if there is one.
            ``"condition"`` is the condition encoder that resumed runs of LFM keep beside the network.

    Raises:
        ValueError: a file that is missing, truncated or of another kind; weights that it does not have; a
            value that is no floating-point tensor; a prefix that only some keys have.
    """
    path = Path(file)
    content = content_of(path)
    state = _unwrap(content, weights, path)
    return {name: _tensor(value, name, path) for name, value in _strip(state, path).items()}


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that every file of a format has.

    Raises:
        ValueError: it is missing, or has another number of axes.
    """
    if name not in tensors:
        raise ValueError(f"the weights have no {name!r}: not a state dict of this format (keys {sorted(tensors)[:5]})")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name!r} must have {dimensions} dimensions, got shape {shape}")
    return shape


def factor(width: int, unit: int) -> float:
    """``width / unit``, as an integer where it is one."""
    return width // unit if width % unit == 0 else width / unit


def digest(file: str | Path) -> str:
    """SHA-256, hexadecimal: of a file, or of the names and digests of the files in a folder, a line each, sorted."""
    path = Path(file)
    if path.is_dir():
        lines = [f"{part.name} {digest(part)}\n" for part in sorted(path.iterdir()) if part.is_file()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def card(
    form: Format, file: str | Path, licences: Sequence[str] = (), *, config: Mapping[str, Any] | None = None
) -> str:
    """Model card of a converted folder: where the weights come from, their licence, how to load them.

    Args:
        form: of the original file.
        file: the original file.
        licences: names of the licence files that lie beside the converted weights.
        config: of the model, where it is used otherwise than by ``sample(n=...)``; see `cards.usage`.
    """
    name = Path(file).resolve().name
    original = "the names and checksums of the original files" if Path(file).is_dir() else "the original file"
    beside = f"\n- Beside these weights: {', '.join(f'`{name}`' for name in licences)}." if licences else ""
    return f"""---
license: {form.licence}
library_name: lightning_flows
tags: [{", ".join(dict.fromkeys((form.family, form.name)))}]
---

# {name}, converted

Weights of `{name}` ({form.source}), converted by `lightning-flows convert {form.name}`. The numbers are the
original ones; names and conventions are those of lightning_flows (time from noise 0 to data 1).

- SHA-256 of {original}: `{digest(file)}`
- Licence of the weights: {form.licence}. {form.licence_note}{beside}

{SAMPLE if config is None else usage(config, FOLDER)}
"""


def content_of(path: Path) -> Any:
    """What a checkpoint file or folder holds; tensors and plain values only.

    Raises:
        ValueError: a file that is missing, truncated or of another kind.
    """
    if path.is_dir():
        return read_distributed(path)
    return load_tensors(path) if path.suffix == ".safetensors" else _unpickle(path)


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"file {path} is no checkpoint, or holds more than tensors and plain values") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"file {path} is truncated or no checkpoint: {error}") from error


def _unwrap(content: Any, weights: Weights | None, path: Path) -> Mapping[str, Any]:
    if weights not in (None, *WRAPPED):
        raise ValueError(f"weights must be one of {list(WRAPPED)} or None, got {weights!r}")
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise ValueError(f"file {path} holds a {type(content).__name__}, not a state dict")
    found = {kind: key for kind, keys in WRAPPED.items() for key in keys if isinstance(content.get(key), Mapping)}
    if not found:
        return _bare(content, weights, path)
    known = ASIDE.union(*WRAPPED.values())
    if unknown := sorted(set(content) - known):
        raise ValueError(f"file {path} holds {unknown} beside the weights, which no converter understands")
    kind = weights or ("ema" if "ema" in found else "raw")
    if kind not in found:
        raise ValueError(f"weights={kind!r}, but file {path} has only {sorted(found)} (keys {sorted(content)})")
    return content[found[kind]]


def _bare(content: Mapping[str, Any], weights: Weights | None, path: Path) -> Mapping[str, Any]:
    if weights is not None:
        raise ValueError(f"weights={weights!r}, but file {path} holds one bare state dict: leave weights out")
    return content


def _strip(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    prefixed = [name.startswith(PREFIX) for name in state]
    if not any(prefixed):
        return dict(state)
    if not all(prefixed):
        bare = sorted(name for name in state if not name.startswith(PREFIX))
        raise ValueError(f"file {path}: only some keys begin with {PREFIX!r}; these do not: {bare[:8]}")
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"file {path}: {name!r} must be a tensor of floating-point numbers, got {kind}")
    return value.detach().float()
