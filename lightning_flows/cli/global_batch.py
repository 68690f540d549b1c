"""The global batch of a recipe: the number of samples in one optimizer step, over all devices.

    global batch = data.batch_size x devices x nodes x accumulate_grad_batches

A published configuration is reproduced only at its own global batch. A recipe says it, and a fit on other devices
than the recipe was written for stops before anything is loaded, with what to set.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def check_global_batch(wanted: int | None, trainer: L.Trainer, datamodule: L.LightningDataModule) -> None:
    """Stop unless trainer and data make the global batch that the recipe asks for.

    Args:
        wanted: samples in one optimizer step; None asks for nothing.
        trainer: its devices are known, also for ``devices="auto"``.
        datamodule: its ``batch_size`` counts the samples of one device.

    Raises:
        ValueError: another global batch; says all factors and what to set.
    """
    if wanted is None:
        return
    if wanted < 1:
        raise ValueError(f"--global_batch must be at least 1, got {wanted}")
    size = getattr(datamodule, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(f"--global_batch {wanted} cannot be checked: {type(datamodule).__name__} has no batch_size")
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if any(len(scheduler.scheduling) > 1 for scheduler in schedulers):
        raise ValueError(f"--global_batch {wanted} cannot hold while GradientAccumulationScheduler changes it")
    _compare(wanted, size, trainer.num_devices, trainer.num_nodes, trainer.accumulate_grad_batches)


def _compare(wanted: int, size: int, devices: int, nodes: int, accumulate: int) -> None:
    found = size * devices * nodes * accumulate
    if found == wanted:
        return
    raise ValueError(
        f"--global_batch is {wanted}, but data.batch_size {size} x devices {devices} x nodes {nodes} x "
        f"accumulate_grad_batches {accumulate} = {found}: {_remedy(wanted, size, devices * nodes, accumulate)}, "
        f"or say another batch with --global_batch {found}"
    )


def _remedy(wanted: int, size: int, devices: int, accumulate: int) -> str:
    """What to set, keeping as much as possible of what was given."""
    ways = []
    if wanted % (size * devices) == 0:
        ways.append(f"--trainer.accumulate_grad_batches {wanted // (size * devices)}")
    if wanted % (devices * accumulate) == 0:
        ways.append(f"--data.batch_size {wanted // (devices * accumulate)}")
    if not ways:
        ways.append(f"choose factors of {wanted} (it cannot be divided over {devices} devices x {accumulate})")
    return "set " + " or ".join(ways) if ways[0].startswith("--") else ways[0]
