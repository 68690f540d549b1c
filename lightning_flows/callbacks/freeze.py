"""Frozen parts, for the whole run or until a step.

Part by part, the last ones first, is "gradual unfreezing": one `Freeze` for each part with its own step.

References:
    Universal Language Model Fine-tuning for Text Classification (Howard and Ruder, 2018), section 3.3.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_flows.networks.parts import matching


class Freeze(Callback):
    """Keeps parts of the module as they are during a fit.

    Without ``until_step`` the parameters need no gradient and are no part of the optimizer: no memory, less time. After
    the fit they are trainable again.

    With it, the optimizer holds them from the start, but their gradients are dropped after every backward pass, before
    they are unscaled or clipped, until that many optimizer steps are done: they are neither moved nor decayed, and
    their moments begin when they are let go. The backward pass is paid all the same. In return nothing about the
    optimizer changes on the way: a run resumed before, at or after that step equals one that never stopped, and so do
    runs on several devices.

    A frozen part still computes: dropout drops (labels too), and running statistics of normalisations move, unless
    ``eval_mode`` is set; then submodules all of whose parameters are frozen are in eval mode meanwhile. An
    average of weights (`EMA`) leaves frozen values where they are.

    Args:
        parts: names or patterns of parameters (``network.blocks.0.*``).
        until_step: optimizer steps (``trainer.global_step``) during which they are frozen; None for always.
        eval_mode: put frozen submodules into eval mode as well.

    Raises:
        ValueError: no part, or a step below 1; when the fit starts: a pattern that names no parameter, or nothing
            left to train.
    """

    def __init__(self, parts: list[str], until_step: int | None = None, *, eval_mode: bool = False) -> None:
        if not parts:
            raise ValueError(f"Freeze: parts must name parameters, got {parts!r}")
        if until_step is not None and until_step < 1:
            raise ValueError(f"Freeze: until_step must be at least 1 (or None for always), got {until_step}")
        self.parts, self.until_step, self.eval_mode = parts, until_step, eval_mode
        self._names: set[str] = set()
        self._switched: set[str] = set()  # what needed a gradient before
        self._params: list[nn.Parameter] = []
        self._quiet: list[nn.Module] = []  # what was in training mode before

    @property
    def state_key(self) -> str:
        """One for each part and step, as a trainer may have several."""
        return self._generate_state_key(parts=self.parts, until_step=self.until_step)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the parameters, before the optimizer is made."""
        if stage != "fit":
            return
        self._let_go(pl_module)  # of a fit that was interrupted
        named = dict(pl_module.named_parameters(remove_duplicate=False))
        self._names = set(matching(named, self.parts, argument="Freeze.parts"))
        trainable = {name for name, parameter in named.items() if parameter.requires_grad}
        if trainable <= self._names:
            raise ValueError(f"Freeze: parts={self.parts} leaves no parameter of {type(pl_module).__name__} to train")
        if self.until_step is None:
            self._switched = trainable & self._names
            for name in self._switched:
                named[name].requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the parameters as the strategy has made them."""
        self._params = [p for name, p in pl_module.named_parameters(remove_duplicate=False) if name in self._names]
        if self.eval_mode and self._holds(trainer):
            self._silence(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Training mode again from the first step in which the parts are trained."""
        if self._quiet and not self._holds(trainer):
            self._awake()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the gradients of parts that wait for their step."""
        if self.until_step is not None and self._holds(trainer):
            for parameter in self._params:
                parameter.grad = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._let_go(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if stage == "fit":
            self._let_go(pl_module)

    def _holds(self, trainer: L.Trainer) -> bool:
        return self.until_step is None or trainer.global_step < self.until_step

    def _silence(self, pl_module: L.LightningModule) -> None:
        for name, part in pl_module.named_modules():
            prefix = f"{name}." if name else ""
            own = [prefix + inner for inner, _ in part.named_parameters(remove_duplicate=False)]
            if own and self._names.issuperset(own):
                self._quiet += [inner for inner in part.modules() if inner.training]
                part.eval()

    def _awake(self) -> None:
        for part in self._quiet:
            part.training = True
        self._quiet = []

    def _let_go(self, pl_module: L.LightningModule) -> None:
        self._awake()
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if name in self._switched:
                parameter.requires_grad_(True)
        self._switched, self._params = set(), []
