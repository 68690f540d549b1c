"""LFM's transformer (time from data to noise) and its samplers, against `parity/lfm_dit`."""

import torch

from lightning_flows.flow import (
    RK4,
    ClassifierFree,
    Condition,
    DormandPrince,
    Euler,
    Field,
    Heun,
    Linear,
    Midpoint,
    Velocity,
)
from lightning_flows.hub.convert import load_network
from tests.parity.parity_cases import INSIDE, answer, check_sizes, every_case, every_output, inside

HYPER_PARAMETERS = {
    "input_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "hidden_size": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "num_classes": "num_classes",
    "label_dropout": "label_dropout",
    "learn_sigma": "learn_sigma",
    "frequency_embedding_size": "frequency_size",
    "max_period": "max_period",
    "has_null_class_row": "has_null_row",
}
TOLD = ("input_size", "num_heads", "label_dropout", "max_period")  # what the shapes cannot say
SOLVERS = {"euler": Euler(), "heun": Heun(), "midpoint": Midpoint(), "rk4": RK4("3/8")}


def network_of(case):
    hyper = case.hyper_parameters(HYPER_PARAMETERS)
    return load_network("lfm-dit", case.weights, **{name: hyper[name] for name in TOLD if name in hyper})


def condition_of(case):
    return Condition(label=case.inputs["y"]) if "y" in case.inputs else None


def guided(case, key):
    return ClassifierFree(case.number("scale {}", 1.5, key))


def field_of(case, guidance=None):
    return Field(Velocity(network_of(case), Linear(1e-5)), condition_of(case), guidance)


def theirs(value):
    """Velocities point from data to noise there."""
    return -value


def velocity(case):
    x, t = case.inputs["x"], case.inputs["t"]
    return theirs(network_of(case)(x, 1 - t, condition_of(case))), "forward"


def velocity_scalar_time(case):
    t = torch.tensor(case.number("0-dim (?:tensor|time) {}", 0.37, "output.velocity_scalar_time"))
    return theirs(network_of(case)(case.inputs["x"], 1 - t, condition_of(case))), "forward"


def velocity_null_class(case):
    return theirs(network_of(case)(case.inputs["x"], 1 - case.inputs["t"])), "forward"


def velocity_cfg(case):
    key = "output.velocity_cfg"
    t = torch.tensor(case.number("time {}", 0.37, key))
    value = theirs(field_of(case, guided(case, key))(case.inputs["x"], 1 - t))
    return value.repeat(2, 1, 1, 1), "forward"  # returned once for each half of their doubled batch


def sample_on_a_grid(case, method, guidance):
    end, points = case.number(r"linspace\(1, {},", 1e-5), case.number(r"linspace\(1, \S+, {}\)", 9)
    rule = guided(case, f"output.sample_{method}_grid_cfg") if guidance else None
    grid = 1 - torch.linspace(1, end, int(points))
    return SOLVERS[method].solve(field_of(case, rule), case.inputs["noise"], grid).x, "fixed_step"


def sample_fixed_step(case, method):
    steps = round(1 / case.number("step_size {}", 0.125, f"output.sample_torchdiffeq_{method}"))
    grid = torch.linspace(0, 1, steps + 1)
    return SOLVERS[method].solve(field_of(case), case.inputs["noise"], grid).x, "fixed_step"


def sample_dopri5(case, guidance):
    key = f"output.sample_dopri5{guidance or ''}"
    tolerance = case.number("atol=rtol={}", 1e-5, key)
    solver = DormandPrince(rtol=tolerance, atol=tolerance, end="interpolate")
    field = field_of(case, guided(case, key) if guidance else None)
    solution = solver.solve(field, case.inputs["noise"], torch.tensor([0.0, 1.0]))
    assert solution.nfe == case.number("NFE {}", solution.nfe, key)
    return solution.x, "dopri5"


def intermediate(case, name):
    """At their time, from data to noise."""
    network = network_of(case).network
    return inside(network, case.inputs["x"], case.inputs["t"], condition_of(case))[name], "forward"


RULES = {
    r"output\.velocity": velocity,
    r"output\.velocity_scalar_time": velocity_scalar_time,
    r"output\.velocity_null_class": velocity_null_class,
    r"output\.velocity_cfg": velocity_cfg,
    r"output\.sample_(?P<method>euler|heun)_grid(?P<guidance>_cfg)?": sample_on_a_grid,
    r"output\.sample_torchdiffeq_(?P<method>euler|midpoint|rk4)": sample_fixed_step,
    r"output\.sample_dopri5(?P<guidance>_cfg)?": sample_dopri5,
    INSIDE: intermediate,
}


@every_output("lfm_dit")
def test_lfm_dit_gives_the_official_numbers(case, output):
    case.compare(output, *answer(RULES, case, output))


@every_case("lfm_dit")
def test_lfm_dit_has_the_official_sizes(case):
    network, expected = network_of(case).network, case.hyper_parameters(HYPER_PARAMETERS)
    rows = network.y_embedder.embedding_table.num_embeddings
    derived = {
        "out_channels": network.shape[0] * network.heads,
        "has_null_row": rows > expected["num_classes"],
    }
    check_sizes(network, expected, derived)
