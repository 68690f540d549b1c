r"""SymmFlow: one network that draws an image from its mask or label, and reads mask and label from an image.

Reference:
    Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based Generative
    Models (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_flows.codecs import Codec, SemanticCodec
from lightning_flows.flow import (
    Autoguidance,
    ClassifierFree,
    Condition,
    Euler,
    Guidance,
    Losses,
    SampleNoise,
    Solution,
    Solver,
    StepNoise,
    SymmetricMatching,
    key,
)
from lightning_flows.flow.symmetric import spread
from lightning_flows.modules.base import Progress, clock
from lightning_flows.modules.joint_field import Hidden, JointField, joint
from lightning_flows.modules.latent_space import LatentSpace
from lightning_flows.modules.publishable import run_seed
from lightning_flows.modules.semantic_conditions import SemanticConditions
from lightning_flows.modules.semantic_tasks import SemanticTasks


class SymmFlow(SemanticTasks, SemanticConditions, LatentSpace):
    """Symmetrical flow matching of images and their semantics.

    The state is the image (or its latent) and the code of its mask, label or both, side by side on the channels. Solved
    from t = 0 it draws (`sample`), solved back from t = 1 it reads (`read`, `segment`, `classify`); `edit` does both.

    A condition has ``label`` (B,) and the mask as ``spatial`` (B, 1, H, W) of class ids, whichever the semantic codec
    reads. With ``objective.drop_rate`` some of it may be absent at sampling, and guidance works.

    Args:
        network: ``(x (B, C + S, h, w), t (B,), None) -> (B, C + S, h, w)``, images first.
        semantic: masks and labels <-> S planes.
        codec: image <-> latent; the identity by default. The planes have the size of the latent.
        objective: of training; its path is that of sampling, too.
        solver: Euler by default.
        steps: intervals of the time grid for drawing.
        read_steps: intervals for reading; one step is a plain regression of the code.
        guidance: of images by their code; None is off.
        standardize: see `LatentFlowMatching`.
        optimizer: see `GenerativeModule`.
        lr_scheduler: see `GenerativeModule`.

    Attributes:
        latent_shift: subtracted from latents, buffer, shape (C, 1, 1).
        latent_scale: factor on latents, buffer, shape (C, 1, 1).

    Raises:
        ValueError: a network without a channel for the image or with other codes than the semantic codec has, a step
            count below 1, a stochastic solver, or guidance without ``objective.drop_rate``.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        semantic: SemanticCodec,
        codec: Codec | None = None,
        objective: SymmetricMatching | None = None,
        solver: Solver | None = None,
        steps: int = 25,
        read_steps: int = 1,
        guidance: Guidance | None = None,
        standardize: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        for name, value in (("steps", steps), ("read_steps", read_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.set_latent_space(network, codec, _image_shape(network, semantic), standardize)
        _check_planes(network, semantic)
        self.semantic = semantic
        self.objective = objective or SymmetricMatching()
        self.solver, self.steps, self.read_steps = solver or Euler(), steps, read_steps
        self.guidance = guidance
        _check_solver(self.solver)
        self._guidance(guidance)

    # ------------------------------------------------------------------ training

    def losses(self, batch: Any, noise: StepNoise) -> Losses:
        """See `GenerativeModule.losses`; logs hold ``loss_image`` and ``loss_semantic`` of each sample.

        What a semantic codec adds, ``loss_extra``, has the weight of the semantic part.
        """
        z, fields = self.latent_of(batch, noise), self.fields_of(batch)
        code = self.semantic.encode(fields, self.shape[1:], noise)  # (B, S, h, w)
        hidden = self._hidden_at_random(len(z), noise) if self.training else None
        found = self.objective(self.network, z, code, noise, hidden)
        # What is hidden cannot be estimated; its code itself takes the place of the estimate.
        estimate = found.code if hidden is None else torch.where(spread(hidden), code, found.code)
        extra = self.semantic.extra_loss(estimate, fields)
        if extra is None:
            return found.losses
        loss = found.losses.loss + (1 - self.objective.image_weight) * extra
        return Losses(loss, {**found.losses.logs, "loss_extra": extra.detach()})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch, a scalar; logs it and its parts."""
        return self._logged("train", self.losses(batch, self.training_noise()))

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Losses of a batch with the same noise at every validation, and what one reading of its images finds."""
        noise = StepNoise(key("validation", run_seed()), batch_idx, self.global_rank)
        losses = self.losses(batch, noise)
        loss = self._logged("val", losses)
        reading = self.read_batch(batch, batch_idx, "validation")
        return {"loss": loss, "losses": losses.loss, **losses.logs, **self.reported(reading, batch)}

    def _logged(self, prefix: str, losses: Losses) -> Tensor:
        options: dict[str, Any] = {"batch_size": len(losses.loss), "sync_dist": prefix == "val"}
        loss = losses.loss.mean()
        self.log(f"{prefix}/loss", loss, prog_bar=True, **options)
        for name in (name for name in losses.logs if name.startswith("loss_")):
            self.log(f"{prefix}/{name}", losses.logs[name].mean(), **options)
        return loss

    def _hidden_at_random(self, count: int, noise: StepNoise) -> Tensor | None:
        if not self.objective.drop_rate:
            return None
        parts = self.objective.hidden(count, len(self.semantic.keys), noise)  # (B, keys)
        return self._channels(dict(zip(self.semantic.keys, parts.unbind(1), strict=True)))

    # ------------------------------------------------------------------ drawing

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
        """Images in data space, shape (B, ...), and the calls of the network.

        Args:
            condition: masks and labels of the samples; what is absent is left to the network.
            noise: one seed for each sample.
            steps: intervals of the time grid; the module's by default.
            solver: the module's by default.
            guidance: a guidance, or the scale of a classifier-free one (1 is off); by default the module's, where there
                is a condition.
            progress: called with (step, steps).

        Raises:
            ValueError: a condition, guidance or solver that does not go with this model, or guidance without condition.
        """
        count, channels, path = len(noise.seeds), self.shape[0], self.objective.path
        code, given = self._code_of(condition, noise)  # (B, S, h, w), (B, S)
        rule, all_given = self._rule_of(guidance, condition), bool(given.all())
        hidden = None if all_given and rule is None else Hidden(noise, code, path)
        field = JointField(
            self.network, channels, path, given=None if all_given else given, hidden=hidden, guidance=rule
        )
        image = noise.normal("source", torch.empty(count, *self.shape, device=self.device))
        start = joint(image, code if hidden is None else torch.where(spread(given), code, hidden.start))
        state = self.solve(field, start, self.steps if steps is None else steps, solver, progress=progress)
        return Solution(self.decode(state.x[:, :channels]), state.nfe)

    def solve(
        self,
        field: Any,
        state: Tensor,
        steps: int,
        solver: Solver | None = None,
        *,
        backwards: bool = False,
        progress: Progress | None = None,
    ) -> Solution:
        """A joint state (B, C + S, h, w) carried from one end of the path to the other.

        Raises:
            ValueError: a stochastic solver, or no step.
        """
        solver = solver or self.solver
        _check_solver(solver)
        grid, nfe = self.objective.times.grid(steps, device=state.device), 0
        for step in solver.iterate(field, state, grid.flip(0) if backwards else grid):
            state, nfe = step.x, step.nfe
            if progress is not None:
                progress(step.index + 1, steps)
        return Solution(state, nfe)

    def _rule_of(self, given: Guidance | float | None, condition: Condition | None) -> Guidance | None:
        """The guidance of samples, None for none; that of the module is off where there is no condition."""
        rule = self._guidance(given)
        if rule is None or (condition is not None and condition.streams):
            return rule
        if given is not None:
            raise ValueError(f"guidance of scale {rule.scale} needs a condition with one of {self.streams}, got none")
        return None

    def _guidance(self, given: Guidance | float | None) -> Guidance | None:
        rule = given if isinstance(given, Guidance) else self.guidance
        if given is not None and not isinstance(given, Guidance):
            rule = ClassifierFree(float(given)) if rule is None else replace(rule, scale=float(given))
        if rule is None or rule.scale == 1:
            return None
        if isinstance(rule, Autoguidance):
            raise ValueError("guidance cannot be Autoguidance: its guide knows no pairs of image and code")
        if not self.objective.drop_rate:
            raise ValueError("guidance needs a model that was trained with objective.drop_rate above 0")
        return rule

    # ------------------------------------------------------------------ tests

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Both directions: an image drawn for the semantics of each item, and what is read from its image.

        Beside the outputs of `GenerativeModule.test_step`: those of `reported`, ``read_nfe`` and ``read_seconds``.
        """
        drawn = super().test_step(batch, batch_idx)
        start = clock(self.device)
        reading = self.read_batch(batch, batch_idx, "read")
        seconds = clock(self.device) - start
        return {**drawn, **self.reported(reading, batch), "read_nfe": reading.nfe, "read_seconds": seconds}

    # ------------------------------------------------------------------ likelihood

    def log_prob(self, x: Tensor, condition: Condition | None = None, **options: Any) -> Tensor:
        """A pair's flow ends in a pair: it gives no density of the image alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "SymmFlow carries (noise, code) to (image, noise): its likelihood is that of the pair, and the density of "
            "the codes themselves is not modelled. Use LatentFlowMatching for log_prob"
        )


def _image_shape(network: nn.Module, semantic: SemanticCodec) -> tuple[int, int, int]:
    shape = tuple(getattr(network, "shape", ()))
    if len(shape) != 3 or shape[0] <= semantic.channels:
        raise ValueError(
            f"network must have shape (C + {semantic.channels}, h, w), the image's channels and those of "
            f"{type(semantic).__name__}, got {shape or 'none'}"
        )
    return shape[0] - semantic.channels, shape[1], shape[2]


def _check_planes(network: nn.Module, semantic: SemanticCodec) -> None:
    """What a `networks.Preconditioned` takes for codes, and for constant ones, is what the semantic codec makes."""
    codes, constant = getattr(network, "codes", 0), getattr(network, "constant", 0)
    if codes not in (0, semantic.channels):
        raise ValueError(f"network.codes must be {semantic.channels}, the planes of the semantic codec, got {codes}")
    if constant > semantic.constant:
        raise ValueError(
            f"network.constant must be at most {semantic.constant}, got {constant}: no more of the last planes of "
            f"{type(semantic).__name__} are the same at every place (labels come last, without dequantisation)"
        )


def _check_solver(solver: Solver) -> None:
    if solver.stochastic:
        raise ValueError(
            f"solver must be deterministic (the score of a pair is not known), got {type(solver).__name__}"
        )
