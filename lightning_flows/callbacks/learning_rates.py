r"""Discriminative learning rates: every part of a pretrained network at its own rate.

.. math:: \eta_i = \eta\, d^{\,L - i}, \qquad i = 0 \ldots L - 1

for block i of L at decay d; what lies before the first block has :math:`\eta\, d^{\,L + 1}`, what lies behind the last
one :math:`\eta`.

References:
    Universal Language Model Fine-tuning for Text Classification (Howard and Ruder, 2018), section 3.2: d = 1/2.6.
    BEiT: BERT Pre-Training of Image Transformers (Bao, Dong, Piao, Wei, 2022): layer-wise decay.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_flows.networks.parts import depths, factors_of


class LearningRates(Callback):
    """Factors on the learning rate of the optimizer, by part and by depth; both multiply where both are given.

    The module's `configure_optimizers` makes a parameter group of each factor (and of what is not decayed); its rate is
    ``factor x lr`` before the scheduler is made, so that a schedule scales every group. (A scheduler that is given
    rates instead of factors, such as ``OneCycleLR``, sets its own.) `LearningRateMonitor` calls the groups ``x0.5`` and
    ``x0.5/vectors``. A resumed run goes on with the rates of its checkpoint.

    Without a callback, set the attribute that it sets: ``model.learning_rates = {"network.blocks.*": 0.1}``.

    Args:
        factors: name or pattern of parameters -> factor; the first that fits counts, what fits none has 1.
        depth_decay: d in (0, 1] for ``module.network``: embeddings learn slowest, the last layer at the full rate.

    Raises:
        ValueError: nothing given, or a decay out of its range; when the fit starts: a pattern that names no parameter,
            a factor that is not positive, a network without blocks, a module that does not read the factors.
    """

    def __init__(self, factors: dict[str, float] | None = None, depth_decay: float | None = None) -> None:
        if not factors and depth_decay is None:
            raise ValueError("LearningRates: give factors, depth_decay, or both")
        if depth_decay is not None and not 0 < depth_decay <= 1:
            raise ValueError(f"LearningRates: depth_decay must lie in (0, 1], got {depth_decay}")
        self.factors, self.depth_decay = dict(factors or {}), depth_decay
        self._before: list[Any] = []  # what the module had before the fit

    def factors_of(self, pl_module: L.LightningModule) -> dict[str, float]:
        """Factor of every parameter of a module, by name."""
        names = [name for name, _ in pl_module.named_parameters()]
        factors = factors_of(names, self.factors, argument="LearningRates.factors")
        if self.depth_decay is not None:
            network = getattr(pl_module, "network", None)
            if not isinstance(network, nn.Module):
                raise ValueError(f"LearningRates: depth_decay needs a network, {type(pl_module).__name__} has none")
            found, blocks = depths(network)
            for name, depth in found.items():
                if f"network.{name}" in factors:
                    factors[f"network.{name}"] *= self.depth_decay ** (blocks + 1 - depth)
        return factors

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the factors on the module, before the optimizer is made."""
        if stage == "fit":
            factors = self.factors_of(pl_module)
            self._before = [getattr(pl_module, "learning_rates", None)]
            pl_module.learning_rates = factors

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a module whose optimizers do not know the factors."""
        if not all("lr_factor" in group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise ValueError(
                f"LearningRates: {type(pl_module).__name__}.configure_optimizers does not read self.learning_rates: "
                "make its optimizers with Publishable.optimizer_over"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._restore(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if stage == "fit":
            self._restore(pl_module)

    def _restore(self, pl_module: L.LightningModule) -> None:
        if self._before:
            pl_module.learning_rates = self._before.pop()
