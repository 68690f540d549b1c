"""Fully sharded training (FSDP2) whose checkpoints are those of any other run.

    trainer = L.Trainer(strategy=FSDP2(), devices=8)        # on the command line --trainer.strategy fsdp2

Parameters, gradients and optimizer state are spread over all devices; `networks.shard_blocks` says how. A checkpoint
is one ordinary file with whole tensors, in the layout that one process or DDP writes and reads: a run goes on
under another strategy, and `from_pretrained` reads its checkpoints, with nothing to convert.

References:
    ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (Rajbhandari et al., 2020).
    PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (Zhao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_flows.networks.parallel import sharded_like, whole


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` over all devices, with ordinary checkpoints.

    The module spreads itself in ``configure_model`` (ours do). Every process reads a whole checkpoint, through memory
    maps, and keeps its part; a save collects tensor by tensor in the memory of the first process's host.

    Args:
        process_group_backend: such as ``"nccl"`` or ``"gloo"``; chosen by the device if None.
        timeout: of a collective operation.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Sets the size of the mesh: Lightning's ``auto`` would not shard within a node."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    # ------------------------------------------------------------------ saving: whole tensors, on rank 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, on the CPU of rank 0; empty on the others. Every rank must call it."""
        assert self.lightning_module is not None
        state = whole(self.lightning_module.state_dict())
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole optimizer state, numbered as torch numbers it, on rank 0. Every rank must call it."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = whole(plain.state_dict())
        return state if self.is_global_zero else {}

    # ------------------------------------------------------------------ loading: each rank keeps its part

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The trainer restores optimizers, after the weights."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, mapped into memory where it is a local one."""
        if not Path(checkpoint_path).is_file():
            return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)
        return torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's part of whole weights.

        Raises:
            RuntimeError: names that are missing or unknown, or other shapes.
        """
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: sharded_like(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's part of whole optimizer states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**state, "state": _parts(optimizer, state["state"])})


def _parts(optimizer: Optimizer, state: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """State of each parameter, tensors of its shape spread as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        i: {name: _part(value, parameters[i]) for name, value in of_parameter.items()}
        for i, of_parameter in state.items()
    }


def _part(value: Any, parameter: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return sharded_like(value, parameter) if same else value


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded over all devices, ordinary checkpoints.")
