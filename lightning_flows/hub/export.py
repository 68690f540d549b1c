"""A run as a folder of weights: what a checkpoint holds, without what only training needs."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer

from lightning_flows.hub.cards import METRICS, card
from lightning_flows.modules.pretrained import read_checkpoint
from lightning_flows.store import build, check, config_of, in_16_bits, save_folder

RECIPE = "recipe.yaml"
RUN_CONFIG = "config.yaml"
# Of a run's configuration, what belongs to one run on one machine and not to its recipe.
_OF_THE_RUN = ("run_name", "ckpt_path", "weights", "reinit", "weights_only")
_DATA = "LIGHTNING_FLOWS_DATA"  # names the folder of the data sets on a machine; recipes are written with it
_OF_THE_MACHINE = ("default_root_dir", "logger", "devices", "num_nodes", "accelerator")


def export_run(
    run: Path,
    out: Path,
    *,
    licence: str,
    ckpt: Path,
    summary: str = "",
    command: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write the averaged weights of a run with config, recipe, card and metrics.

    Args:
        run: folder of the run.
        out: folder to write; its files appear whole or not at all.
        licence: of the weights.
        ckpt: checkpoint of the run.
        summary: what the model is, for the card.
        command: gives the figures of the card again.
        dtype: in which large tensors are stored, ``"float32"``, ``"float16"`` or ``"bfloat16"``; they are loaded
            as float32 from each of them, and the card says it.

    Returns:
        ``out``.

    Raises:
        ValueError: the run has no configuration, the checkpoint does not exist or was not written by this package,
            or the dtype is unknown or too narrow for the weights.
    """
    if not (run / RUN_CONFIG).is_file():
        raise ValueError(f"{run} holds no {RUN_CONFIG}: it is not the folder of a fit")
    config, tensors = read_checkpoint(ckpt)
    check(config)
    with torch.device("meta"):
        config = config_of(build(config))  # arguments that are younger than the run get their defaults
    if dtype != "float32":
        tensors = in_16_bits(tensors, dtype)
    options = yaml.safe_load((run / RUN_CONFIG).read_text())
    metrics = json.loads((run / METRICS).read_text()) if (run / METRICS).is_file() else {}
    text = card(
        config,
        metrics,
        licence=licence,
        model_id=out.resolve().name,
        summary=summary,
        data=_data_name(options),
        base_model=options.get("init_from"),
        command=command,
        dtype=dtype,
    )
    files = {RECIPE: recipe_of(options), "README.md": text}
    if metrics:
        files[METRICS] = json.dumps(metrics, indent=2) + "\n"
    save_folder(out, config, tensors, files)
    return out


def recipe_of(options: Mapping[str, Any]) -> str:
    """YAML of a run's configuration without what belongs to one run or one machine.

    Nulls that are defaults are left out, others stay.

    Data under the folder that ``LIGHTNING_FLOWS_DATA`` names are written as recipes write them:
    ``${oc.env:LIGHTNING_FLOWS_DATA,data}/...``.
    """
    kept = {name: value for name, value in options.items() if name not in _OF_THE_RUN}
    kept["trainer"] = {name: value for name, value in kept.get("trainer", {}).items() if name not in _OF_THE_MACHINE}
    for callback in kept["trainer"].get("callbacks") or []:
        callback.get("init_args", {}).pop("dirpath", None)
    if root := os.environ.get(_DATA, "").rstrip("/"):
        kept["data"] = _by_name(kept.get("data"), root)
    said = _said(kept, {}) | {"trainer": _said(kept["trainer"], _defaults(Trainer))}
    return yaml.safe_dump(said, sort_keys=False, width=110)


def _by_name(value: Any, root: str) -> Any:
    """The value with the folder of the data sets named by its variable."""
    if isinstance(value, Mapping):
        return {key: _by_name(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_name(item, root) for item in value]
    inside = isinstance(value, str) and f"{value}/".startswith(f"{root}/")
    return f"${{oc.env:{_DATA},data}}{value[len(root) :]}" if inside else value


def _said(value: Any, defaults: Mapping[str, Any]) -> Any:
    """The value without those nulls that are the defaults of its class (of unknown arguments: without nulls)."""
    if isinstance(value, list):
        return [_said(item, {}) for item in value]
    if not isinstance(value, dict):
        return value
    inside = {"init_args": _defaults(_class_of(value["class_path"]))} if "class_path" in value else {}
    return {
        key: _said(item, inside.get(key, {}))
        for key, item in value.items()
        if item is not None or defaults.get(key) is not None
    }


def _defaults(cls: type | None) -> dict[str, Any]:
    """Defaults of a constructor's arguments, those of its base classes included."""
    parents = [] if cls is None else [base for base in cls.__mro__ if "__init__" in vars(base)]
    found: dict[str, Any] = {}
    for base in reversed(parents):
        try:
            found |= {name: p.default for name, p in inspect.signature(base.__init__).parameters.items()}
        except (TypeError, ValueError):  # a constructor in C has no signature
            continue
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def _class_of(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)  # what the run used is imported


def _data_name(options: Mapping[str, Any]) -> str:
    return str((options.get("data") or {}).get("class_path", "")).rpartition(".")[2].lower()
