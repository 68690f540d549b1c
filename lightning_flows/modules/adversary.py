r"""The critic of an autoencoder: hinge losses, and the weight that balances them against the reconstruction.

.. math::

    L_D = \operatorname{mean} \max(0, 1 - D(x)) + \operatorname{mean} \max(0, 1 + D(\hat x)), \qquad
    L_G = -\operatorname{mean} D(\hat x), \qquad
    \lambda = \frac{\lVert \nabla_W L_{rec} \rVert}{\lVert \nabla_W L_G \rVert + 10^{-4}},

W being the weight of the decoder's last layer.

References:
    Taming Transformers for High-Resolution Image Synthesis (Esser, Rombach, Ommer, 2021).
    Geometric GAN (Lim, Ye, 2017): the hinge losses.
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_flows.store import Recorded

MOST = 1e4  # of the balance: where the critic's gradient vanishes


class Adversary(Recorded, nn.Module):
    """A critic with its part in the loss of an autoencoder.

    Args:
        network: images (B, C, H, W) -> scores (B, 1, h, w), large for real.
        weight: of its term.
        start_step: batches before the critic is trained and heard.
        warmup_steps: batches over which its term then rises to ``weight``.
        balance: scale its term so that its gradient at the decoder's last layer is as large as the reconstruction's.
        gradient_clip_val: largest norm of the gradients of the autoencoder and of the critic, None for none (the
            trainer's own clipping does not work with two optimizers).
        optimizer: of the critic; that of the autoencoder by default.

    Raises:
        ValueError: a negative number.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weight: float = 0.5,
        start_step: int = 0,
        warmup_steps: int = 0,
        balance: bool = True,
        gradient_clip_val: float | None = None,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__()
        given = {"weight": weight, "start_step": start_step, "warmup_steps": warmup_steps}
        for name, value in (given | {"gradient_clip_val": gradient_clip_val or 0.0}).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.network, self.weight, self.balance = network, weight, balance
        self.start_step, self.warmup_steps = start_step, warmup_steps
        self.gradient_clip_val, self.make_optimizer = gradient_clip_val, optimizer

    def strength(self, step: int) -> float:
        """Weight of the term in batch ``step`` (from 0): 0 before ``start_step``, then rising to ``weight``."""
        done = step - self.start_step
        if done < 0:
            return 0.0
        return self.weight * min(1.0, (done + 1) / max(1, self.warmup_steps))

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Hinge loss of the critic, a scalar; ``fake`` (B, C, H, W) gets no gradient."""
        truth, lie = self.network(real.detach()), self.network(fake.detach())
        return (nn.functional.relu(1 - truth).mean() + nn.functional.relu(1 + lie).mean()) / 2

    def term(self, fake: Tensor, reconstruction: Tensor, last_layer: Tensor) -> Tensor:
        """The balanced term of the autoencoder's loss, a scalar, before its strength.

        Args:
            fake: reconstructions (B, C, H, W).
            reconstruction: their loss, a scalar.
            last_layer: weight of the decoder's last layer.
        """
        loss = -self.network(fake).float().mean()
        return loss * self._balance(reconstruction, loss, last_layer) if self.balance else loss

    def _balance(self, reconstruction: Tensor, loss: Tensor, last_layer: Tensor) -> Tensor:
        wanted, found = (
            torch.autograd.grad(value, last_layer, retain_graph=True)[0].norm() for value in (reconstruction, loss)
        )
        return (wanted / (found + 1e-4)).clamp(0, MOST).detach()
