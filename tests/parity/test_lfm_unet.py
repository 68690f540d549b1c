"""LFM's two U-Nets (time from data to noise), their samplers, a block and the map encoder: `parity/lfm_unet`."""

import pytest
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
from lightning_flows.hub.convert import lfm_edm, load_network
from lightning_flows.hub.convert.lfm_adm import load_rescaler
from lightning_flows.networks import UNetBlock
from lightning_flows.networks.edm_unet import edm_options
from tests.parity.parity_cases import answer, every_case, every_output

ADM = {
    "in_channels": "inputs",
    "out_channels": "outputs",
    "model_channels": "hidden_size",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_blocks",
    "attention_downsample_factors": "attention_factors",
    "conv_resample": "conv_resample",
    "num_heads": "num_heads",
    "num_head_channels": "head_channels",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "resblock_updown",
    "use_new_attention_order": "new_order",
    "num_classes": "num_classes",
    "dropout": "dropout",
    "time_embed_dim": "embedding_size",
    "spatial_size_of_input": "input_size",
    "group_norm_groups": "groups",
    "group_norm_eps": "eps",
}
EDM = {
    "img_resolution": "input_size",
    "in_channels": "inputs",
    "out_channels": "outputs",
    "model_channels": "hidden_size",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "embedding_mult",
    "num_blocks": "num_blocks",
    "attention_resolutions_in_pixels": "attention_sizes",
    "label_dim": "num_classes",
    "label_dropout": "label_dropout",
    "dropout": "dropout",
    "channels_per_head": "head_channels",
    "num_heads": "num_heads",
    "group_norm_groups": "groups",
    "group_norm_eps": "eps",
    "resample_filter": "filter",
}
BLOCK = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "emb_channels": "embedding_size",
    "up": "up",
    "down": "down",
    "attention": "attention",
    "num_heads": "num_heads",
    "heads": "heads",
    "channels_per_head": "head_channels",
    "adaptive_scale": "scale_shift",
    "skip_scale": "skip_scale",
    "resample_proj": "project_skip",
    "resample_filter": "filter",
    "dropout": "dropout",
    "eps": "eps",
    "group_norm_eps": "eps",
    "group_norm_groups": "groups",
}
RESCALER = {
    "num_classes": "num_classes",
    "out_channels": "out_channels",
    "stages": "stages",
    "factor_per_stage": "factor",
    "interpolation": "interpolation",
    "bias": "bias",
}
SOLVERS = {"euler": Euler(), "heun": Heun(), "midpoint": Midpoint(), "rk4": RK4("3/8")}
KINDS = {  # by a tensor that only such a case has
    "time_embed.0.weight": ("adm", ADM),
    "map_layer0.weight": ("edm", EDM),
    "conv0.weight": ("block", BLOCK),
    "channel_mapper.weight": ("rescaler", RESCALER),
}


def kind_of(case):
    """What a case is, and its hyper-parameters by our names."""
    kind, table = next(value for name, value in KINDS.items() if name in case.weights)
    return kind, case.hyper_parameters(table)


def positive(value):
    return value if value is not None and value > 0 else None  # -1 and None both say "not given"


def network_of(case):
    kind, hyper = kind_of(case)
    told = {"num_heads": positive(hyper.get("num_heads")), "head_channels": positive(hyper.get("head_channels"))}
    if kind == "adm":
        told["input_size"] = hyper["input_size"]
        told["qkv_order"] = "kind" if hyper.get("new_order") else "head"
    told = {name: value for name, value in told.items() if value is not None}
    return load_network(f"lfm-{kind}", case.weights, **told)


def condition_of(case):
    given = {"label": case.inputs.get("y"), "spatial": case.inputs.get("cond")}
    return Condition(**given)


def guided(case, key):
    return ClassifierFree(case.number(r"(?:scale|v_null \+) {}", 1.25, key))


def field_of(case, guidance=None):
    return Field(Velocity(network_of(case), Linear(1e-5)), condition_of(case), guidance)


def theirs(value):
    """Velocities point from data to noise there."""
    return -value


def velocity(case):
    return theirs(network_of(case)(case.inputs["z"], 1 - case.inputs["t"], condition_of(case))), "forward"


def velocity_scalar_time(case):
    t = torch.tensor(case.number("0-dim (?:tensor|time) {}", 0.37, "output.velocity_scalar_time"))
    return theirs(network_of(case)(case.inputs["z"], 1 - t, condition_of(case))), "forward"


def velocity_no_label(case):
    condition = condition_of(case).absent("label")
    return theirs(network_of(case)(case.inputs["z"], 1 - case.inputs["t"], condition)), "forward"


def velocity_cfg(case):
    key = "output.velocity_cfg"
    t = torch.tensor(case.number("time {}", 0.37, key))
    value = theirs(field_of(case, guided(case, key))(case.inputs["z"], 1 - t))
    return value.repeat(2, 1, 1, 1), "forward"  # returned once for each half of their doubled batch


def sample_on_a_grid(case, method, guidance):
    key = f"output.sample_{method}_grid{guidance or ''}"
    end, points = case.number(r"linspace\(1, ?{},", 1e-5, key), case.number(r"linspace\(1, ?\S+, ?{}\)", 9, key)
    grid = 1 - torch.linspace(1, end, int(points))
    field = field_of(case, guided(case, key) if guidance else None)
    return SOLVERS[method].solve(field, case.inputs["noise"], grid).x, "fixed_step"


def sample_fixed_step(case, method, guidance):
    key = f"output.sample_torchdiffeq_{method}{guidance or ''}"
    steps = round(1 / case.number("step_size {}", 0.125, key))
    field = field_of(case, guided(case, key) if guidance else None)
    return SOLVERS[method].solve(field, case.inputs["noise"], torch.linspace(0, 1, steps + 1)).x, "fixed_step"


def sample_dopri5(case, guidance):
    key = f"output.sample_dopri5{guidance or ''}"
    tolerance = case.number("atol=rtol={}", 1e-5, key)
    solver = DormandPrince(rtol=tolerance, atol=tolerance, end="interpolate")
    field = field_of(case, guided(case, key) if guidance else None)
    solution = solver.solve(field, case.inputs["noise"], torch.tensor([0.0, 1.0]))
    # Early errors lie at float32 round-off, which then decides the next length: one attempted step more or less.
    assert abs(solution.nfe - case.number("NFE {}", solution.nfe, key)) <= 6
    return solution.x, "dopri5"


def intermediate(case, name):
    """What a U-Net computes on its way, at their time."""
    network, t = network_of(case).network, case.inputs["t"]
    seen = {"sinusoid": network.t_embedder.sinusoid(t)}
    seen["embedding"] = network.embed_condition(t, condition_of(case), len(t))
    network.stem.register_forward_hook(lambda _, given, out: seen.update(input_block_0=out))
    network.middle[1].register_forward_hook(lambda _, given, out: seen.update(middle=out))
    for direction, levels, start in (("input", network.encoder, 1), ("output", network.decoder, 0)):
        for step in steps_of(levels, together=direction == "output"):
            place = f"{direction}_block_{start}"
            step.register_forward_hook(lambda _, given, out, place=place: seen.update({place: out}))
            start += 1
    network(case.inputs["z"], t, condition_of(case))
    return seen[name], "forward"


def steps_of(levels, together):
    """Modules whose results are the numbered blocks of the official code."""
    for level in levels:
        end = [] if level.resample is None else [level.resample]
        yield from [*level.blocks[:-1], *end] if together and end else [*level.blocks, *end]


def block_output(case):
    hyper = kind_of(case)[1]
    heads = positive(hyper.get("heads")) or positive(hyper.get("num_heads"))
    options = edm_options(
        hyper["embedding_size"],
        lambda channels: heads or channels // hyper.get("head_channels", 64),
        scale_shift=hyper.get("scale_shift", True),
        eps=hyper.get("eps", 1e-5),
        skip_scale=hyper.get("skip_scale", 1.0),
        project_skip=hyper.get("project_skip", False),
    )
    resample = "up" if hyper.get("up") else "down" if hyper.get("down") else None
    block = UNetBlock(
        hyper["in_channels"], hyper["out_channels"], options, attention=hyper["attention"], resample=resample
    ).eval()
    lfm_edm.load_block(block, case.weights)
    return block(case.inputs["x"], case.inputs["emb"]), "forward"


def rescaled(case):
    hyper = kind_of(case)[1]
    rescaler = load_rescaler(case.weights, stages=hyper["stages"], factor=hyper["factor"])
    return rescaler(case.inputs["label_map"]), "forward"


RULES = {
    r"output\.velocity": velocity,
    r"output\.velocity_scalar_time": velocity_scalar_time,
    r"output\.velocity_no_label": velocity_no_label,
    r"output\.velocity_cfg": velocity_cfg,
    r"output\.sample_(?P<method>euler|heun)_grid(?P<guidance>_cfg)?": sample_on_a_grid,
    r"output\.sample_torchdiffeq_(?P<method>euler|midpoint|rk4)(?P<guidance>_cfg)?": sample_fixed_step,
    r"output\.sample_dopri5(?P<guidance>_cfg)?": sample_dopri5,
    r"intermediate\.(?P<name>sinusoid|embedding|middle|(?:in|out)put_block_\d+)": intermediate,
    r"output\.y": block_output,
    r"output\.condition": rescaled,
}


@every_output("lfm_unet")
@pytest.mark.filterwarnings("ignore:.*therefore no attention")  # some tiny cases are too narrow for any, as they say
@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_lfm_unet_gives_the_official_numbers(case, output):
    case.compare(output, *answer(RULES, case, output))


@every_case("lfm_unet")
@pytest.mark.filterwarnings("ignore:.*therefore no attention")
@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_lfm_unet_has_the_official_sizes(case):
    kind, wanted = kind_of(case)
    if kind == "rescaler":
        rescaler = load_rescaler(case.weights)
        found = (rescaler.num_classes, rescaler.channel_mapper.out_channels, "channel_mapper.bias" in case.weights)
        assert found == (wanted["num_classes"], wanted["out_channels"], wanted["bias"])
    if kind in ("block", "rescaler"):
        return  # a block is built from all that the JSON says
    network = network_of(case).network
    known = {**network.config["init_args"], **derived(network, kind)}
    expected = {name: wanted[name] for name in wanted if name not in ("dropout", "label_dropout", "filter")}
    known, expected = irrelevant_removed(known), irrelevant_removed({**expected, **listed(network, kind, expected)})
    assert {name: known[name] for name in expected if name in known} == {n: expected[n] for n in expected if n in known}
    filters = sum(value.numel() for name, value in case.weights.items() if name.endswith("resample_filter"))
    stored = sum(value.numel() for value in case.weights.values())
    assert sum(p.numel() for p in network.parameters()) + filters == case.facts.get("n_parameters", stored)


def derived(network, kind):
    """What the JSON names and the config does not, from the network itself."""
    block = network.encoder[0].blocks[0]
    facts = {
        "inputs": network.stem.in_channels,
        "outputs": network.out_conv.out_channels,
        "input_size": network.shape[1] if network.shape[1] == network.shape[2] else list(network.shape[1:]),
        "embedding_size": block.embed.in_features,
        "eps": block.norm1.eps,
    }
    return facts | ({"groups": block.norm1.num_groups, "new_order": False} if kind == "adm" else {})


def listed(network, kind, wanted):
    """Levels with attention as the network has them: numbers that no level reaches, or too narrow, have none."""
    if kind == "adm":
        reached = [2**i for i in range(len(network.encoder))]
        asked = set(wanted["attention_factors"])
        order = "kind" if wanted.get("new_order") else "head"
        return {
            "attention_factors": [n for n in reached if n in asked],
            "head_channels": positive(wanted.get("head_channels")),
            "qkv_order": order,
            "new_order": False,
        }
    sizes = [network.shape[1] >> i for i in range(len(network.encoder))]
    asked = set(wanted["attention_sizes"])
    heads = [positive(wanted.get("num_heads")) or level.blocks[0].out_channels // wanted.get("head_channels", 64)
             for level in network.encoder]  # fmt: skip
    return {
        "attention_sizes": [n for n, here in zip(sizes, heads, strict=True) if n in asked and here],
        "num_classes": wanted.get("num_classes") or None,
        "groups": None,
    }


def irrelevant_removed(sizes):
    """Options that change nothing beside others are not compared."""
    gone = {"groups"} if sizes.get("groups") is None else set()
    if sizes.get("resblock_updown") or len(sizes["channel_mult"]) == 1:
        gone |= {"conv_resample"}
    if len(sizes["channel_mult"]) == 1:
        gone |= {"resblock_updown"}
    if sizes.get("head_channels") is not None and "scale_shift" in sizes:
        gone |= {"num_heads"}
    return {name: value for name, value in sizes.items() if name not in gone}
