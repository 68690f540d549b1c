"""Solvers: Euler to Dormand-Prince, and stochastic ones."""

from lightning_flows.flow.solvers.base import FieldLike, Solution, Solver, Step
from lightning_flows.flow.solvers.dormand_prince import DormandPrince
from lightning_flows.flow.solvers.fixed import RK4, Euler, FixedStep, Heun, Heun3, Midpoint, PseudoCorrector
from lightning_flows.flow.solvers.stochastic import Diffusion, EulerMaruyama, StochasticHeun, StochasticSolver

__all__ = [
    "RK4",
    "Diffusion",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "FieldLike",
    "FixedStep",
    "Heun",
    "Heun3",
    "Midpoint",
    "PseudoCorrector",
    "Solution",
    "Solver",
    "Step",
    "StochasticHeun",
    "StochasticSolver",
]
