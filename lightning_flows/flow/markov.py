r"""Markov chains that leave a density invariant: Hamiltonian Monte Carlo for every sample of a batch on its own.

A proposal follows Hamilton's equations of :math:`H(x, p) = -\log \pi(x) + \tfrac 12 |p|^2` for L leapfrog steps of
size :math:`\epsilon` from a fresh momentum :math:`p \sim N(0, I)`,

.. math::

    p \leftarrow p + \tfrac\epsilon 2 \nabla\log\pi(x), \quad x \leftarrow x + \epsilon p, \quad
    p \leftarrow p + \tfrac\epsilon 2 \nabla\log\pi(x),

and is accepted with probability :math:`\min(1, e^{H(x, p) - H(x', p')})`. Leapfrog steps preserve volume and can be
walked back with the momentum reversed, so that this ratio is all that detailed balance asks for. One step, L = 1, is
the Metropolis-adjusted Langevin algorithm. The normaliser of :math:`\pi` is not needed.

References:
    Hybrid Monte Carlo (Duane, Kennedy, Pendleton, Roweth, 1987).
    MCMC using Hamiltonian dynamics (Neal, 2011), also for random step sizes.
    Optimal scaling of discrete approximations to Langevin diffusions (Roberts, Rosenthal, 1998): acceptance 0.574.
    Optimal tuning of the hybrid Monte Carlo algorithm (Beskos, Pillai, Roberts, Sanz-Serna, Stuart, 2013): 0.651.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]  # (B, ...) -> nats (B,), differentiable
JITTER = 0.2  # share by which step sizes vary: without, orbits of a quadratic density may return to where they began


class State(NamedTuple):
    """Where the chains are.

    Attributes:
        x: points, shape (B, ...).
        log_prob: log-density up to a constant, nats, shape (B,).
        gradient: of the log-density, shape (B, ...); zero where nothing may move.
    """

    x: Tensor
    log_prob: Tensor
    gradient: Tensor

    def where(self, accept: Tensor, other: State) -> State:
        """``other`` where ``accept`` (B,) is True, this elsewhere."""
        return State(*(torch.where(over(accept, new), new, old) for old, new in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Hamiltonian:
    """Proposals of Hamiltonian Monte Carlo.

    Args:
        leapfrog: number L of steps of a proposal, each with one gradient; 1 is the Langevin proposal.

    Raises:
        ValueError: no step.
    """

    leapfrog: int = 8

    def __post_init__(self) -> None:
        if self.leapfrog < 1:
            raise ValueError(f"leapfrog must be at least 1 (1: the Langevin proposal), got {self.leapfrog}")

    @property
    def target(self) -> float:
        """Share of accepted proposals at which a chain in many dimensions moves best."""
        return 0.574 if self.leapfrog == 1 else 0.651

    def start(self, density: LogDensity, x: Tensor, free: Tensor) -> State:
        """The state of points ``x`` (B, ...), of which what ``free`` (broadcastable; 1 or 0) marks may move.

        Raises:
            RuntimeError: inside ``torch.inference_mode``.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("this chain needs gradients: leave torch.inference_mode")
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            log_prob = density(leaf)
            (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        return State(x, log_prob.detach(), gradient * free)

    def propose(
        self, density: LogDensity, state: State, momentum: Tensor, step_size: Tensor, free: Tensor
    ) -> tuple[State, Tensor]:
        """Where the chains would go, and the logarithm of the ratio by which that is accepted, shape (B,).

        Args:
            density: log pi.
            state: where they are.
            momentum: standard normal, shape (B, ...).
            step_size: epsilon of every sample, shape (B,).
            free: see `start`.
        """
        step = over(step_size, state.x)
        first = p = momentum * free
        now = state
        for _ in range(self.leapfrog):
            p = p + 0.5 * step * now.gradient
            now = self.start(density, now.x + step * p, free)
            p = p + 0.5 * step * now.gradient
        kinetic = 0.5 * (first.square() - p.square()).flatten(1).sum(1)
        return now, now.log_prob - state.log_prob + kinetic


def accepted(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    """Metropolis' decisions, bool (B,), for log ratios and numbers in [0, 1); what is not a number is refused."""
    return uniform.log() < log_ratio


def adapted(step_size: Tensor, log_ratio: Tensor, target: float, count: int) -> Tensor:
    r"""Step sizes (B,) moved towards a share of accepted proposals, less and less (Robbins and Monro, 1951).

    .. math:: \log\epsilon \leftarrow \log\epsilon + (\min(1, e^r) - \text{target}) / \sqrt{\text{count}}

    Only in the part of a chain that is thrown away: sizes that follow the states break detailed balance.
    """
    chance = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
    return step_size * torch.exp((chance - target) / count**0.5)


def jittered(step_size: Tensor, uniform: Tensor) -> Tensor:
    """Step sizes (B,) changed by up to `JITTER`, by numbers in [0, 1) that do not depend on the states."""
    return step_size * (1 - JITTER + 2 * JITTER * uniform)


def over(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample (B,), broadcastable to ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
