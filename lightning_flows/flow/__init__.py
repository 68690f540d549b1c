"""Floor 0: the mathematics of flows, on torch alone.

Time runs from noise (0) to data (1); ``x0`` is noise, ``x1`` is data, and ``velocity`` is ``dx_t / dt``.
"""

from lightning_flows.flow.affine import Affine, AffineGuidance, GaussianProduct, LogLinear, log_normal
from lightning_flows.flow.condition import STREAMS, Condition, Tokens
from lightning_flows.flow.couplings import Coupling, Independent, OptimalTransport
from lightning_flows.flow.fields import Field, Velocity
from lightning_flows.flow.guidance import (
    AdaptiveProjected,
    Autoguidance,
    ClassifierFree,
    Guidance,
    RatioAware,
    ZeroStar,
)
from lightning_flows.flow.likelihood import (
    Density,
    Divergence,
    Exact,
    Hutchinson,
    bits_per_dim,
    dequantize,
    log_prob,
)
from lightning_flows.flow.markov import Hamiltonian
from lightning_flows.flow.maximum_likelihood import (
    DataNoise,
    Dequantization,
    GaussianNoise,
    MaximumLikelihood,
    tweedie,
)
from lightning_flows.flow.noise import Noise, SampleNoise, StepNoise, key, seeds_from
from lightning_flows.flow.objectives import FlowMatching, Losses, Objective
from lightning_flows.flow.paths import Linear, Path, PathSample, Trigonometric, VariancePreserving
from lightning_flows.flow.premetrics import Premetric, PseudoHuber, SquaredError
from lightning_flows.flow.solvers import (
    RK4,
    Diffusion,
    DormandPrince,
    Euler,
    EulerMaruyama,
    Heun,
    Heun3,
    Midpoint,
    PseudoCorrector,
    Solution,
    Solver,
    Step,
    StochasticHeun,
)
from lightning_flows.flow.sources import Gaussian, Source
from lightning_flows.flow.symmetric import SymmetricMatching
from lightning_flows.flow.times import (
    CosMap,
    LogitNormal,
    Mode,
    Stratified,
    TimeSampler,
    Uniform,
    UShaped,
    shift_time,
    time_grid,
)

__all__ = [
    "RK4",
    "STREAMS",
    "AdaptiveProjected",
    "Affine",
    "AffineGuidance",
    "Autoguidance",
    "ClassifierFree",
    "Condition",
    "CosMap",
    "Coupling",
    "DataNoise",
    "Density",
    "Dequantization",
    "Diffusion",
    "Divergence",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "Field",
    "FlowMatching",
    "Gaussian",
    "GaussianNoise",
    "GaussianProduct",
    "Guidance",
    "Hamiltonian",
    "Heun",
    "Heun3",
    "Hutchinson",
    "Independent",
    "Linear",
    "LogLinear",
    "LogitNormal",
    "Losses",
    "MaximumLikelihood",
    "Midpoint",
    "Mode",
    "Noise",
    "Objective",
    "OptimalTransport",
    "Path",
    "PathSample",
    "Premetric",
    "PseudoCorrector",
    "PseudoHuber",
    "RatioAware",
    "SampleNoise",
    "Solution",
    "Solver",
    "Source",
    "SquaredError",
    "Step",
    "StepNoise",
    "StochasticHeun",
    "Stratified",
    "SymmetricMatching",
    "TimeSampler",
    "Tokens",
    "Trigonometric",
    "UShaped",
    "Uniform",
    "VariancePreserving",
    "Velocity",
    "ZeroStar",
    "bits_per_dim",
    "dequantize",
    "key",
    "log_normal",
    "log_prob",
    "seeds_from",
    "shift_time",
    "time_grid",
    "tweedie",
]
