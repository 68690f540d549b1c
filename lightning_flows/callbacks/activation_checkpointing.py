"""Activations that are computed again in the backward pass instead of being kept in memory."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_flows.networks.parallel import checkpoint_blocks, restore_blocks


class ActivationCheckpointing(Callback):
    """Keeps only the input of a block and computes its activations again in the backward pass, during a fit.

    Loss, gradients and random draws are the same, bit for bit; one more forward pass of those blocks is paid for
    the memory of their activations (see `networks.checkpoint_blocks`). Where memory is nearly enough, ``every=2``
    recomputes half of the blocks. It goes with every strategy and with `Compile`, in any order. Names in
    checkpoints stay as they are, and after the fit the network is as it was.

    Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin, 2016).

    Args:
        every: 1 for all blocks of the module's ``network``, 2 for every second one, and so on.

    Raises:
        ValueError: ``every`` below 1; when a fit starts, a module without a ``network``, or one without blocks.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"ActivationCheckpointing: every must be at least 1, got {every}.")
        self.every = every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the blocks, before a strategy shards them."""
        if stage == "fit":
            checkpoint_blocks(network_of(pl_module, self), self.every)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the network as it was."""
        restore(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the network as it was."""
        restore(pl_module)


def network_of(pl_module: L.LightningModule, callback: Callback) -> nn.Module:
    """The network of a module.

    Raises:
        ValueError: the module has none.
    """
    network = getattr(pl_module, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{type(callback).__name__} needs a module with a network; {type(pl_module).__name__} has none."
        )
    return network


def restore(pl_module: L.LightningModule) -> None:
    """Undo what was done to the blocks of the module's network, if it has one."""
    if isinstance(getattr(pl_module, "network", None), nn.Module):
        restore_blocks(pl_module.network)
