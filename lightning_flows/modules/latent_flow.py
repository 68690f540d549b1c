r"""Latent flow matching: a velocity field in the latent space of a codec, or in pixels with the identity.

References:
    Flow Matching in Latent Space (Dao, Phung, Nguyen, Tran, 2023).
    SiT: Exploring Flow and Diffusion-based Generative Models (Ma et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.codecs import Codec
from lightning_flows.flow import (
    ClassifierFree,
    Condition,
    Divergence,
    Field,
    FlowMatching,
    Guidance,
    Losses,
    Midpoint,
    SampleNoise,
    Solution,
    Solver,
    StepNoise,
    Velocity,
    seeds_from,
)
from lightning_flows.flow import log_prob as flow_log_prob
from lightning_flows.modules.base import Progress
from lightning_flows.modules.inversion import Inversion
from lightning_flows.modules.latent_space import LatentSpace
from lightning_flows.networks import check_condition


class LatentFlowMatching(Inversion, LatentSpace):
    """Flow matching in a latent space.

    Training regresses the objective's target at ``z = (codec.encode(x) - latent_shift) * latent_scale``; sampling
    solves the flow from noise to z and decodes it. A batch may hold the posterior of its latents (``latent`` and
    ``latent_std``, see `data.CachedLatents`) in the place of images: the draw is the one of `codec.encode`.

    Args:
        network: predicts the objective's quantity: ``(x (B, C, H, W), t (B,), condition) -> (B, C, H, W)``.
        codec: data <-> latent; the identity by default.
        objective: path, source, times, coupling and prediction.
        solver: solves the flow at sampling; midpoint by default.
        steps: intervals of the time grid of a sample.
        guidance: of samples; None is the conditional velocity alone.
        standardize: batches from which ``latent_shift`` and ``latent_scale`` (per channel) are measured before the
            first step of a fresh run, so that latents have mean 0 and deviation 1; 0 leaves them as they are.
            Statistics that came with weights are kept: the network that is finetuned was trained on them.
        shape: shape (C, H, W) of a latent; that of the network by default.
        optimizer: see `GenerativeModule`.
        lr_scheduler: see `GenerativeModule`.

    Attributes:
        latent_shift: subtracted from latents, buffer, shape (C, 1, 1).
        latent_scale: factor on latents, buffer, shape (C, 1, 1).
        compiled_evaluate: `flow.fields.evaluate` compiled, for samples (see `callbacks.Compile`), or None.

    Raises:
        ValueError: no step, an unknown latent shape, a stochastic solver over a source that is not Gaussian.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        codec: Codec | None = None,
        objective: FlowMatching | None = None,
        solver: Solver | None = None,
        steps: int = 25,
        guidance: Guidance | None = None,
        standardize: int = 0,
        shape: tuple[int, int, int] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.set_latent_space(network, codec, shape, standardize)
        self.objective = objective or FlowMatching()
        self.solver, self.steps = solver or Midpoint(), steps
        self.guidance = guidance
        self.compiled_evaluate: Callable[..., Tensor] | None = None
        self._check_solver(self.solver)

    # ------------------------------------------------------------------ training

    def losses(self, batch: Any, noise: StepNoise) -> Losses:
        """See `GenerativeModule.losses`; ``source`` in the batch is noise coupled in a data worker."""
        z = self.latent_of(batch, noise)
        return self.objective(self.network, z, self.condition_of(batch), noise, x0=batch.get("source"))

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        condition: Condition | None,
        noise: SampleNoise,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
        progress: Progress | None = None,
    ) -> Solution:
        """Samples in data space, shape (B, ...), and the calls of the field.

        Args:
            condition: of the samples.
            noise: one seed for each sample.
            steps: intervals of the time grid; the module's by default.
            solver: the module's by default.
            guidance: a guidance, or the scale of a classifier-free one (1 is off); the module's by default.
            progress: called with (step, steps).

        Raises:
            ValueError: a condition, guidance or solver that does not go with this model.
        """
        solver, steps = solver or self.solver, self.steps if steps is None else steps
        self._check_solver(solver)
        check_condition(self.network, condition)
        field = Field(self._velocity(), condition, self._guidance(guidance), compiled=self.compiled_evaluate)
        like = torch.empty(len(noise.seeds), *self.shape, device=self.device, dtype=self.latent_scale.dtype)
        z = self.objective.source.sample(noise, "source", like)
        grid, nfe = self.objective.times.grid(steps, device=z.device), 0
        for step in solver.iterate(field, z, grid, noise):
            z, nfe = step.x, step.nfe
            if progress is not None:
                progress(step.index + 1, steps)
        return Solution(self.decode(z), nfe)

    def field(self, condition: Condition | None = None, guidance: Guidance | None = None) -> Field:
        """The vector field of the model in latent space: ``field(z, t) -> velocity``."""
        return Field(self._velocity(), condition, guidance)

    def _velocity(self) -> Velocity:
        return Velocity(self.network, self.objective.path, self.objective.prediction, self.objective.floor)

    def _guidance(self, given: Guidance | float | None) -> Guidance | None:
        if given is None or isinstance(given, Guidance):
            return given or self.guidance
        if self.guidance is None:
            return ClassifierFree(float(given))
        return replace(self.guidance, scale=float(given))

    def _check_solver(self, solver: Solver) -> None:
        if solver.stochastic and not self.objective.source.gaussian:
            raise ValueError(f"solver {type(solver).__name__} needs the score, which only a Gaussian source gives")

    # ------------------------------------------------------------------ likelihood

    def log_prob(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Log-density in nats of what the codec encodes to: pixels for the identity, else ``codec.encode(x)``.

        A density of latents is not one of pixels, and those of two codecs cannot be compared.

        Exact up to the solver for the exact divergence, unbiased for `flow.Hutchinson`. Gradients flow to the
        parameters and, with the identity codec, to ``x`` where they are enabled.

        Args:
            x: data, shape (B, ...); dequantise pixels first (`flow.dequantize`).
            condition: of the samples; None for none.
            steps: intervals of the time grid; the module's by default.
            solver: a deterministic solver; the module's by default.
            divergence: `flow.Exact` by default.
            seed: of the probes and of a sampled posterior.

        Returns:
            Nats, shape (B,); of the latent before `latent_shift` and `latent_scale`, whose volume change is counted.

        Raises:
            ValueError: a solver that is stochastic.
            RuntimeError: inside ``torch.inference_mode``.
        """
        check_condition(self.network, condition)
        noise = SampleNoise(seeds_from(seed, len(x)))
        z = (self.codec.encode(x, noise) - self.latent_shift) * self.latent_scale
        density = flow_log_prob(
            self.field(condition),
            z,
            solver=solver or self.solver,
            grid=self.objective.times.grid(self.steps if steps is None else steps, device=z.device),
            source=self.objective.source,
            divergence=divergence,
            noise=noise,
        )
        return density.log_prob + self.latent_volume(z)
