"""Weights in: a model from weights (`from_pretrained`), a run from weights (`init_from`).

Resuming a run is a third thing, with a third word: ``Trainer.fit(ckpt_path=...)`` restores the optimizer, the step and
the data order as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_flows.store import (
    WEIGHTS,
    build,
    check,
    load_into,
    load_tensors,
    override,
    read_config,
    resolve,
)


def from_pretrained(
    ref: str | Path,
    *,
    base: type[L.LightningModule] = L.LightningModule,
    revision: str | None = None,
    reinit: Sequence[str] = (),
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
        trust_remote_code: accept classes of other packages in the config. Only for folders that you wrote or read.
        device: where the model goes.
        overrides: changed constructor arguments, by their dotted place (``{"network.num_classes": 7}``) or by their
            bare name where it is unique in the config (``num_classes=7``).

    Returns:
        The module.

    Raises:
        ValueError: a config that names foreign classes, tensors that are missing, unknown or of another shape (the
            message lists them), an override that does not exist.
    """
    if _is_checkpoint(ref):
        config, tensors = read_checkpoint(ref)
    else:
        folder = resolve(ref, revision=revision)
        config, tensors = read_config(folder), load_tensors(folder / WEIGHTS)
    config = override(config, **overrides)
    check(config, base, trust_remote_code=trust_remote_code)
    model = build(config, base, trust_remote_code=trust_remote_code)
    _load(model, tensors, reinit, str(ref))
    return model.to(device).eval() if device is not None else model.eval()


def init_from(model: L.LightningModule, ref: str | Path, *, reinit: Sequence[str] = ()) -> list[str]:
    """Start a new run of ``model`` from published weights; its own config stays as it is.

    Args:
        model: built with the shapes that the run wants.
        ref: a folder, a zoo id, ``org/name[@revision]``, or a checkpoint file (``.ckpt``) of a run.
        reinit: names or patterns of tensors that keep their fresh values.

    Returns:
        Names of the tensors that kept their fresh values.

    Raises:
        ValueError: tensors that do not fit and are not named in ``reinit``.
    """
    if _is_checkpoint(ref):
        return _load(model, read_checkpoint(ref)[1], reinit, str(ref))
    return _load(model, load_tensors(resolve(ref) / WEIGHTS), reinit, str(ref))


def read_checkpoint(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and (averaged) weights of a run's checkpoint.

    Raises:
        ValueError: no such file, a damaged one, or one that does not name its model.
    """
    if not Path(file).is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        tensors, config = content["state_dict"], dict(content["hyper_parameters"])
        path = config.pop("_class_path")
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} is damaged or no checkpoint of this package ({reason})") from error
    config.pop("_instantiator", None)
    return {"class_path": path, "init_args": config}, tensors


def _is_checkpoint(ref: str | Path) -> bool:
    return Path(ref).suffix == ".ckpt" or Path(ref).is_file()


def _load(model: L.LightningModule, tensors: dict[str, Tensor], reinit: Sequence[str], ref: str) -> list[str]:
    try:
        fresh = load_into(model, tensors, reinit=reinit)
    except ValueError as error:
        raise ValueError(f"{ref}: {error}") from None
    if fresh:
        rank_zero_info(f"{ref}: {len(fresh)} tensors start afresh: {', '.join(fresh)}")
    return fresh
