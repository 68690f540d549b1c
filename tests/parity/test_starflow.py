"""Apple's latent flow against `parity/starflow`, through the converter that users get."""

from functools import cache

import torch

from lightning_flows.flow import Affine, Condition, GaussianProduct, Tokens
from lightning_flows.hub.convert import load_network
from lightning_flows.networks import Jacobi, Sequential
from tests.parity.flow_cases import answer, pairs_of, tweedie_step

TOLD = {
    "head_dim": "head_size",
    "rotary_reference_length": "reference_length",
    "text_length": "text_length",
    "soft_clip": "soft_clip",
    "rotary_half_split": "half_split",
    "data_channels": "in_channels",
    "image_size": "input_size",
    "rotary_theta": "theta",
}  # what shapes cannot say, by the converter's names
READ = {  # what shapes say, by our names
    "deep_block_width": "deep_hidden_size",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "start_token": "start_token",
    "text_dim": "text_size",
    "condition_deep_block_only": "deep_condition_only",
    "swiglu": "gated_mlp",
    "linear_bias": "bias",
    "query_key_norm": "qk_norm",
    "post_norm": "post_norm",
    "final_norm": "final_norm",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers_per_block": "depth",
    "mlp_ratio": "mlp_ratio",
}
FIXED = {  # what every image model has
    "rotary": (1,),
    "denoiser": (0,),
    "text_conditioned_denoiser": (0,),
    "temporal_causal": (0,),
    "frame_local_shallow_blocks": (0,),
    "denoiser_frame_window": (None,),
    "attention_frame_window": (None,),
    "denoiser_layers": (0,),
    "rotary_third_axis_channels": (8,),
}
TURNED = {"softplus_scale", "sequence_order", "norm_type", "num_blocks"}  # said in other words, below
KNOWN = {
    "outputs", "operation", "data", "text", "loss_weight", "notes", "noise", "text_batch", "method", "guidance",
    "return_sequence", "guide_top", "jacobi", "jacobi_block_size", "jacobi_max_iter", "jacobi_th", "context_length",
    "sigma", "mean", "scale", "weight",
}  # fmt: skip


@cache
def network_of(case):
    names = {*TOLD, *READ, *FIXED, *TURNED}
    given = case.hyper_parameters({name: name for name in names})
    for name, allowed in FIXED.items():
        assert given[name] in allowed, (name, given[name])
    told = {ours: given[name] for name, ours in TOLD.items() if given[name] is not None}
    told |= {"half_split": bool(given["rotary_half_split"]), "reverse_first": given["sequence_order"] == "L2R"}
    told["scale"] = "softplus" if given["softplus_scale"] else "exp"
    network = load_network("starflow", case.weights, **told)
    settled = network.config["init_args"]
    for name, ours in READ.items():
        wanted = given[name]
        if name == "deep_block_width":
            wanted = wanted or given["width"]
        if isinstance(settled[ours], bool):
            wanted = bool(wanted)
        if wanted is not None:
            assert settled[ours] == wanted, (ours, settled[ours], wanted)
    assert settled["norm"] == {"layer_norm": "layer", "rms_norm": "rms"}[given["norm_type"]]
    assert len(network.blocks) == given["num_blocks"]
    return network


def text_condition(values):
    return Condition(tokens=Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool)))


def patchify(case, call, output):
    network = network_of(case)
    named = output.partition("[")[2].partition("]")[0]
    x = case.tensors[f"in/image_{named}"]
    return grid_of(network, network.patchify(x), x), "encode"


def grid_of(network, tokens, x):
    return tokens.unflatten(1, network.grid(x))


def encode(case, call, output):
    network, x = network_of(case), case.input(call, "data")
    condition = text_condition(case.input(call, "text"))
    found = network(x, condition, states=True)
    dims, what = x[0].numel(), output.rpartition("/")[2]
    if what.startswith("logdet_"):
        return log_det_elements(network, found, x, condition, int(what[7:])), "encode"
    states = [*found.states, network.patchify(found.z)]
    half, log_det = found.z.square().flatten(1).mean(1) / 2, found.log_det / dims
    weight = 1.0 if call["loss_weight"] is None else call["loss_weight"]
    values = {
        "z": found.z,
        "nll_per_sample": half - log_det,
        "loss": (weight * (half - log_det)).mean()[None],
        "loss_z": half.mean()[None],
        "loss_logdet": -log_det.mean()[None],
        **{f"state_{i}": grid_of(network, state, x) for i, state in enumerate(states)},
    }
    return values[what], "encode"


def log_det_elements(network, found, x, condition, b):
    """Every element of a block's log-determinant, in its own order."""
    block, context = network.blocks[b], network.contexts(condition, len(x))[b]
    rotation = network.rotations(*network.grid(x), x.device)[b]
    return -block.affine(block.scanned(found.states[b]), context, rotation).log_scale


def sample(case, call, output):
    network, z = network_of(case), case.input(call, "noise")
    texts = [text_condition(case.tensors[name]) for name in call["text_batch"]]
    seen = [z]

    def watch(part):
        if part.x is not None:
            seen.append(network.unpatchify(part.x, *network.grid(z)))

    x = network.inverse(
        z,
        texts[0],
        guidance=GaussianProduct(1 + call.get("guidance", 0), deep_only=bool(call.get("guide_top", 0))),
        null=texts[1] if len(texts) > 1 else None,
        method=method_of(call),
        watch=watch,
    )
    place = output.rpartition("]/")[2]
    return (seen[int(place)] if place.isdigit() else x), "sample"


def method_of(call):
    if not call.get("jacobi"):
        return Sequential()
    return Jacobi(
        segment=call["jacobi_block_size"],
        threshold=call["jacobi_th"],
        max_iterations=call["jacobi_max_iter"],
        faithful=True,
    )


def denoise(case, call, output):
    network, condition = network_of(case), text_condition(case.input(call, "text"))

    def log_prob(x):
        z, log_det = network(x, condition)
        return log_det - z.square().flatten(1).sum(1) / 2

    return tweedie_step(log_prob, case.input(call, "data"), call["sigma"]), "denoise"


def guide(case, call, output):
    mean, scale = case.input(call, "mean"), case.input(call, "scale")
    half = len(mean) // 2
    pair = Affine(mean[:half], scale[:half].log()), Affine(mean[half:], scale[half:].log())
    found = GaussianProduct(1 + call["weight"])(*pair, torch.ones(mean.shape[1]))
    value = found.mean if output.endswith("mean") else found.log_scale.exp()
    return value.repeat(2, 1, 1), "encode"


OPERATIONS = {
    "data to prior": encode,
    "channels-last patch grid": patchify,
    "prior to data": sample,
    "one Tweedie step": denoise,
    "guided mean and scale": guide,
}


@pairs_of("starflow", skip=("helpers.json",))
def test_starflow_gives_the_official_numbers(case, output):
    case.compare(output, *answer(OPERATIONS, KNOWN, case, output))
