"""SymmFlow's U-Net, loss, codes and both directions of its flow: `parity/symmflow`."""

import inspect
import json
import re
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_flows.codecs import OneHot, RGBPalette
from lightning_flows.codecs.palette import PALETTES
from lightning_flows.flow import RK4, Condition, Euler, Heun, Linear, Midpoint, SampleNoise, SymmetricMatching, Uniform
from lightning_flows.hub.convert import load_network
from lightning_flows.hub.convert.symmflow import module
from lightning_flows.modules import SymmFlow, WarmupCosine
from lightning_flows.modules.joint_field import JointField, joint
from tests.hub.official_unets import Weights, adm
from tests.parity.symmflow_cases import (
    CASE_KEYS,
    FILE_KEYS,
    FILE_TABLES,
    SymmCase,
    every_case,
    every_file,
    every_output,
    every_table,
)

ADM = {
    "image_size": "input_size",
    "in_channels": "inputs",
    "out_channels": "outputs",
    "num_res_blocks": "num_blocks",
    "dropout": "dropout",
    "conv_resample": "conv_resample",
    "dims": "dims",
    "num_classes": "num_classes",
    "use_checkpoint": "checkpoint",
    "num_heads_upsample": "heads_up",
    "model_channels": "hidden_size",
    "channel_mult": "channel_mult",
    "attention_resolutions": "attention_factors",
    "num_heads": "num_heads",
    "num_head_channels": "head_channels",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "resblock_updown",
    "use_new_attention_order": "new_order",
}
SOLVERS = {"euler": Euler(), "loop": Euler(), "midpoint": Midpoint(), "heun2": Heun(), "rk4": RK4("3/8")}


class Given(SampleNoise):
    """The noises of a case, in the place of random ones."""

    def __init__(self, case):
        super().__init__(range(len(case.input("image"))))
        self.case = case

    def normal(self, purpose, like):
        if purpose == "hidden":  # stands for codes that are not there; here all are
            return torch.full_like(like, torch.nan)
        return self.case.input({"source": "noise_image", "semantic": "noise_semantic"}[purpose])

    def draw(self, purpose, shape, sampler):
        uniform = self.case.input("uniform")
        if purpose == "dequantize_mask":  # each plane an item by itself, see `code_of`
            uniform = uniform.flatten(0, 1)[:, None].expand(shape)
        assert uniform.shape == tuple(shape)
        return uniform


@dataclass(frozen=True)
class Times(Uniform):
    """The times of a case."""

    t: object = None

    def __call__(self, n, generator=None):
        return self.t


# ------------------------------------------------------------------ what a case is about


def network_of(case):
    hyper = case.hyper_parameters(ADM)
    told = {"num_heads": hyper["num_heads"], "head_channels": hyper["head_channels"]}
    told = {name: value for name, value in told.items() if value is not None and value > 0}
    order = "kind" if hyper["new_order"] else "head"
    return load_network("symmflow", case.weights, input_size=case.input("image").shape[2:], qkv_order=order, **told)


def model_of(case):
    """The published model around the network; masks of tiny cases have fewer channels than a palette."""
    network, facts = network_of(case), case.facts
    if facts["kind"] == "class":
        model = module(network, num_classes=facts["n_classes"], beta=facts["beta"])
    else:
        assert facts["kind"] == "mask", f"kind {facts['kind']!r} of {case.name} is not known"
        model = SymmFlow(network=network, semantic=OneHot(facts["semantic_channels"]))
    model.objective = SymmetricMatching(
        facts.get("image_weight", 0.7), Linear(facts["sigma_min"]), Times(t=case.input("t"))
    )
    assert model.shape[0] == facts["image_channels"]
    return model.eval()


def code_of(case):
    """The dequantised code, (B, S, h, w)."""
    facts = case.facts
    if facts["kind"] == "class":
        size = case.input("image").shape[2:]
        return model_of(case).semantic.encode({"label": case.input("label")}, size, Given(case))
    clean = case.input("mask_clean")
    palette = RGBPalette([[0, 0, 0], [255, 255, 255]], beta=facts["beta"])
    black = {"mask": torch.zeros(clean[:, :, 0, 0].numel(), *clean.shape[2:], dtype=torch.int64)}
    noise = palette.encode(black, clean.shape[2:], Given(case)) + 1  # black is -1
    return clean + noise[:, 0].view_as(clean)


def joint_of(case):
    model = model_of(case)
    return model.objective(model.network, case.input("image"), code_of(case), Given(case))


# ------------------------------------------------------------------ outputs


def semantic_dequantized(case):
    return code_of(case)


def plane_mean_class(case):
    return model_of(case).semantic.heights(code_of(case))


def quantized(case):
    return model_of(case).semantic.decode(code_of(case))["label"].labels.float()


def joint_xt(case):
    return joint_of(case).point.x_t


def target(case):
    return joint_of(case).point.velocity


def velocity(case):
    return joint_of(case).velocity


def velocity_at(case, time):
    x = joint_of(case).point.x_t
    return network_of(case)(x, torch.full((len(x),), float(time)))


def loss(case, part):
    if case.facts["kind"] == "class":  # through the module, which makes the code itself
        batch = {"image": case.input("image"), "label": case.input("label")}
        return model_of(case).losses(batch, Given(case)).logs[f"loss_{part}"].mean()
    return joint_of(case).losses.logs[f"loss_{part}"].mean()


def timestep_embedding(case):
    return network_of(case).t_embedder.sinusoid(case.input("t"))


def grid_of(case, method, number):
    """Times from 0 on, as torchdiffeq or their loop puts them, which need not end in whole steps."""
    calls = [call for call in case.facts["solver_calls"] if (call["method"], call["steps"]) == (method, number)]
    step = calls[0]["step_size"] if calls else 1 / number
    if method == "loop":
        return torch.arange(int(1 / step) + 1) * step
    inside = torch.arange(0, 1 - 1e-6, step)
    return torch.cat([inside, torch.ones(1)])


def generate(case, method, number):
    """The whole joint state; of a class, the module's own samples are its images."""
    model, grid, solver = model_of(case), grid_of(case, method, int(number)), SOLVERS[method]
    state = joint(case.input("noise_image"), code_of(case))
    end = solver.solve(JointField(model.network, model.shape[0], model.objective.path), state, grid).x
    if case.facts["kind"] == "class" and whole(grid):
        condition = Condition(label=case.input("label"))
        drawn = model.generate(condition, Given(case), steps=len(grid) - 1, solver=solver)
        end = torch.cat([drawn.x, end[:, model.shape[0] :]], dim=1)
    return end


def segment(case, method, number):
    """The whole joint state, by the module where its own grid is that of the case."""
    model, grid, solver = model_of(case), grid_of(case, method, int(number)), SOLVERS[method]
    if whole(grid):
        reading = read(case, method, number)
        return torch.cat([reading.noise, reading.code], dim=1)
    field = JointField(model.network, model.shape[0], model.objective.path)
    return solver.solve(field, joint(case.input("image"), case.input("noise_semantic")), 1 - grid).x


def read(case, method, number):
    with mock.patch("lightning_flows.modules.reading.SampleNoise", return_value=Given(case)):
        return model_of(case).read(case.input("image"), steps=int(number), solver=SOLVERS[method])


def whole(grid):
    return torch.allclose(grid, torch.linspace(0, 1, len(grid)))


def class_score(case, method, number):
    return model_of(case).semantic.heights(segment(case, method, number)[:, case.facts["image_channels"] :])


def class_of(case, method, number):
    code = segment(case, method, number)[:, case.facts["image_channels"] :]
    return model_of(case).semantic.decode(code)["label"].labels.float()


SOLVED = rf"(?P<method>{'|'.join(SOLVERS)})_(?P<number>\d+)"
RULES = {
    r"out/semantic_dequantized": semantic_dequantized,
    r"out/plane_mean_class": plane_mean_class,
    r"out/quantized": quantized,
    r"out/joint_xt": joint_xt,
    r"out/target": target,
    r"out/velocity": velocity,
    r"out/velocity_t(?P<time>[01])": velocity_at,
    r"out/loss_(?P<part>image|semantic)": loss,
    r"out/timestep_embedding": timestep_embedding,
    rf"out/generate_{SOLVED}": generate,
    rf"out/segment_{SOLVED}": segment,
    rf"out/class_score_{SOLVED}": class_score,
    rf"out/class_{SOLVED}": class_of,
}
WARNINGS = pytest.mark.filterwarnings("ignore:scale_shift=False")  # what the JSON calls a trap


def answer(case, output):
    for pattern, rule in RULES.items():
        found = re.fullmatch(pattern, output)
        if found is not None:
            with torch.no_grad():
                return rule(case, **found.groupdict())
    raise AssertionError(f"no rule covers the output {output!r} of {case.name}")


@every_output()
@WARNINGS
def test_symmflow_gives_the_official_numbers(case, output):
    case.compare(output, answer(case, output))


@every_case()
@WARNINGS
def test_symmflow_has_the_official_sizes(case):
    wanted, network = case.hyper_parameters(ADM), network_of(case)
    known = network.config["init_args"]
    assert (wanted["dims"], wanted["heads_up"]) in [(2, -1), (2, wanted["num_heads"])]
    assert sum(p.numel() for p in network.parameters()) == case.facts["parameters"]
    assert (network.stem.in_channels, network.out_conv.out_channels) == (wanted["inputs"], wanted["outputs"])
    assert wanted["inputs"] == case.facts["image_channels"] + case.facts["semantic_channels"]
    assert known["qkv_order"] == ("kind" if wanted["new_order"] else "head")
    assert known["time_scale"] == 1
    levels = [2**i for i in range(len(wanted["channel_mult"]))]
    assert known["attention_factors"] == [factor for factor in levels if factor in wanted["attention_factors"]]
    names = ["num_blocks", "hidden_size", "channel_mult", "num_classes", "scale_shift"]
    names += ["resblock_updown"] if len(levels) > 1 else []
    names += ["conv_resample"] if len(levels) > 1 and not wanted["resblock_updown"] else []
    assert {name: known[name] for name in names} == {name: wanted[name] for name in names}


@every_file()
def test_every_number_in_the_folder_is_read(file):
    content = json.loads(file.read_text())
    assert set(content) <= FILE_KEYS | FILE_TABLES | {"cases"}
    described = {
        entry["case"] for other in file.parent.glob("*.json") for entry in json.loads(other.read_text())["cases"]
    }
    assert {stored.stem for stored in file.parent.glob("*.safetensors")} == described
    for entry in content["cases"]:
        with safe_open(file.parent / f"{entry['case']}.safetensors", "pt") as stored:
            prefixes = {name.partition("/")[0] for name in stored.keys()}  # noqa: SIM118
        assert prefixes == {"state_dict", "in", "out"}


# ------------------------------------------------------------------ tables


@every_table("lr_schedule")
def test_the_learning_rate_is_the_official_one(table):
    steps = table["epochs"] * table["steps_per_epoch"]
    warmup = table["warmup_epochs"] * table["steps_per_epoch"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=table["lr"])
    low = 1e-6 / table["lr"]
    schedule = WarmupCosine(
        optimizer, total_steps=steps - 1, warmup_steps=warmup - 1, start=low, final=low, rise="cosine"
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(table["values"], rel=1e-6)


@every_table("mask_colour_decoding")
def test_colours_are_read_as_official(table):
    pixels = torch.tensor(table["pixels_minus1_1"]).T[None, :, None]  # (1, 3, 1, N)
    names = {"coco_class": "coco-stuff", "celeba_class": "celebamask-hq"}
    for name, palette in names.items():
        assert RGBPalette(palette).decode(pixels)["mask"].labels.flatten().tolist() == table[name]
    coco, celeba = (list(map(list, PALETTES[name])) for name in ("coco-stuff", "celebamask-hq"))
    assert celeba == table["celeba_palette"]
    assert len(coco) == table["coco_classes"] == RGBPalette("coco-stuff").num_classes["mask"]
    first, last = table["coco_palette_first"], table["coco_palette_last"]
    assert (coco[: len(first)], coco[-len(last) :]) == (first, last)
    known = {"pixels_minus1_1", *names, "celeba_palette", "coco_classes", "coco_palette_first", "coco_palette_last"}
    assert set(table) == known


# ------------------------------------------------------------------ the harness itself

OTHER = {"hidden_size": 64, "channel_mult": (1, 2), "num_blocks": 2, "attention_factors": (2,), "num_heads": 2,
         "scale_shift": True, "out_channels": 7, "qkv_order": "head"}  # fmt: skip


def other_case(folder, **kwargs):
    """A case of other sizes, whose network is written in `tests.hub.official_unets`; its steps do not end at 1."""
    weights, source = Weights(), torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=source)  # noqa: E731
    inputs = {"image": draw(3, 3, 8, 12), "mask_clean": draw(3, 4, 8, 12), "noise_image": draw(3, 3, 8, 12),
              "noise_semantic": draw(3, 4, 8, 12), "t": torch.tensor([0.1, 0.5, 0.9])}  # fmt: skip
    state = torch.cat([inputs["image"], inputs["noise_semantic"]], dim=1)
    t = inputs["t"][:, None, None, None]
    x_t = torch.cat([(1 - 0.99 * t) * inputs["noise_image"] + t * inputs["image"],
                     (1 - 0.99 * t) * inputs["mask_clean"] + t * inputs["noise_semantic"]], dim=1)  # fmt: skip
    outputs = {"velocity": adm(weights, x_t, inputs["t"], OTHER)}
    for i, step in enumerate((0.4, 0.4, 0.2)):
        state = state - step * adm(weights, state, torch.full((3,), 1 - 0.4 * i), OTHER)
    outputs["segment_euler_3"] = state
    inputs["uniform"] = torch.full((3, 4, 8, 12), 0.5)
    groups = {"state_dict": weights, "in": inputs, "out": outputs}
    folder.mkdir()
    save_file({f"{k}/{n}": v for k, group in groups.items() for n, v in group.items()}, folder / "odd.safetensors")
    given = {**dict.fromkeys(ADM), "num_heads": 2, "num_head_channels": -1, "num_res_blocks": 2, **kwargs}
    facts = {**dict.fromkeys(CASE_KEYS), "case": "odd", "kind": "mask", "image_channels": 3, "semantic_channels": 4,
             "beta": 15.0, "sigma_min": 0.01, "constructor": {"cls": "UNetModel", "kwargs": given},
             "solver_calls": [{"method": "euler", "step_size": 0.4, "steps": 3}]}  # fmt: skip
    return SymmCase(folder, json.dumps(facts))


def test_a_case_of_other_sizes_passes_untouched(tmp_path):
    case = other_case(tmp_path / "symmflow")
    for output in case.outputs():
        case.compare(output, answer(case, output))
    assert len(case.outputs()) == 2


def test_what_is_not_known_fails(tmp_path):
    case = other_case(tmp_path / "symmflow", window=4)
    with pytest.raises(AssertionError, match=r"hyper-parameters \['window'\] of odd have no place"):
        network_of(case)
    with pytest.raises(AssertionError, match=r"no rule covers the output 'out/other' of odd"):
        answer(case, "out/other")
    with pytest.raises(AssertionError, match="largest error"):
        case.compare("out/velocity", case.tensors["out/velocity"] * 1.001)
    with pytest.raises(AssertionError, match="shape"):
        case.compare("out/velocity", case.tensors["out/velocity"][:1])
    assert all("case" in inspect.signature(rule).parameters for rule in RULES.values())
