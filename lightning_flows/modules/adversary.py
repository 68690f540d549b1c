r"""The critic of an autoencoder: hinge losses, and the weight that balances them against the reconstruction.

.. math::

    L_D = \operatorname{mean} \max(0, 1 - D(x)) + \operatorname{mean} \max(0, 1 + D(\hat x)), \qquad
    L_G = -\operatorname{mean} D(\hat x), \qquad
    \lambda = \frac{\lVert \nabla_W L_{rec} \rVert}{\lVert \nabla_W L_G \rVert + 10^{-4}},

W being the weight of the decoder's last layer. With ``lecam`` the critic's loss has a further term that keeps its
verdicts near running means of the opposite ones, for data too few to satisfy it,

.. math::

    R = \operatorname{mean} \max(0, D(x) - a_{fake})^2 + \operatorname{mean} \max(0, a_{real} - D(\hat x))^2, \qquad
    a \leftarrow d\, a + (1 - d) \operatorname{mean} D,

one-sided: a verdict is held back where it runs away from the mean of the other side.

References:
    Regularizing Generative Adversarial Networks under Limited Data (Tseng, Jiang, Liu, Yang, Yang, 2021): R.
    Taming Transformers for High-Resolution Image Synthesis (Esser, Rombach, Ommer, 2021).
    Geometric GAN (Lim, Ye, 2017): the hinge losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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
        lecam: weight of R in the critic's loss; 0 leaves it and its means out.
        lecam_decay: d of the running means, which begin at 0, the verdict of a fresh critic.

    Attributes:
        real_mean: running mean of verdicts on images, buffer, a scalar; there with ``lecam`` only.
        fake_mean: of those on reconstructions.

    Raises:
        ValueError: a negative number, a decay outside [0, 1).
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
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__()
        given = {"weight": weight, "start_step": start_step, "warmup_steps": warmup_steps, "lecam": lecam}
        for name, value in (given | {"gradient_clip_val": gradient_clip_val or 0.0}).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.network, self.weight, self.balance = network, weight, balance
        self.start_step, self.warmup_steps = start_step, warmup_steps
        self.gradient_clip_val, self.make_optimizer = gradient_clip_val, optimizer
        if not 0 <= lecam_decay < 1:
            raise ValueError(f"lecam_decay must be in [0, 1), got {lecam_decay}")
        self.lecam, self.lecam_decay = lecam, lecam_decay
        if lecam:  # weights of a critic without it have no means to load
            self.register_buffer("real_mean", torch.zeros(()))
            self.register_buffer("fake_mean", torch.zeros(()))

    def strength(self, step: int) -> float:
        """Weight of the term in batch ``step`` (from 0): 0 before ``start_step``, then rising to ``weight``."""
        done = step - self.start_step
        if done < 0:
            return 0.0
        return self.weight * min(1.0, (done + 1) / max(1, self.warmup_steps))

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of the critic in a step of training, a scalar; ``fake`` (B, C, H, W) gets no gradient."""
        truth, lie = self.network(real.detach()).float(), self.network(fake.detach()).float()
        hinge = (nn.functional.relu(1 - truth).mean() + nn.functional.relu(1 + lie).mean()) / 2
        return hinge + self.lecam * self._distance_of_means(truth, lie) if self.lecam else hinge

    def _distance_of_means(self, truth: Tensor, lie: Tensor) -> Tensor:
        """R with the means of former steps, which then take in the verdicts (B, 1, h, w) of all devices."""
        a_real, a_fake = self.real_mean.clone(), self.fake_mean.clone()
        found = torch.stack([truth.detach().mean(), lie.detach().mean()])
        if dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        for mean, value in zip((self.real_mean, self.fake_mean), found, strict=True):
            mean.lerp_(value, 1 - self.lecam_decay)
        relu = nn.functional.relu
        return relu(truth - a_fake).square().mean() + relu(a_real - lie).square().mean()

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
