r"""Training an image autoencoder with a Gaussian posterior, whose latents a flow then models.

.. math:: L = \operatorname{mean} |x - \hat x|^p + w_{kl} \frac{\mathrm{KL}(q(z|x) \,\|\, N(0, I))}{D}
    + w_p\, d_{perceptual}(x, \hat x) + w_a\, L_G(\hat x)

with D values in an image, so that ``kl_weight`` means what it means where the first term is a sum over pixels.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
    Auto-Encoding Variational Bayes (Kingma, Welling, 2014).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_flows.flow import Losses, Noise, StepNoise, key
from lightning_flows.modules.adversary import Adversary
from lightning_flows.modules.base import clock, evaluation
from lightning_flows.modules.perceptual import Perceptual
from lightning_flows.modules.publishable import Publishable, run_seed

Reconstruction = Literal["absolute", "squared"]


class KLAutoencoder(Publishable):
    """An autoencoder with a Gaussian posterior.

    With an ``adversary`` two optimizers take turns: ``trainer.max_steps`` then counts both, the trainer's
    ``gradient_clip_val`` must be left out, and DDP needs ``strategy=ddp_find_unused_parameters_true``.

    Args:
        network: `codecs.KLNetwork`, or a module with its ``encode_moments``, ``decode`` and ``latent_shape``.
        reconstruction: of the pixels: ``"absolute"`` or ``"squared"`` error.
        kl_weight: of the divergence of the posterior from a standard normal, in nats per value of an image.
        perceptual: distance in the features of a frozen network.
        adversary: critic of patches.
        optimizer: see `Publishable`.
        lr_scheduler: see `Publishable`.

    Raises:
        ValueError: an unknown reconstruction, a negative weight.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        reconstruction: Reconstruction = "absolute",
        kl_weight: float = 1e-6,
        perceptual: Perceptual | None = None,
        adversary: Adversary | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if reconstruction not in get_args(Reconstruction):
            raise ValueError(f"reconstruction must be one of {get_args(Reconstruction)}, got {reconstruction!r}")
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
        self.network, self.reconstruction, self.kl_weight = network, reconstruction, kl_weight
        self.perceptual, self.adversary = perceptual, adversary
        self.automatic_optimization = adversary is None

    def shard(self, mesh: DeviceMesh) -> None:
        """An autoencoder is called by its halves and is small: it is not spread.

        Raises:
            ValueError: always.
        """
        raise ValueError("KLAutoencoder is not sharded: use strategy='ddp'")

    # ------------------------------------------------------------------ the codec

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1]: drawn with ``noise``, else the posterior's mean."""
        mean, log_variance = self.network.encode_moments(x)
        if noise is None:
            return mean
        return mean + torch.exp(0.5 * log_variance) * noise.normal("posterior", like=mean)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w), about [-1, 1], not clipped."""
        return self.network.decode(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images of the posterior's mean of images, both (B, C, H, W); in eval mode."""
        with evaluation(self):
            return self.decode(self.encode(x))

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) of the latent for images (C, H, W)."""
        return self.network.latent_shape(shape)

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Any, noise: StepNoise) -> Losses:
        """Per-sample losses without the adversary's term; logs hold each term, (B,), unweighted."""
        return self._losses(self.data_of(batch), noise)[0]

    def _losses(self, x: Tensor, noise: Noise) -> tuple[Losses, Tensor]:
        mean, log_variance = self.network.encode_moments(x)
        z = mean + torch.exp(0.5 * log_variance) * noise.normal("posterior", like=mean)
        y = self.decode(z)
        pixels, divergence = self._pixels(x, y), kl_divergence(mean, log_variance) / x[0].numel()
        loss, logs = pixels + self.kl_weight * divergence, {"pixels": pixels, "kl": divergence}
        if self.perceptual is not None:
            logs["perceptual"] = self.perceptual(x, y)
            loss = loss + self.perceptual.weight * logs["perceptual"]
        return Losses(loss, logs), y

    def _pixels(self, x: Tensor, y: Tensor) -> Tensor:
        error = (x.float() - y.float()).abs()
        return (error if self.reconstruction == "absolute" else error.square()).flatten(1).mean(1)  # (B,)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Loss of a batch; with an adversary, a step of both optimizers. Logs ``train/loss`` and its terms."""
        x = self.data_of(batch)
        losses, y = self._losses(x, self.training_noise())
        loss = losses.loss.mean()
        self._log("train", losses)
        if self.adversary is None:
            return loss
        self._take_turns(x, y, loss)
        return None

    def _take_turns(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        adversary, (own, critic) = self.adversary, self.optimizers()
        strength = adversary.strength(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        if strength:
            term = adversary.term(y, loss, self.network.last_layer)
            self.log("train/adversarial", term)
            loss = loss + strength * term
        self._step(own, loss)
        if strength:
            critic_loss = adversary.critic_loss(x, y)
            self.log("train/critic", critic_loss)
            self._step(critic, critic_loss)
        for scheduler in self._schedulers()[: 2 if strength else 1]:
            scheduler.step()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()  # also what the other's loss left in these parameters
        self.manual_backward(loss)
        if self.adversary.gradient_clip_val:
            self.clip_gradients(optimizer, self.adversary.gradient_clip_val, "norm")
        optimizer.step()

    def _schedulers(self) -> list[Any]:
        found = self.lr_schedulers()
        return [] if found is None else found if isinstance(found, list) else [found]

    def configure_optimizers(self) -> Any:
        """One optimizer, or with an adversary two: of the network and of the critic, each with the scheduler."""
        if self.adversary is None:
            return super().configure_optimizers()
        makers = (self.make_optimizer, self.adversary.make_optimizer or self.make_optimizer)
        parts = (self.network, self.adversary.network)
        optimizers = [self.optimizer_over(part, make) for make, part in zip(makers, parts, strict=True)]
        if self.make_lr_scheduler is None:
            return optimizers
        return optimizers, [self.make_lr_scheduler(optimizer) for optimizer in optimizers]

    # ------------------------------------------------------------------ measuring

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Losses, with the same noise at every validation, and the reconstruction; logs ``val/loss``, ``val/psnr``."""
        noise = StepNoise(key("validation", run_seed()), batch_idx, self.global_rank)
        losses = self.losses(batch, noise)
        self._log("val", losses)
        outputs = self.test_step(batch, batch_idx)
        error = (outputs["real"] - outputs["sample"]).square().mean() / 4  # of values in [0, 1]
        self.log("val/psnr", -10 * error.log10(), batch_size=len(losses.loss), sync_dist=True, prog_bar=True)
        return {"loss": losses.loss.mean(), "losses": losses.loss, **losses.logs, **outputs}

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Images beside their reconstructions from the posterior's mean, clipped to [-1, 1], and that mean."""
        x = self.data_of(batch)
        start = clock(x.device)
        z = self.encode(x)
        sample = self.decode(z).float().clamp(-1, 1)
        seconds = clock(x.device) - start
        return {
            "real": x,
            "sample": sample,
            "latent": z,
            "label": batch.get("label"),
            "index": batch.get("index"),
            "nfe": 1,
            "seconds": seconds,
        }

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """An autoencoder has nothing to draw.

        Raises:
            ValueError: always; it names what to use.
        """
        raise ValueError("an autoencoder does not sample: use `lightning-flows test` or `reconstruct(x)`")

    def _log(self, stage: str, losses: Losses) -> None:
        size, together = len(losses.loss), stage != "train"
        self.log(f"{stage}/loss", losses.loss.mean(), prog_bar=True, batch_size=size, sync_dist=together)
        for name, value in losses.logs.items():
            self.log(f"{stage}/{name}", value.mean(), batch_size=size, sync_dist=together)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Divergence of N(mean, exp(log_variance)) from N(0, I) in nats, (B,), of maps (B, c, h, w).

    .. math:: \tfrac 12 \sum (\mu^2 + s^2 - 1 - \log s^2)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
