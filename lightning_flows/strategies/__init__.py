"""Floor 3: how a Trainer spreads a module over devices, and how it writes it down."""

from lightning_flows.strategies.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from lightning_flows.strategies.fsdp2 import FSDP2

__all__ = ["AtomicCheckpointIO", "FSDP2", "newest_checkpoint"]
