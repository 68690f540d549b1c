r"""Training an image autoencoder with a Gaussian posterior, whose latents a flow then models.

.. math:: L = \operatorname{mean} |x - \hat x|^p + w_{kl} \frac{\mathrm{KL}(q(z|x) \,\|\, N(0, I))}{D}
    + w_p\, d_{perceptual}(x, \hat x) + w_a\, L_G(\hat x)

with D values in an image, so that ``kl_weight`` means what it means where the first term is a sum over pixels.

The decoder alone can be trained further on noisy latents, with the encoder as it is: a normalizing flow that was
trained on latents with noise draws latents with noise, and such a decoder turns them into clean images,

.. math:: \hat x = D(\mu(x) + s(x)\, \epsilon + \sigma\, \epsilon'), \qquad \epsilon, \epsilon' \sim N(0, I).

References:
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu, Chen, Berthelot, Zheng, Wang,
    Zhang, Dinh, Bautista, Susskind, Zhai, 2025): the decoder of noisy latents.
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
    Auto-Encoding Variational Bayes (Kingma, Welling, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_flows.flow import Losses, Noise, SampleNoise, StepNoise, key
from lightning_flows.modules.adversary import Adversary
from lightning_flows.modules.base import clock, evaluation
from lightning_flows.modules.decoder_finetuning import Trained, deviations, frozen_parts, with_noise
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
        kl_weight: of the divergence of the posterior from a standard normal, in nats per value of an image; without
            meaning where the decoder alone is trained.
        trained: ``"all"``, or ``"decoder"``: what encodes is frozen (no gradient, no part of the optimizer or of an
            average, eval mode, float32), so that latents cached before stay valid, and the divergence is left out.
        latent_noise: deviation of the noise on what is decoded in training: one number, or one for each channel.
            It counts in units of the codec's latents, as those of the flow do: the network's own latent u becomes
            ``u + latent_noise / scaling_factor * normal``. A flow that adds noise of deviation sigma to
            ``((u - shift) * scaling_factor - latent_shift) * latent_scale`` wants ``sigma / latent_scale`` here, which
            is sigma itself unless the flow standardises its latents. With ``trained="all"`` a denoising autoencoder.
        perceptual: distance in the features of a frozen network, or several that are added.
        adversary: critic of patches.
        optimizer: see `Publishable`.
        lr_scheduler: see `Publishable`.

    Raises:
        ValueError: an unknown reconstruction or part to train, a negative weight or noise, not one noise for each
            channel, a network that does not say what encodes.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        reconstruction: Reconstruction = "absolute",
        kl_weight: float = 1e-6,
        trained: Trained = "all",
        latent_noise: float | Sequence[float] = 0.0,
        perceptual: Perceptual | Sequence[Perceptual] | None = None,
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
        self.latent_noise = deviations(latent_noise, getattr(network, "latent_channels", None))
        self.perceptual, self.adversary = perceptual, adversary
        self.automatic_optimization = adversary is None
        self._frozen = frozen_parts(network, trained)

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """An autoencoder is called by its halves and is small: it is not spread.

        Raises:
            ValueError: always.
        """
        raise ValueError("KLAutoencoder is not sharded: use strategy='ddp'")

    # ------------------------------------------------------------------ the codec

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1]: drawn with ``noise``, else the posterior's mean."""
        mean, log_variance = self._moments(x)
        return mean if noise is None else _drawn(mean, log_variance, noise)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # A frozen encoder gives the latents that the codec gives: in float32, whatever the decoder is trained in.
        with torch.autocast(x.device.type, enabled=False) if self._frozen else nullcontext():
            return self.network.encode_moments(x)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w), about [-1, 1], not clipped."""
        return self.network.decode(z)

    def noisy(self, z: Tensor, noise: Noise) -> Tensor:
        """Latents with ``latent_noise`` added, as the decoder sees them in training, both (B, c, h, w)."""
        return with_noise(z, self.latent_noise, getattr(self.network, "scaling_factor", 1.0), noise)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What comes back of images, both (B, C, H, W); in eval mode.

        Args:
            x: images in [-1, 1].
            noise: decode a draw from the posterior with ``latent_noise`` added; without it, the posterior's mean.
        """
        with evaluation(self):
            z = self.encode(x, noise)
            return self.decode(z if noise is None else self.noisy(z, noise))

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) of the latent for images (C, H, W)."""
        return self.network.latent_shape(shape)

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Any, noise: StepNoise) -> Losses:
        """Per-sample losses without the adversary's term; logs hold each term, (B,), unweighted."""
        return self._losses(self.data_of(batch), noise)[0]

    def _losses(self, x: Tensor, noise: Noise) -> tuple[Losses, Tensor]:
        mean, log_variance = self._moments(x)
        y = self.decode(self.noisy(_drawn(mean, log_variance, noise), noise))
        loss = self._pixels(x, y)
        logs = {"pixels": loss}
        if not self._frozen:
            logs["kl"] = kl_divergence(mean, log_variance) / x[0].numel()
            loss = loss + self.kl_weight * logs["kl"]
        for name, distance in self._distances().items():
            logs[name] = distance(x, y)
            loss = loss + distance.weight * logs[name]
        return Losses(loss, logs), y

    def _distances(self) -> dict[str, Perceptual]:
        if self.perceptual is None or isinstance(self.perceptual, Perceptual):
            return {} if self.perceptual is None else {"perceptual": self.perceptual}
        return {f"perceptual_{i}": distance for i, distance in enumerate(self.perceptual)}

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
        """Losses, with the same noise at every validation, and the reconstruction.

        Logs ``val/loss``, ``val/psnr`` from the posterior's mean and, with ``latent_noise``, ``val/psnr_noisy``.
        """
        noise = StepNoise(key("validation", run_seed()), batch_idx, self.global_rank)
        x = self.data_of(batch)
        losses, noisy = self._losses(x, noise)
        self._log("val", losses)
        outputs = self._outputs(batch)
        self._log_psnr("val/psnr", x, outputs["sample"])
        if any(self.latent_noise):
            self._log_psnr("val/psnr_noisy", x, noisy)
        return {"loss": losses.loss.mean(), "losses": losses.loss, **losses.logs, **outputs}

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Images beside their reconstructions from the posterior's mean, clipped to [-1, 1], and that mean.

        With ``latent_noise`` logs ``test/psnr_noisy``; the noise of an image depends on its index alone.
        """
        outputs = self._outputs(batch)
        if any(self.latent_noise):
            x = self.data_of(batch)
            index = batch.get("index", torch.arange(len(x)) + batch_idx * len(x))
            noise = SampleNoise([key("test", run_seed(), int(i)) for i in index])
            self._log_psnr("test/psnr_noisy", x, self.decode(self.noisy(self.encode(x, noise), noise)))
        return outputs

    @torch.no_grad()
    def _outputs(self, batch: Any) -> dict[str, Any]:
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

    def _log_psnr(self, name: str, x: Tensor, y: Tensor) -> None:
        error = (x.float() - y.float().clamp(-1, 1)).square().mean() / 4  # of values in [0, 1]
        self.log(name, -10 * error.log10(), batch_size=len(x), sync_dist=True, prog_bar=True)

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


def _drawn(mean: Tensor, log_variance: Tensor, noise: Noise) -> Tensor:
    """A draw from the posterior, (B, c, h, w)."""
    return mean + torch.exp(0.5 * log_variance) * noise.normal("posterior", like=mean)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Divergence of N(mean, exp(log_variance)) from N(0, I) in nats, (B,), of maps (B, c, h, w).

    .. math:: \tfrac 12 \sum (\mu^2 + s^2 - 1 - \log s^2)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
