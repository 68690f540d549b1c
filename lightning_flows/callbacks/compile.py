"""`torch.compile` for a network, in place: the same names, the same numbers up to rounding, fewer kernels."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_flows.callbacks.activation_checkpointing import network_of, restore
from lightning_flows.flow.fields import evaluate
from lightning_flows.networks.parallel import compile_blocks, compile_network

Part = Literal["blocks", "network", "sampling"]
SAMPLING = "compiled_evaluate"  # attribute of a module that samples by `flow.fields.evaluate`


class Compile(Callback):
    """Compiles the module's ``network`` for a fit, a validation, a test or a prediction, and undoes it afterwards.

    - ``"blocks"``: what the repeated blocks do, compiled once for all of one class. Quick to compile, goes with
      every strategy, and speeds up sampling as well, whose calls go through the same blocks.
    - ``"network"``: the network as a whole. Fewer launches, a longer compilation; not under FSDP2.
    - ``"sampling"``: one whole evaluation of the guided field (the conditional and the null branch in one batch,
      the conversion to a velocity, the combination) for samples; training stays as it is. Not under FSDP2. It
      may stand in the list beside another `Compile` for the training. Guidance that remembers its calls
      (`Guidance.stateful`) is evaluated as usual, and so are likelihoods.

    Compilation happens at the first call, for each of: batch size (after the second one, any size), gradients on
    or off. The time of a step is a tensor: no step of a solver compiles again. Guidance in an interval of times
    asks for the time on the host, which cuts the evaluation in two and which ``fullgraph`` refuses.

    Names in checkpoints and published weights stay as they are. Other changes of the network in a callback's
    ``setup`` (adapters) belong before this one in the list.

    Args:
        part: what is compiled.
        mode: of `torch.compile`, such as ``"max-autotune"``.
        dynamic: of `torch.compile`: True for one compilation for all sizes, None finds out.
        fullgraph: of `torch.compile`: an error where a part would be left uncompiled.
        backend: of `torch.compile`.

    Raises:
        ValueError: an unknown part; when a run starts, a module without ``network`` or blocks, one that cannot
            compile its sampling, or a part that the strategy does not allow.
    """

    def __init__(
        self,
        part: Part = "blocks",
        *,
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        backend: str = "inductor",
    ) -> None:
        if part not in get_args(Part):
            raise ValueError(f"Compile: part must be one of {get_args(Part)}, got {part!r}.")
        self.part = part
        self.options: dict[str, Any] = {"mode": mode, "dynamic": dynamic, "fullgraph": fullgraph, "backend": backend}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the network, before a strategy shards it."""
        if self.part == "blocks":
            compile_blocks(network_of(pl_module, self), **self.options)
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(f"Compile: a sharded network is compiled by part='blocks', got part={self.part!r}.")
        if self.part == "network":
            compile_network(network_of(pl_module, self), **self.options)
        elif not hasattr(pl_module, SAMPLING):
            raise ValueError(f"Compile: part='sampling' is not known to {type(pl_module).__name__}.")
        else:
            setattr(pl_module, SAMPLING, torch.compile(evaluate, **self.options))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._undo(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._undo(pl_module)

    def _undo(self, pl_module: L.LightningModule) -> None:
        if self.part == "sampling":
            if hasattr(pl_module, SAMPLING):
                setattr(pl_module, SAMPLING, None)
        else:
            restore(pl_module)
