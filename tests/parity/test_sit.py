"""SiT: network, transport algebra, losses, samplers and likelihood, against `parity/sit`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flows.flow import (
    RK4,
    ClassifierFree,
    Condition,
    Diffusion,
    DormandPrince,
    Euler,
    EulerMaruyama,
    Field,
    FlowMatching,
    Heun,
    Heun3,
    Hutchinson,
    Linear,
    Midpoint,
    Noise,
    StepNoise,
    StochasticHeun,
    TimeSampler,
    Trigonometric,
    VariancePreserving,
    Velocity,
    log_prob,
)
from lightning_flows.hub.convert import load_network
from tests.parity.parity_cases import INSIDE, answer, check_sizes, every_case, every_output, inside

HYPER_PARAMETERS = {
    "input_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_size": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "num_classes": "num_classes",
    "class_dropout": "label_dropout",
    "learn_sigma": "learn_sigma",
    "network_output_channels": "out_channels",
    "frequency_embedding_size": "frequency_size",
    "max_period": "max_period",
}
TOLD = ("input_size", "num_heads", "label_dropout", "max_period")  # what the shapes cannot say
PATHS = {"Linear": Linear(), "GVP": Trigonometric(), "VP": VariancePreserving(0.1, 20.0)}
SOLVERS = {"euler": Euler(), "midpoint": Midpoint(), "heun2": Heun(), "heun3": Heun3(), "rk4": RK4("3/8")}
LASTS = {"Mean": "mean", "Tweedie": "tweedie", "Euler": "euler", "None": "noise"}
WEIGHTINGS = {"plain": "uniform", "velocity": "velocity", "likelihood": "likelihood"}
PATH = "(?P<path>Linear|GVP|VP)"
QUANTITY = "velocity|noise|score"
FORM = "(?P<form>[A-Za-z-]+)"
SAMPLE_EPS = 1e-3


class StoredNoise(Noise):
    """Draws that were stored, by purpose."""

    def __init__(self, draws):
        self.draws = draws

    def draw(self, purpose, shape, sampler):
        return self.draws[purpose].reshape(tuple(shape))

    def generator(self, purpose):
        raise AssertionError(f"nothing is drawn here, but {purpose!r} was asked for")


@dataclass(frozen=True)
class StoredTimes(TimeSampler):
    """Training times that were stored."""

    times: Tensor
    shift: float = 1.0

    def __call__(self, n, generator):
        return self.times

    def _quantile(self, u):
        raise NotImplementedError

    def _density(self, t):
        raise NotImplementedError


@dataclass(frozen=True)
class FirstChannels(ClassifierFree):
    """The guidance of the official code: three channels are guided, the others stay conditional."""

    channels: int = 3

    def _combine(self, wanted, worse, x, t, path):
        guided = super()._combine(wanted, worse, x, t, path)
        return torch.cat([guided[:, : self.channels], wanted[:, self.channels :]], dim=1)


def network_of(case):
    hyper = case.hyper_parameters(HYPER_PARAMETERS)
    return load_network("sit", case.weights, **{name: hyper[name] for name in TOLD if name in hyper})


def condition_of(case):
    return Condition(label=case.inputs["y"]) if "y" in case.inputs else None


def field_of(case, path, prediction="velocity", guidance=None):
    velocity = Velocity(network_of(case), PATHS[path], prediction, floor=0.0)
    return Field(velocity, condition_of(case), guidance)


# ---- network ----


def velocity(case):
    return network_of(case)(case.inputs["x"], case.inputs["t"], condition_of(case)), "forward"


def velocity_null_class(case):
    return network_of(case)(case.inputs["x"], case.inputs["t"]), "forward"


def velocity_cfg(case, channels):
    x, t = case.inputs["x"], case.inputs["t"]
    scale = case.number("scale {}", 4.0, f"output.velocity_cfg_{channels}_channels")
    if channels == "all":
        return field_of(case, "Linear", guidance=ClassifierFree(scale))(x, t), "forward"
    guided = field_of(case, "Linear", guidance=FirstChannels(scale))(x, t)
    null = torch.cat([guided[:, :3], network_of(case)(x, t)[:, 3:]], dim=1)
    return torch.cat([guided, null]), "forward"  # both halves of their doubled batch


def intermediate(case, name):
    network = network_of(case)
    return inside(network, case.inputs["x"], case.inputs["t"], condition_of(case))[name], "forward"


# ---- transport ----


def point_of(case, path):
    return PATHS[path].sample(case.inputs["x0_noise"], case.inputs["x1_data"], case.inputs["t"])


def coefficient(case, path, name):
    return getattr(PATHS[path], name)(case.inputs["t"]), "relative"


def point(case, path, name):
    sample = point_of(case, path)
    return {"xt": sample.x_t, "ut": sample.velocity}[name], "relative"


def drift(case, path, diffusion):
    rate, w = PATHS[path].drift(case.inputs["t"])
    if diffusion:
        return w, "relative"
    return -rate.reshape(-1, 1, 1, 1) * point_of(case, path).x_t, "relative"


def converted(case, path, to, given):
    sample = point_of(case, path)
    value = PATHS[path].convert(case.inputs["model_output"], sample.x_t, sample.t, given=given, to=to)
    return value, "relative"


def diffusion(case, path, form):
    law = Diffusion(form.lower(), case.number("magnitude {}", 0.7, "diffusion.*"), maximum=math.inf)
    return torch.tensor([law(PATHS[path], t) for t in case.inputs["t"]]), "relative"


def loss(case, path, prediction, weight):
    times = StoredTimes(case.inputs["t"])
    objective = FlowMatching(path=PATHS[path], times=times, prediction=prediction, weighting=WEIGHTINGS[weight])
    losses = objective(
        network_of(case), case.inputs["x1_data"], condition_of(case), StepNoise(0), x0=case.inputs["x0_noise"]
    )
    return losses.loss, "relative"


# ---- samplers ----


def ends(case, path, prediction, *, sde=False, form=None, last=0.0):
    """Where the official code starts and stops (document of LFM and SiT, section 15)."""
    exact = path != "VP" and prediction == "velocity"
    eps = 0.0 if exact else SAMPLE_EPS
    start = 0.0 if path == "VP" or (exact and not (sde and form == "SBDM")) else SAMPLE_EPS
    return start, 1 - (last if sde and last else eps)


def ode(case, path, prediction, method, atol, rtol, flags):
    points = int(case.number(r"linspace\(t0,t1,{}\)", 9))
    grid = torch.linspace(*ends(case, path, prediction), points)
    options = flags.split(".")[1:]
    assert len(set(options)) == len(options)
    if "reverse" in options:
        grid = 1 - grid
    scale = case.number("guidance scale {}", 4.0, "ode...cfg")
    guidance = FirstChannels(scale) if "cfg" in options else None
    field = field_of(case, path, prediction, guidance)
    if method != "dopri5":
        return SOLVERS[method].solve(field, case.inputs["noise"], grid).x, "fixed_step"
    solver = DormandPrince(rtol=float(rtol or 1e-3), atol=float(atol or 1e-6), end="interpolate")
    return solver.solve(field, case.inputs["noise"], grid).x, "dopri5"


def sde(case, path, prediction, form, method, last):
    key = "sde.PATH.PRED.FORM.METHOD.LAST"
    size = 0.0 if last == "None" else case.number("of size {}", 0.04, key)
    start, stop = ends(case, path, prediction, sde=True, form=form, last=size)
    draws = case.inputs["sde_noise"]
    grid = torch.linspace(start, stop, len(draws) + 1)
    if last != "None":
        grid = torch.cat([grid, grid[-1:] + size])
    scale = case.number("diffusion magnitude {}", 0.8, key)
    law = Diffusion(form.lower(), scale, maximum=math.inf)
    solvers = {
        "Euler": EulerMaruyama(law, LASTS[last]),
        "Heun": StochasticHeun(law, LASTS[last], noise_at="start"),
    }
    noise = StoredNoise(dict(enumerate(draws)))
    field = field_of(case, path, prediction)
    return solvers[method].solve(field, case.inputs["noise"], grid, noise).x, "fixed_step"


def likelihood(case, name):
    points = int(case.number(r"linspace\(0,1,{}\)", 9, "likelihood.*"))
    noise = StoredNoise({"probe/0": case.inputs["hutchinson_probe"]})
    density = log_prob(
        field_of(case, "Linear"),
        case.inputs["data"],
        solver=Euler(),
        grid=torch.linspace(0, 1, points),
        divergence=Hutchinson(),
        noise=noise,
    )
    return (density.log_prob, "log_prob") if name == "log_prob" else (density.x0, "fixed_step")


RULES = {
    r"output\.velocity": velocity,
    r"output\.velocity_null_class": velocity_null_class,
    r"output\.velocity_cfg_(?P<channels>three|all)_channels": velocity_cfg,
    INSIDE: intermediate,
    rf"{PATH}\.(?P<name>alpha|sigma|d_alpha|d_sigma)": coefficient,
    rf"{PATH}\.(?P<name>xt|ut)": point,
    rf"{PATH}\.drift(?P<diffusion>_diffusion)?": drift,
    rf"{PATH}\.(?P<to>{QUANTITY})_from_(?P<given>{QUANTITY})": converted,
    rf"{PATH}\.diffusion\.{FORM}": diffusion,
    rf"{PATH}\.loss\.(?P<prediction>{QUANTITY})\.(?P<weight>plain|velocity|likelihood)": loss,
    rf"ode\.{PATH}\.(?P<prediction>{QUANTITY})\.(?P<method>[a-z]+\d?)"
    r"(?:\.atol(?P<atol>[0-9.e-]+?)\.rtol(?P<rtol>[0-9.e-]+?))?(?P<flags>(?:\.(?:cfg|reverse))*)": ode,
    rf"sde\.{PATH}\.(?P<prediction>{QUANTITY})\.{FORM}\.(?P<method>Euler|Heun)"
    rf"\.(?P<last>{'|'.join(LASTS)})": sde,
    r"likelihood\.(?P<name>log_prob|latent)": likelihood,
}


@every_output("sit")
def test_sit_gives_the_official_numbers(case, output):
    case.compare(output, *answer(RULES, case, output))


@every_case("sit")
def test_sit_has_the_official_sizes(case):
    network, expected = network_of(case), case.hyper_parameters(HYPER_PARAMETERS)
    check_sizes(network, expected, {"out_channels": network.shape[0] * network.heads})
