"""What the file `metrics.json` holds: figures with everything needed to read them, in one block for each stage."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_flows.networks import Automatic

Json = dict[str, Any]
FILE = "metrics.json"


def setting(trainer: L.Trainer, pl_module: L.LightningModule) -> Json:
    """What samples are drawn with; None where the family has no such thing."""
    guidance, solver = getattr(pl_module, "guidance", None), getattr(pl_module, "solver", None)
    return {
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "guidance_scale": 1.0 if guidance is None else getattr(guidance, "scale", None),
        "guidance": None if guidance is None else repr(guidance),
        "solver": None if solver is None else repr(solver),
        "steps": getattr(pl_module, "steps", None),
        **({"read_steps": pl_module.read_steps} if hasattr(pl_module, "read_steps") else {}),
        **_inverse(pl_module),
        "device": device_name(pl_module.device),
        "precision": str(trainer.precision),
        **({"epoch": trainer.current_epoch, "step": trainer.global_step} if trainer.state.fn == "fit" else {}),
    }


def _inverse(pl_module: L.LightningModule) -> Json:
    """How a normalizing flow turns noise into samples; other families have no such thing."""
    method = {"method": repr(pl_module.method or Automatic())} if hasattr(pl_module, "method") else {}
    return method | ({"denoise": pl_module.denoise} if hasattr(pl_module, "denoise") else {})


def hardware(trainer: L.Trainer, device: torch.device) -> Json:
    """What a time was measured on."""
    return {
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> Json:
    """Of what computed the figures."""
    return {name: version(name) for name in ("lightning-flows", "torch", "lightning")}


def plain(value: Any) -> Any:
    """Tensors, dicts and sequences of them as JSON values; NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """Names and numbers of a plain value: `name`, `name/key`, `name/0`."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, item in items for pair in scalars(f"{name}/{key}", item)]
    return [] if value is None else [(name, float(value))]


def update_json(file: Path, key: str, block: Json) -> None:
    """Replace one block of a JSON file, whole or not at all; the other blocks stay.

    Raises:
        ValueError: the file is no JSON.
    """
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"Evaluation: {file} is no JSON file: {error}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content | {key: block}, indent=2, allow_nan=False) + "\n")
    partial.replace(file)
