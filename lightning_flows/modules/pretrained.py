"""Weights in: a model from weights (`from_pretrained`), a run from weights (`init_from`).

Resuming a run is a third thing, with a third word: ``Trainer.fit(ckpt_path=...)`` restores the optimizer, the step and
the data order as well.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_flows.codecs import Identity
from lightning_flows.networks.adapter_record import RECORD, plain_state
from lightning_flows.networks.resize_rules import misread, resized, rules_of
from lightning_flows.store import (
    WEIGHTS,
    build,
    check,
    config_of,
    load_into,
    load_tensors,
    override,
    read_config,
    resolve,
)

# Of the cache of the Hub's client.
_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


def from_pretrained(
    ref: str | Path,
    *,
    base: type[L.LightningModule] = L.LightningModule,
    revision: str | None = None,
    reinit: Sequence[str] = (),
    resize: bool = False,
    trust_remote_code: bool = False,
    device: Any = None,
    **overrides: Any,
) -> Any:
    """A model with its weights, in eval mode.

    Args:
        ref: a folder, a zoo id, ``org/name[@revision]`` on the Hugging Face Hub, or a checkpoint (``.ckpt``) of a run,
            of which the averaged weights are taken.
        base: class of which the model must be.
        revision: of the Hub repository.
        reinit: names or patterns of tensors that keep their fresh values, for shapes that were changed by an override.
        resize: fit tensors to overridden sizes (patches, channels, classes) where there is a rule; see `init_from`.
        trust_remote_code: accept classes of other packages in the config. Only for folders that you wrote or read.
        device: where the model goes.
        overrides: changed constructor arguments, by their dotted place (``{"network.num_classes": 7}``) or by their
            bare name where it is unique in the config (``num_classes=7``).

    Returns:
        The module; its attribute ``origin`` says where its weights came from.

    Raises:
        ValueError: a config that names foreign classes, tensors that are missing, unknown or of another shape (the
            message lists them), an override that does not exist.
    """
    folder = None if _is_checkpoint(ref) else resolve(ref, revision=revision)
    source, tensors = _read(ref, folder)
    config = override(source, **overrides)
    check(config, base, trust_remote_code=trust_remote_code)
    model = build(config, base, trust_remote_code=trust_remote_code)
    _load(model, tensors, reinit, str(ref), source, resize=resize)
    model.origin = origin_of(f"{ref}@{revision}" if revision else ref, folder)
    return model.to(device).eval() if device is not None else model.eval()


def init_from(
    model: L.LightningModule, ref: str | Path, *, reinit: Sequence[str] = (), resize: bool = False
) -> list[str]:
    """Start a new run of ``model`` from published weights; its own config stays as it is.

    With ``resize`` the networks' rules (`networks.resizing`) fit tensors of other sizes, and each change is logged.
    The statistics of latents (``latent_shift``, ``latent_scale``) of another codec or of other channels then stay
    fresh, so that ``standardize`` measures them anew.

    Args:
        model: built with the shapes that the run wants.
        ref: a folder, a zoo id, ``org/name[@revision]``, or a checkpoint file (``.ckpt``) of a run.
        reinit: names or patterns of tensors that keep their fresh values; they are not resized.
        resize: fit tensors of other sizes where there is a rule.

    Returns:
        Names of the tensors that kept their fresh values.

    Raises:
        ValueError: tensors that do not fit, have no rule and are not named in ``reinit``; a rule that refuses.
    """
    folder = None if _is_checkpoint(ref) else resolve(ref)
    source, tensors = _read(ref, folder)
    fresh = _load(model, tensors, reinit, str(ref), source, resize=resize)
    model.origin = origin_of(ref, folder)
    return fresh


def origin_of(ref: str | Path, folder: Path | None) -> str:
    """Where weights come from, for those that build on them: ``org/name@commit`` where the Hub's client knows it."""
    found = _SNAPSHOT.search(folder.as_posix()) if folder else None
    return f"{found['org']}/{found['name']}@{found['commit']}" if found else str(ref)


def _read(ref: str | Path, folder: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a folder, or of the checkpoint that ``ref`` is."""
    return read_checkpoint(ref) if folder is None else (read_config(folder), load_tensors(folder / WEIGHTS))


def read_checkpoint(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and (averaged) weights of a run's checkpoint; adapters in use are merged.

    Raises:
        ValueError: no such file, a damaged one, or one that does not name its model.
    """
    if not Path(file).is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        tensors, config = plain_state(content["state_dict"], content.get(RECORD)), dict(content["hyper_parameters"])
        path = config.pop("_class_path")
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} is damaged or no checkpoint of this package ({reason})") from error
    config.pop("_instantiator", None)
    return {"class_path": path, "init_args": config}, tensors


def _is_checkpoint(ref: str | Path) -> bool:
    return Path(ref).suffix == ".ckpt" or Path(ref).is_file()


def _load(
    model: L.LightningModule,
    tensors: dict[str, Tensor],
    reinit: Sequence[str],
    ref: str,
    source: dict[str, Any],
    *,
    resize: bool,
) -> list[str]:
    """Copy tensors of the config ``source`` into a model."""
    try:
        fitted, lines = _fitted(model, tensors, reinit, source, resize=resize)
        stale = _foreign_statistics(model, tensors, source) if resize else []
        fresh = load_into(model, fitted, reinit=[*reinit, *stale] if stale else reinit)
    except ValueError as error:
        hint = " resize=True fits other sizes where there is a rule." if "has shape" in str(error) else ""
        raise ValueError(f"{ref}: {error}{'' if resize else hint}") from None
    for line in lines:
        rank_zero_info(f"{ref}: resized {line}")
    if fresh:
        rank_zero_info(f"{ref}: {len(fresh)} tensors start afresh: {', '.join(fresh)}")
    model.started_afresh = fresh
    return fresh


def _fitted(
    model: L.LightningModule,
    tensors: dict[str, Tensor],
    reinit: Sequence[str],
    source: dict[str, Any],
    *,
    resize: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors for the model's sizes, and what was changed.

    Raises:
        ValueError: a rule refuses; or without ``resize``, a tensor that has its shape by chance: three classes and
            "no label" have as many rows as four classes.
    """
    rules = rules_of(model, source)
    keep = {name for name in rules if any(fnmatch.fnmatchcase(name, pattern) for pattern in reinit)}
    if resize:
        return resized(tensors, rules, keep=keep)
    if names := [name for name in misread(tensors, model.state_dict(), rules) if name not in keep]:
        raise ValueError(
            f"{', '.join(names)}: of the same shape, but of another meaning, as the sizes in the config say. "
            "Give resize=True, or start afresh by reinit=[...]."
        )
    return tensors, []


def _foreign_statistics(model: L.LightningModule, tensors: dict[str, Tensor], source: dict[str, Any]) -> list[str]:
    """Names of latent statistics that say nothing about this model's latents: of another codec, of other channels."""
    state = model.state_dict()
    found = [name for name in ("latent_shift", "latent_scale") if name in state and name in tensors]
    if not found:
        return []
    theirs = source["init_args"].get("codec") or config_of(Identity())
    same_codec = config_of(getattr(model, "codec", Identity())) == theirs
    if same_codec and all(state[name].shape == tensors[name].shape for name in found):
        return []
    return found
