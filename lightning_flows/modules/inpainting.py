r"""Holes filled by a normalizing flow that was never trained for it: a Markov chain on what is missing.

A flow knows the joint density of what is in the hole and what is around it, :math:`p(x_h, x_k \mid c)`. As a function
of :math:`x_h` with :math:`x_k` held, that is the conditional density up to its normaliser, which a Metropolis-Hastings
chain does not need. x is the variable of which the flow has the density: latents, with the noise of its training data.

``rule="exact"`` runs Hamiltonian Monte Carlo (`flow.markov`) on :math:`x_h`, with :math:`\nabla_{x_h} \log p(x_h, x_k)`
from one parallel pass through the flow and back. It leaves :math:`p(x_h \mid x_k, c)` invariant.

``rule="paper"`` is the published scheme: with :math:`z = f(x)` and the mask m in both spaces,

.. math::

    z' = z + \tau\, m \odot \varepsilon, \qquad
    x' = m \odot f^{-1}(z') + (1 - m) \odot x, \qquad
    \text{accept if } u < p(x' \mid c) / p(x \mid c) .

It is a heuristic: its proposal is symmetric in :math:`z`, not in :math:`x_h`. The step in z is one in x stretched by a
Jacobian that differs between x and x', and restoring the known values moves z' away, so that the step back would need
another one. The ratio that would make up for both has no closed form; without it the invariant density is another one.
(Where f is affine both steps are alike and the scheme is exact. Where f works on every value alone, it leaves
:math:`p(x_h) \,|\partial x_h / \partial z_h|^{-1}` invariant instead.) A step also has to invert the flow token by
token, which the exact rule never does.

References:
    STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025), for the scheme.
    MCMC using Hamiltonian dynamics (Neal, 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flows.flow import AffineGuidance, Condition, SampleNoise
from lightning_flows.flow.markov import Hamiltonian, accepted, adapted, jittered, over
from lightning_flows.modules.base import Progress, evaluation
from lightning_flows.networks import InverseMethod, check_condition
from lightning_flows.networks.guided_encoding import encode_guided
from lightning_flows.networks.layers import without_autocast

Rule = Literal["exact", "paper"]
STEP = 0.1  # size of a first step where the training data had no noise, whose deviation is the smallest scale there is


class Inpainted(NamedTuple):
    """Data with their holes filled.

    Attributes:
        x: data, shape (B, ...).
        accepted: share of the proposals after the warm-up that were accepted, shape (B,).
        log_prob: log-density after each step, of hole and surroundings together, noise included; nats, (B, steps).
    """

    x: Tensor
    accepted: Tensor
    log_prob: Tensor


class Inpainting:
    """The mixin that fills holes; see the module's docstring for what its chains leave invariant."""

    decode: Callable[..., Tensor]
    objective: Any
    denoise: float
    _guidance: Callable[..., AffineGuidance | None]

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        mask: Tensor,
        condition: Condition | None = None,
        *,
        rule: Rule = "exact",
        steps: int = 100,
        warmup: int | None = None,
        step_size: float | None = None,
        leapfrog: int | None = None,
        guidance: AffineGuidance | float | None = None,
        method: InverseMethod | None = None,
        noisy: bool = True,
        denoise: float | None = None,
        paste: bool = True,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        progress: Progress | None = None,
    ) -> Inpainted:
        """Data with holes, filled as the flow thinks of them.

        Chains start from noise in the hole and run for each sample on its own, in eval mode; draws are keyed by the
        sample's seed, so that a result does not depend on the batch. What was under the mask is never looked at.

        Args:
            x: data, shape (B, C, H, W).
            mask: non-zero where x is to be filled, shape (H, W), (B, H, W) or (B, 1, H, W); of the height and width
                of the data, or of the latents. A latent cell is filled if any of its pixels is.
            condition: of the result.
            rule: ``"exact"`` or ``"paper"``, see the module's docstring.
            steps: proposals, all in all; the last state is the result.
            warmup: how many of them adapt the step size of each sample; half by default. Exact rule only.
            step_size: of the exact rule's leapfrog steps at first, or tau of the paper's; by default the deviation of
                the noise of the training data, else 0.1.
            leapfrog: steps, with a gradient each, of one proposal of the exact rule; 8 by default, 1 is Langevin.
            guidance: a guidance, or the scale of one (1 is off); the density is then that of the guided flow. The
                module's by default.
            method: how blocks are inverted by the paper's rule.
            noisy: add to the known latents the noise that the training data held, once. Without it the surroundings
                are of a kind that the flow has not seen.
            denoise: see `NormalizingFlow.generate`; the module's by default.
            paste: put the given pixels around the hole into the result, exactly.
            seed: sample i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each sample, shape (B,).
            progress: called with (step, steps).

        Raises:
            ValueError: a mask that does not fit, an argument out of its range or without a meaning for the rule, or
                a condition or guidance that does not go with this model.
            RuntimeError: inside ``torch.inference_mode``.
        """
        how = _settings(rule, steps, warmup, step_size, leapfrog, method, self.objective.data_noise.std)
        check_condition(self.network, condition)  # type: ignore[attr-defined]
        noise = SampleNoise(self._seeds(condition, len(x), seed, seeds))  # type: ignore[attr-defined]
        x = x.to(self.device)  # type: ignore[attr-defined]
        condition = None if condition is None else condition.to(x.device)
        with evaluation(self):  # type: ignore[arg-type]
            hole = hole_of(mask.to(x.device), x, self)
            known = self.encode(x.masked_fill(hole, 0), noise)  # type: ignore[attr-defined]
            known = self.objective.data_noise.add(known, noise) if noisy else known
            free = F.adaptive_max_pool2d(hole.to(known), known.shape[2:])  # (B, 1, h, w)
            chain = _Chain(self, condition, self._guidance(guidance), noise, free, progress)
            start = torch.where(free > 0, noise.normal("fill", known), known)
            z, share, trace = chain.exact(start, how) if rule == "exact" else chain.paper(start, how)
            z = self.denoised(z, condition, self.denoise if denoise is None else denoise)  # type: ignore[attr-defined]
            found = self.decode(z)
        found = torch.where(hole, found, x.to(found)) if paste else found
        return Inpainted(found, share, trace + self.latent_volume(z))  # type: ignore[attr-defined]


def noise_of(model: Any, x: Tensor, condition: Condition | None, rule: AffineGuidance | None) -> tuple[Tensor, Tensor]:
    """Noise z of latents x (B, C, H, W) and their log-density (B,), of the guided flow where there is a guidance."""
    filled = model.filled(condition)
    if rule is None or rule.off:
        z, log_det = model.network(x, filled)
    else:
        null = model.filled(model.null_condition(condition, len(x)))
        z, log_det, _ = encode_guided(model.network, x, filled, rule, null)
    with without_autocast(x.device):
        return z, model.log_prior(z) + log_det


def hole_of(mask: Tensor, x: Tensor, model: Any) -> Tensor:
    """Where data are to be filled, bool, shape (B, 1, H, W).

    Raises:
        ValueError: data that are no images, or a mask of another shape.
    """
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W) to be filled under a mask, got {tuple(x.shape)}")
    cells = tuple(model.codec.latent_shape(tuple(x.shape[1:]))[1:])
    given = mask if mask.dim() != 2 else mask.expand(len(x), *mask.shape)
    given = given[:, None] if given.dim() == 3 else given
    sides = (tuple(x.shape[2:]), cells)
    if given.dim() != 4 or given.shape[:2] != (len(x), 1) or tuple(given.shape[2:]) not in sides:
        wanted = " or ".join(str((len(x), *side)) for side in dict.fromkeys(sides))
        raise ValueError(f"mask must have shape {wanted}, or that of one sample, got {tuple(mask.shape)}")
    return F.interpolate((given != 0).float(), x.shape[2:], mode="nearest") > 0


class _Settings(NamedTuple):
    steps: int
    warmup: int
    step_size: float
    leapfrog: int
    method: InverseMethod | None


def _settings(
    rule: Rule,
    steps: int,
    warmup: int | None,
    step_size: float | None,
    leapfrog: int | None,
    method: InverseMethod | None,
    std: float,
) -> _Settings:
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    foreign = {"warmup": warmup, "leapfrog": leapfrog} if rule == "paper" else {"method": method}
    for name, value in foreign.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no meaning for rule={rule!r}")
    burnt = (steps // 2 if rule == "exact" else 0) if warmup is None else warmup
    if not 0 <= burnt < steps:
        raise ValueError(f"warmup must lie in [0, steps={steps}), got {burnt}")
    size = (std or STEP) if step_size is None else step_size
    if not size > 0:
        raise ValueError(f"step_size must be positive, got {size}")
    return _Settings(steps, burnt, size, 8 if leapfrog is None else leapfrog, method)


class _Chain:
    """The chains of one call, with the density that they walk on.

    Args:
        model: a normalizing flow.
        condition: of the samples.
        rule: guidance, or None.
        noise: one seed for each sample.
        free: 1 in the hole and 0 elsewhere, shape (B, 1, h, w).
        progress: called with (step, steps).
    """

    def __init__(
        self,
        model: Any,
        condition: Condition | None,
        rule: AffineGuidance | None,
        noise: SampleNoise,
        free: Tensor,
        progress: Progress | None,
    ) -> None:
        self.model, self.condition, self.rule = model, condition, rule
        self.noise, self.free, self.progress = noise, free, progress

    def density(self, x: Tensor) -> Tensor:
        """Nats of latents (B, C, h, w), shape (B,)."""
        return noise_of(self.model, x, self.condition, self.rule)[1]

    def exact(self, x: Tensor, how: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        """Hamiltonian Monte Carlo on the hole: last state, share of accepted proposals (B,), log-densities (B, n)."""
        kernel = Hamiltonian(how.leapfrog)
        state = kernel.start(self.density, x, self.free)
        sizes, decisions, trace = x.new_full((len(x),), how.step_size), [], []
        for i in range(how.steps):
            momentum = self.noise.normal(f"momentum {i}", x)
            now = jittered(sizes, self._uniform("size", i, x))
            proposal, ratio = kernel.propose(self.density, state, momentum, now, self.free)
            decisions.append(accepted(ratio, self._uniform("accept", i, x)))
            state = state.where(decisions[-1], proposal)
            trace.append(state.log_prob)
            if i < how.warmup:
                sizes = adapted(sizes, ratio, kernel.target, i + 1)
            self._tell(i + 1, how.steps)
        return state.x, torch.stack(decisions[how.warmup :]).float().mean(0), torch.stack(trace, 1)

    def paper(self, x: Tensor, how: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        """The published scheme; returns what `exact` does."""
        z, log_prob = noise_of(self.model, x, self.condition, self.rule)
        decisions, trace = [], []
        for i in range(how.steps):
            moved = z + how.step_size * self.free * self.noise.normal(f"move {i}", x)
            drawn = self.model.draw(moved, self.condition, guidance=self.rule, method=how.method).x
            drawn = torch.where(self.free > 0, drawn, x)
            other, density = noise_of(self.model, drawn, self.condition, self.rule)
            decisions.append(accepted(density - log_prob, self._uniform("accept", i, x)))
            yes = over(decisions[-1], x)
            x, z = torch.where(yes, drawn, x), torch.where(yes, other, z)
            log_prob = torch.where(decisions[-1], density, log_prob)
            trace.append(log_prob)
            self._tell(i + 1, how.steps)
        return x, torch.stack(decisions).float().mean(0), torch.stack(trace, 1)

    def _uniform(self, purpose: str, step: int, like: Tensor) -> Tensor:
        return self.noise.uniform(f"{purpose} {step}", len(like), like.device).to(like.dtype)

    def _tell(self, step: int, steps: int) -> None:
        if self.progress is not None:
            self.progress(step, steps)
