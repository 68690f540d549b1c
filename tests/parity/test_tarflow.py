"""Apple's pixel flow against `parity/tarflow`, through the converter that users get."""

import math
from functools import cache

from lightning_flows.flow import Condition, LogLinear
from lightning_flows.hub.convert import load_network
from lightning_flows.networks import Sequential
from lightning_flows.networks.tarflow import tracked
from tests.parity.flow_cases import answer, pairs_of, tweedie_step

HYPER_PARAMETERS = {
    "data_channels": "in_channels",
    "image_size": "input_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "num_blocks": "num_blocks",
    "layers_per_block": "depth",
    "affine_scale": "affine_scale",
    "num_classes": "num_classes",
    "head_dim": "head_size",
    "mlp_ratio": "mlp_ratio",
}
TOLD = ("in_channels", "input_size", "head_size")  # what the shapes cannot say
KNOWN = {
    "outputs", "operation", "image", "labels", "notes", "noise", "guidance", "annealed_guidance", "guide_what",
    "attn_temp", "sigma",
}  # fmt: skip


@cache
def network_of(case):
    hyper = case.hyper_parameters(HYPER_PARAMETERS)
    network = load_network("tarflow", case.weights, **{name: hyper[name] for name in TOLD})
    settled = network.config["init_args"]
    depth = hyper["depth"] if isinstance(hyper["depth"], list) else [hyper["depth"]] * hyper["num_blocks"]
    assert settled["depth"] == depth
    for name in ("patch_size", "hidden_size", "num_blocks", "mlp_ratio"):
        assert settled[name] == hyper[name], name
    assert (settled["num_classes"] or 0) == hyper["num_classes"]
    assert settled["volume_preserving"] == (not hyper["affine_scale"])
    return network


def condition_of(case, call):
    labels = case.input(call, "labels")
    if labels is None or not len(labels):
        return None
    return Condition(label=labels.clamp(min=0), present={"label": labels >= 0})


def patchify(case, call, output):
    network, name = network_of(case), "in/image"
    assert output == f"out/patchify({name[3:]})"
    return network.patchify(case.tensors[name]), "encode"


def unpatchify(case, call, output):
    network = network_of(case)
    assert output == "out/unpatchify(noise)"
    return network.unpatchify(case.tensors["in/noise"], *grid(network)), "encode"


def grid(network):
    return tuple(side // network.patch_size for side in network.shape[1:])


def encoded(case, call):
    network, x = network_of(case), case.input(call, "image")
    return network, network(x, condition_of(case, call), states=True)


def encode(case, call, output):
    network, found = encoded(case, call)
    what, z = output.rpartition("/")[2], network.patchify(found.z)
    dims = z[0].numel()
    log_det, half = found.log_det / dims, z.square().flatten(1).mean(1) / 2
    each = half - log_det
    after = [*found.states[1:], z]
    values = {
        "z": z,
        "logdet": log_det,
        "loss": each.mean()[None],
        "loss_per_sample": each,
        "bits_per_dim_256_levels": (half + math.log(2 * math.pi) / 2 + math.log(128) - log_det) / math.log(2),
        **{f"after_block_{i}": state for i, state in enumerate(after)},
    }
    return values[what], "encode"


def guidance_of(call):
    weight = call.get("guidance", 0)
    what = {"a": "scale", "b": "mean", "ab": "both"}[call.get("guide_what", "ab")]
    return LogLinear(1 + weight, call.get("annealed_guidance", False), call.get("attn_temp", 1.0), what)


def sample(case, call, output):
    network, noise = network_of(case), case.input(call, "noise")
    std = network.prior_std()
    z = network.unpatchify(noise if std is None else noise * std, *grid(network))
    seen = [network.unpatchify(noise, *grid(network))]  # before the prior's variance
    x = network.inverse(
        z,
        condition_of(case, call),
        guidance=guidance_of(call),
        method=Sequential(),
        watch=lambda part: part.x is not None and seen.append(network.unpatchify(part.x, *grid(network))),
    )
    place = output.rpartition("]/")[2]
    return (seen[int(place)] if place.isdigit() else x), "sample"


def variance(case, call, output):
    named = call["operation"].rpartition("encode[")[2].partition("]")[0]
    z = case.tensors[f"out/encode[{named}]/z"]
    return tracked(case.weights["var"], z), "encode"


def denoise(case, call, output):
    network, condition = network_of(case), condition_of(case, call)

    def log_prob(x):
        z, log_det = network(x, condition)
        return log_det - z.square().flatten(1).sum(1) / 2

    return tweedie_step(log_prob, case.input(call, "image"), call["sigma"]), "denoise"


OPERATIONS = {
    "cut in/image into": patchify,
    "lay the sequence in/noise": unpatchify,
    "data to prior": encode,
    "prior to data": sample,
    "as sample, returning": sample,
    "running prior variance": variance,
    "one Tweedie step": denoise,
}


@pairs_of("tarflow")
def test_tarflow_gives_the_official_numbers(case, output):
    case.compare(output, *answer(OPERATIONS, KNOWN, case, output))
