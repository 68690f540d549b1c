r"""Normalizing flows in pixels or latents: exact likelihoods, and samples that are exactly theirs.

The network maps data (with noise, see `flow.DataNoise`) to a standard normal variable; its density is

.. math:: \log p(x \mid c) = \log N(f(x); 0, I) + \log\Big|\det\frac{\partial f(x)}{\partial x}\Big| .

A sample is the inverse of a normal draw. It holds the noise that the training data held; one Tweedie step removes it.

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_flows.codecs import Codec, TextEncoder
from lightning_flows.codecs.aspect import bucket_size
from lightning_flows.flow import (
    AffineGuidance,
    Condition,
    GaussianProduct,
    Losses,
    MaximumLikelihood,
    Noise,
    SampleNoise,
    StepNoise,
    key,
    log_normal,
    seeds_from,
    tweedie,
)
from lightning_flows.modules.base import Progress, Sampled, evaluation
from lightning_flows.modules.latent_space import LatentSpace
from lightning_flows.modules.likelihood_tasks import LikelihoodTasks
from lightning_flows.modules.publishable import run_seed
from lightning_flows.networks import FlowStack, InverseMethod, Part, Sequential, check_condition
from lightning_flows.networks.layers import without_autocast
from lightning_flows.networks.parallel import is_sharded


class NormalizingFlow(LikelihoodTasks, LatentSpace):
    """An autoregressive normalizing flow: TARFlow on pixels, STARFlow on latents.

    Args:
        network: `networks.TARFlow` or `networks.STARFlow`.
        codec: data <-> latent; the identity by default.
        text: encoder of captions, for a network that reads tokens; a trainable one is trained along.
        objective: noise on the data, weights and penalty.
        guidance: of samples; None is the conditional density alone.
        method: how blocks are inverted; by default `networks.Automatic`, or `networks.Sequential` where the parameters
            are spread over devices (FSDP2), whose processes wait for each other at every pass.
        denoise: step by which the noise of the training data is removed from samples, in units of Tweedie's; 0 leaves
            it in, as a decoder wants it that was trained on noisy latents.
        standardize: batches from which ``latent_shift`` and ``latent_scale`` (per channel) are measured before the
            first step of a fresh run; 0 leaves latents as they are.
        optimizer: see `GenerativeModule`.
        lr_scheduler: see `GenerativeModule`.

    Attributes:
        latent_shift: subtracted from latents, buffer, shape (C, 1, 1).
        latent_scale: factor on latents, buffer, shape (C, 1, 1).

    Raises:
        ValueError: a negative ``denoise``, or texts for a network that reads none, or of another size.
    """

    network: FlowStack
    knows_sample_density = True
    exact_log_prob = True  # no divergence has to be estimated

    def __init__(
        self,
        *,
        network: FlowStack,
        codec: Codec | None = None,
        text: TextEncoder | None = None,
        objective: MaximumLikelihood | None = None,
        guidance: AffineGuidance | None = None,
        method: InverseMethod | None = None,
        denoise: float = 1.0,
        standardize: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not denoise >= 0:
            raise ValueError(f"denoise must not be negative (0: no step), got {denoise}")
        self.set_latent_space(network, codec, None, standardize)
        _check_text(network, text)
        self.text = text
        self.objective = objective or MaximumLikelihood()
        self.guidance, self.method, self.denoise = guidance, method, denoise

    # ------------------------------------------------------------------ training

    def losses(self, batch: Any, noise: StepNoise) -> Losses:
        """See `GenerativeModule.losses`; logs hold ``nll``, nats per dimension of the latents with noise."""
        z, condition = self.latent_of(batch, noise), self.condition_of(batch)
        if self.training:
            facts = {} if self.text is None else self.text.facts_of(batch)
            condition = self.filled(self.network.drop(condition, noise.generator("drop")), **facts)
        return self.objective(self.network, z, condition, noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch, a scalar; logs ``train/loss`` and ``train/nll``."""
        losses = self.losses(batch, self.training_noise())
        self._share_variance()
        loss, size = losses.loss.mean(), len(losses.loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/nll", losses.logs["nll"].mean(), batch_size=size)
        return loss

    def _share_variance(self) -> None:
        """Each process tracked the variance of its own z; it is that of all of them."""
        variance = getattr(self.network, "prior_variance", None)
        if variance is not None and self.trainer.world_size > 1:
            variance.copy_(self.trainer.strategy.reduce(variance.clone(), reduce_op="mean"))

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Losses of a batch with the same noise at every validation; logs ``val/loss`` and ``val/nll``."""
        noise = StepNoise(key("validation", run_seed()), batch_idx, self.global_rank)
        losses = self.losses(batch, noise)
        size = len(losses.loss)
        self.log("val/loss", losses.loss.mean(), prog_bar=True, batch_size=size, sync_dist=True)
        self.log("val/nll", losses.logs["nll"].mean(), batch_size=size, sync_dist=True)
        return {"loss": losses.loss.mean(), "losses": losses.loss, **losses.logs}

    def options_of(self, batch: Any) -> dict[str, Any]:
        """See `GenerativeModule.options_of`: the size, and the null prompt, of the aspect ratio that is asked for."""
        if batch.get("aspect") is None:
            return {}
        condition, facts = self.condition_of(batch), {} if self.text is None else self.text.facts_of(batch)
        null = self.null_condition(condition, len(batch["aspect"]), **facts) if facts else None
        return {"size": self.size_of(batch["aspect"][0]), "null": null}

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        condition: Condition | None,
        noise: SampleNoise,
        *,
        guidance: AffineGuidance | float | None = None,
        method: InverseMethod | None = None,
        denoise: float | None = None,
        size: tuple[int, int] | None = None,
        null: Condition | None = None,
        progress: Progress | None = None,
    ) -> Sampled:
        """Samples in data space, shape (B, ...).

        Args:
            condition: of the samples.
            noise: one seed for each sample.
            guidance: a guidance, or the scale of one (1 is off); the module's by default.
            method: how blocks are inverted; the module's by default.
            denoise: see the module's; the module's by default.
            size: height and width of a latent, where the network allows others than its own.
            null: what "without the condition" is; the network's, or the null prompt, by default.
            progress: called with (token, tokens) of all blocks together.

        Returns:
            The samples; the calls of a block's layers; and the log-density with which the latents were drawn, before
            the noise was removed: under guidance, that of the guided flow.

        Raises:
            ValueError: a condition or guidance that does not go with this model.
        """
        check_condition(self.network, condition)
        channels, height, width = self.shape
        rows, columns = size or (height, width)
        like = torch.empty(len(noise.seeds), channels, rows, columns, device=self.device)
        z = self.prior(noise, like)
        drawn = self.draw(z, condition, guidance=guidance, method=method, null=null, progress=progress)
        log_prob = self.log_prior(z) - drawn.log_det + self.latent_volume(drawn.x)
        x = self.denoised(drawn.x, condition, self.denoise if denoise is None else denoise)
        return Sampled(self.decode(x), drawn.passes, log_prob)

    def draw(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        guidance: AffineGuidance | float | None = None,
        method: InverseMethod | None = None,
        null: Condition | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The latents of given noise z (B, C, H, W): `networks.Drawn`. Arguments as in `generate`."""
        rule = self._guidance(guidance)
        if null is None and rule is not None and not rule.off:
            null = self.null_condition(condition, len(z))
        return self.network.draw(
            z,
            self.filled(condition),
            guidance=rule,
            null=self.filled(null),
            method=method or self.method or self._safe_method(),
            watch=None if progress is None else self._watch(z, progress),
        )

    def _safe_method(self) -> InverseMethod | None:
        """Where parameters are gathered for every pass, processes with other samples must make as many passes."""
        return Sequential() if is_sharded(self.network) else None

    def _watch(self, z: Tensor, progress: Progress) -> Callable[[Part], None]:
        rows, columns = self.network.grid(z)
        busy = [i for i, block in enumerate(self.network.blocks) if len(block.attn_blocks)]  # type: ignore[arg-type]
        total = rows * columns * len(busy)

        def watch(part: Part) -> None:
            if part.block in busy:
                before = sum(b > part.block for b in busy) * rows * columns
                progress(before + rows * columns * part.settled // part.tokens, total)

        return watch

    def _guidance(self, given: AffineGuidance | float | None) -> AffineGuidance | None:
        if given is None or isinstance(given, AffineGuidance):
            return given or self.guidance
        if self.guidance is None:
            return GaussianProduct(float(given))
        return replace(self.guidance, scale=float(given))

    def prior(self, noise: Noise, like: Tensor) -> Tensor:
        """Draws of z, of the shape and device of ``like`` (B, C, H, W)."""
        z, std = noise.normal("source", like), self.network.prior_std()
        if std is None:
            return z
        return self.network.unpatchify(self.network.patchify(z) * std, *self.network.grid(z))

    def log_prior(self, z: Tensor) -> Tensor:
        """Log-density of z (B, C, H, W) in nats, shape (B,)."""
        std = self.network.prior_std()
        return log_normal(z) if std is None else log_normal(self.network.patchify(z), std)

    def denoised(self, x: Tensor, condition: Condition | None = None, strength: float = 1.0) -> Tensor:
        """Latents without the noise that the training data held, by Tweedie's formula: ``x + s std^2 grad log p(x)``.

        The gradient of a sample is that of its own density, whatever the batch.

        Args:
            x: latents, shape (B, C, H, W).
            condition: of the samples; None for none.
            strength: s; 1 is the formula, 0 nothing.

        Raises:
            RuntimeError: inside ``torch.inference_mode``.
        """
        std = self.objective.data_noise.std
        if not (std and strength):
            return x
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "denoising needs gradients: leave torch.inference_mode (or Trainer(inference_mode=False))"
            )
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (score,) = torch.autograd.grad(self.latent_log_prob(leaf, condition).sum(), leaf)
        return tweedie(x, strength * score, std)

    # ------------------------------------------------------------------ likelihood

    def latent_log_prob(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Log-density in nats of latents as the network reads them, (B, C, H, W) -> (B,); differentiable."""
        with evaluation(self.network):  # asking for a density is no training: nothing is tracked
            noise, log_det = self.network(z, self.filled(condition))
        with without_autocast(z.device):
            return self.log_prior(noise) + log_det

    def log_prob(self, x: Tensor, condition: Condition | None = None, *, seed: int = 0, **options: Any) -> Tensor:
        """Log-density in nats of what the codec encodes to: pixels for the identity, else ``codec.encode(x)``.

        Exact. It is the density of the variable that the network was trained on, noise included: dequantise pixels
        first (`flow.dequantize`) for likelihoods of grey levels. A density of latents is not one of pixels, and those
        of two codecs cannot be compared. Gradients flow to the parameters and, with the identity codec, to ``x``.

        Args:
            x: data, shape (B, ...).
            condition: of the samples; None for none.
            seed: of a sampled posterior.
            options: none: nothing is solved or estimated.

        Returns:
            Nats, shape (B,); of the latent before `latent_shift` and `latent_scale`, whose volume change is counted.

        Raises:
            ValueError: an option, or a condition that the network does not read.
        """
        if options:
            raise ValueError(f"log_prob of a normalizing flow is exact and takes no {sorted(options)}")
        check_condition(self.network, condition)
        z = self.encode_latent(x, SampleNoise(seeds_from(seed, len(x))))
        return self.latent_log_prob(z, condition) + self.latent_volume(z)

    def encode_latent(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """As `encode`, differentiable in ``x`` where the codec is."""
        return (self.codec.encode(x, noise) - self.latent_shift) * self.latent_scale

    @torch.no_grad()
    def normalize(self, x: Tensor, condition: Condition | None = None, *, seed: int = 0) -> Tensor:
        """The noise z (B, C, H, W) of data x (B, ...), in eval mode: the inverse of `from_noise` without denoising."""
        with evaluation(self):
            noise = SampleNoise(seeds_from(seed, len(x)))
            return self.network(self.encode(x.to(self.device), noise), self.filled(condition))[0]

    @torch.no_grad()
    def from_noise(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        guidance: AffineGuidance | float | None = None,
        method: InverseMethod | None = None,
        denoise: float | None = None,
    ) -> Tensor:
        """The data of given noise z (B, C, H, W), shape (B, ...), in eval mode. Arguments as in `generate`."""
        with evaluation(self):
            x = self.draw(z.to(self.device), condition, guidance=guidance, method=method).x
            return self.decode(self.denoised(x, condition, self.denoise if denoise is None else denoise))

    # ------------------------------------------------------------------ prediction

    def size_of(self, aspect: str) -> tuple[int, int]:
        """Height and width of a latent of an aspect ratio such as ``"16:9"``, with the area of the model's own."""
        _, height, width = self.shape
        return bucket_size(aspect, round((height * width) ** 0.5), self.network.patch_size)


def _check_text(network: FlowStack, text: TextEncoder | None) -> None:
    if text is None:
        return
    if "tokens" not in network.streams:
        raise ValueError(f"text: {type(network).__name__} reads {list(network.streams) or 'no condition'}, no tokens")
    # The width of a frozen encoder stands in its own config, which may have to be fetched: its first use tells.
    size = network.text_size if text.frozen else text.size
    if (text.length, size) != (network.text_length, network.text_size):
        raise ValueError(
            f"text gives {text.length} tokens of {size} channels, but {type(network).__name__} has "
            f"text_length={network.text_length} and text_size={network.text_size}"
        )
