"""From data to noise and back: a deterministic flow is a bijection, so that data can be edited where they are noise.

The field that carries noise (t = 0) to data (t = 1) carries data to noise when it is followed backwards. Noise found
that way stands for its image: it can be solved forward again (`reconstruct`), mixed with other noise (`interpolate`),
or replaced in part (`vary`, which needs no inversion).

References:
    Denoising Diffusion Implicit Models (Song, Meng, Ermon, 2021), for inversion and spherical interpolation.
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et al., 2022).
    Animating Rotation with Quaternion Curves (Shoemake, 1985), for the interpolation on a sphere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flows.flow import Condition, FlowMatching, Guidance, SampleNoise, Solver
from lightning_flows.modules.base import evaluation
from lightning_flows.networks import check_condition

CLOSE = 1e-6  # times nearer than this are one time, directions with a smaller sine are one direction


class Reconstruction(NamedTuple):
    """Data that went to noise and back, with what was lost on the way.

    Attributes:
        x: the data that came back, shape (B, ...).
        noise: the noise in between, shape (B, C, H, W).
        rms: root mean square over the latent of what the two solves lost, in latent units, shape (B,).
        psnr: peak signal-to-noise ratio in dB of data scaled from [-1, 1] to [0, 1], the codec's own loss included,
            shape (B,); infinite where nothing was lost.
    """

    x: Tensor
    noise: Tensor
    rms: Tensor
    psnr: Tensor


class Inversion:
    """What a flow model with a deterministic solver can do with the noise of given data.

    A mixin before `GenerativeModule`. It uses the model's ``encode(x, noise)``, ``decode(z)``,
    ``field(condition, guidance)``, ``network``, ``objective``, ``solver``, ``steps`` and ``shape``, and what a model
    makes of a guidance and a solver that were given to one call (``_guidance``, ``_check_solver``).

    All methods run in eval mode and without gradients. Guidance is that of the module unless another is given, as at
    sampling; with a scale above 1 the flow is stiffer and its inversion needs more steps. Random numbers are keyed by
    the seed of each sample, so that a result does not depend on the batch around it (for adaptive solvers: up to
    their tolerance).
    """

    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    field: Callable[..., Any]
    objective: FlowMatching
    solver: Solver
    steps: int
    _guidance: Callable[..., Guidance | None]
    _check_solver: Callable[[Solver], None]

    def invert(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The noise that flows to the data: the flow solved from t = 1 back to t = 0.

        Args:
            x: data, shape (B, ...).
            condition: of the data; None for none.
            steps: intervals of the time grid; the module's by default.
            solver: a deterministic solver; the module's by default.
            guidance: a guidance, or the scale of a classifier-free one (1 is off); the module's by default.
            seed: of the draws of a codec that encodes to a distribution.

        Returns:
            Noise, shape (B, C, H, W).

        Raises:
            ValueError: a stochastic solver, or a condition or guidance that does not go with this model.
        """
        flow = _Flow(self, condition, steps, solver, guidance)
        flow.refuse_stochastic("an inversion")
        return flow.backward(flow.latent(x, self._seeds(condition, len(x), seed, None)))

    def from_noise(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
    ) -> Tensor:
        """The data to which given noise (B, C, H, W) flows, shape (B, ...): `invert` undone.

        The other arguments and errors are those of `invert`.
        """
        flow = _Flow(self, condition, steps, solver, guidance)
        flow.refuse_stochastic("the data of given noise")
        self._seeds(condition, len(noise), 0, None)  # one condition for each sample
        return flow.decoded(flow.forward(noise))

    def reconstruct(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
    ) -> Reconstruction:
        """Data (B, ...) to noise and back on the same grid, with the errors of every sample.

        The round trip is closer than the noise: for a rule of even order the leading errors of the two ways cancel.
        The arguments and errors are those of `invert`.
        """
        flow = _Flow(self, condition, steps, solver, guidance)
        flow.refuse_stochastic("a reconstruction")
        z = flow.latent(x, self._seeds(condition, len(x), seed, None))
        noise = flow.backward(z)
        again = flow.forward(noise)
        decoded = flow.decoded(again)
        lost = mean_square((decoded - x.to(decoded)) / 2)  # (B,): [-1, 1] is twice as wide as [0, 1]
        return Reconstruction(decoded, noise, mean_square(again - z).sqrt(), -10 * lost.log10())

    def interpolate(
        self,
        a: Tensor | int,
        b: Tensor | int,
        n: int,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Samples on the great circle between the noises of two ends (see `slerp`), both ends included.

        Args:
            a: where it starts: data of one sample, shape (...), which is inverted, or the seed of a sample.
            b: where it ends, likewise.
            n: number of samples, at least 2.
            condition: one (batch size 1) for all, or two (batch size 2), of ``a`` and of ``b``: each sample takes
                that of its nearer end, the middle one that of ``a``. Conditions are not mixed.
            steps: see `invert`.
            solver: see `invert`.
            guidance: see `invert`.
            seed: see `invert`.

        Returns:
            Shape (n, ...).

        Raises:
            ValueError: fewer than two samples, a condition of another batch size, a stochastic solver, two noises
                that are exactly opposite.
        """
        if n < 2:
            raise ValueError(f"n must be at least 2 (both ends are included), got {n}")
        given = 1 if condition is None or condition.batch_size is None else condition.batch_size
        if given not in (1, 2):
            raise ValueError(f"condition must have batch size 1 (of all) or 2 (of both ends), got {given}")
        options = {"steps": steps, "solver": solver, "guidance": guidance}
        flow = _Flow(self, None, **options)
        flow.refuse_stochastic("an interpolation")
        ends = [
            flow.drawn([end])
            if isinstance(end, int)
            else self.invert(end[None], _rows(condition, [min(k, given - 1)]), seed=seed, **options)
            for k, end in enumerate((a, b))
        ]
        weights = torch.linspace(0, 1, n, dtype=torch.float64)
        nearer = ((weights > 0.5) & (given == 2)).long().tolist()
        return self.from_noise(slerp(ends[0][0], ends[1][0], weights), _rows(condition, nearer), **options)

    def vary(
        self,
        x: Tensor,
        strength: float,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: Guidance | float | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Data like the given ones (SDEdit): fresh noise up to ``t = 1 - strength``, and the flow from there.

        ``x_t = alpha(t) z + sigma(t) x0`` with the path's alpha and sigma and the noise x0 of each seed.

        Args:
            x: data, shape (B, ...).
            strength: how much is replaced, in [0, 1]. 0 is the codec's reconstruction; 1 is the plain sample of the
                seed, in which nothing of ``x`` is left.
            condition: of the result; it need not be that of ``x``.
            steps: intervals of the whole time grid, of which those after ``1 - strength`` are solved.
            solver: any solver, also a stochastic one; the module's by default.
            guidance: see `invert`.
            seed: sample i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each sample, shape (B,).

        Returns:
            Shape (B, ...).

        Raises:
            ValueError: a strength outside [0, 1], counts that disagree, or a condition, guidance or solver that does
                not go with this model.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        flow = _Flow(self, condition, steps, solver, guidance)
        each = self._seeds(condition, len(x), seed, seeds)
        z, x0, grid = flow.latent(x, each), flow.drawn(each), flow.grid_from(1 - strength)
        if len(grid) < 2:
            return flow.decoded(z)
        if strength < 1:  # some paths keep a trace of the data at t = 0
            x0 = self.objective.path.sample(x0, z, grid[0]).x_t
        return flow.decoded(flow.solve(x0, grid, SampleNoise(each)))


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    r"""Points on the great circle from one vector to another.

    .. math:: \frac{\sin((1 - w) \theta)}{\sin\theta} a + \frac{\sin(w \theta)}{\sin\theta} b, \qquad
              \theta = \angle(a, b).

    Between two standard normal vectors of many dimensions, every point has the length of such a vector; on the
    straight line the middle would be shorter by the square root of 2.

    Args:
        a: where w is 0, any shape; one vector.
        b: where w is 1, the same shape.
        weights: w in [0, 1], shape (n,).

    Returns:
        Shape (n, ...), in the dtype of ``a``; the ends are exact.

    Raises:
        ValueError: vectors of different shapes, or opposite ones, between which no circle is the shortest.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    first, second = a.double().flatten(), b.double().flatten()
    cosine = (first @ second / (first.norm() * second.norm()).clamp_min(1e-300)).clamp(-1, 1)
    angle, w = torch.acos(cosine), weights.to(first)
    if float(angle.sin()) >= CLOSE:
        left, right = torch.sin((1 - w) * angle) / angle.sin(), torch.sin(w * angle) / angle.sin()
    elif cosine >= 0:
        left, right = 1 - w, w
    else:
        raise ValueError("a and b must not be opposite: every great circle between them is as short")
    return (left[:, None] * first + right[:, None] * second).reshape(-1, *a.shape).to(a.dtype)


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares of every sample of x (B, ...), float32, shape (B,)."""
    return x.float().square().flatten(1).mean(1)


def _rows(condition: Condition | None, index: list[int]) -> Condition | None:
    return condition if condition is None or condition.batch_size is None else condition[torch.tensor(index)]


class _Flow:
    """A model with what one call asks of it: condition, grid, solver and guidance."""

    def __init__(
        self,
        model: Any,
        condition: Condition | None,
        steps: int | None,
        solver: Solver | None,
        guidance: Guidance | float | None,
    ) -> None:
        self.model, self.solver = model, solver or model.solver
        model._check_solver(self.solver)
        check_condition(model.network, condition)
        self.condition = None if condition is None else condition.to(model.device)
        self.guidance = model._guidance(guidance)
        self.grid = model.objective.times.grid(model.steps if steps is None else steps, device=model.device)

    def refuse_stochastic(self, what: str) -> None:
        if self.solver.stochastic:
            raise ValueError(f"solver must be deterministic for {what}, got {type(self.solver).__name__}")

    def grid_from(self, start: float) -> Tensor:
        """The times of the grid after ``start``, and ``start`` before them; (1,) where nothing is left."""
        return torch.cat([self.grid.new_tensor([start]), self.grid[self.grid > start + CLOSE]])

    def drawn(self, seeds: Sequence[int]) -> Tensor:
        """The noise from which `GenerativeModule.sample` starts, shape (B, C, H, W)."""
        like = torch.empty(len(seeds), *self.model.shape, device=self.model.device)
        return self.model.objective.source.sample(SampleNoise(seeds), "source", like)

    @torch.no_grad()
    def latent(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        with evaluation(self.model):
            return self.model.encode(x.to(self.model.device), SampleNoise(seeds))

    @torch.no_grad()
    def decoded(self, z: Tensor) -> Tensor:
        with evaluation(self.model):
            return self.model.decode(z)

    def forward(self, noise: Tensor) -> Tensor:
        return self.solve(noise, self.grid)

    def backward(self, z: Tensor) -> Tensor:
        return self.solve(z, self.grid.flip(0))

    @torch.no_grad()
    def solve(self, x: Tensor, grid: Tensor, noise: SampleNoise | None = None) -> Tensor:
        """The state at the end of a grid that may start anywhere and run either way."""
        with evaluation(self.model):
            field = self.model.field(self.condition, self.guidance)  # new for each solve: a guidance may have state
            return self.solver.solve(field, x.to(grid.device), grid, noise).x
