"""Adapters change nothing at first, are all that is trained, and come off again without a trace."""

import copy
import json
import sys
import warnings

import pytest
import torch
from torch import nn

import lightning_flows as lf
from lightning_flows.networks import ADMUNet, adapters_of, checkpoint_blocks, compile_blocks
from lightning_flows.networks.adapter_record import plain_state, record
from lightning_flows.networks.adapters import lora_layers
from lightning_flows.store import config_of, load_tensors, save_tensors
from tests.modules.tiny import awake, dit, model

ATTENTION = ["attn.*"]


def inputs(n=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=g), torch.rand(n, generator=g), lf.Condition(label=torch.arange(n) % 3)


def output(module):
    with torch.no_grad():
        return module.eval().network(*inputs())


def trained(module, seed=0, by=0.2):
    """The module after what stands for a training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=g).to(parameter.dtype))
    return module


def close(a, b, tolerance=2e-6):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def kind_of(module):
    return {name: type(part) for name, part in module.named_modules()}


# ------------------------------------------------------------------ putting on


def test_a_new_adapter_changes_no_output_and_no_random_number():
    module, before = model(), torch.get_rng_state()
    plain = output(module)
    lf.add_lora(module, rank=4)
    assert torch.equal(output(module), plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert adapters_of(module) == {"default": 1.0}


def test_only_the_adapter_is_trained_and_it_is_reported():
    module = model()
    counts = lf.add_lora(module, rank=4, train=["y_embedder.*"])
    assert counts == {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    # five Linears of (in, out) have 4 (in + out) entries, and the table of labels has its own
    sizes = [(16, 48), (16, 16), (16, 64), (64, 16), (16, 96)]
    assert sum(counts.values()) == sum(4 * (i + o) for i, o in sizes) + 4 * 16
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    loss = module.network(*inputs()).square().mean()
    loss.backward()
    assert all(p.grad is None for name, p in module.named_parameters() if name in frozen)
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_the_seed_decides_the_factors():
    def factor(seed):
        module = model()
        lf.add_lora(module, seed=seed)
        return module.state_dict()["network.blocks.0.attn.qkv.lora_A.default.weight"]

    assert torch.equal(factor(0), factor(0))
    assert not torch.equal(factor(0), factor(1))


def test_u_nets_are_adapted_at_linears_and_1x1_convolutions():
    options = {"in_channels": 1, "hidden_size": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention_factors": (2,)}
    network = awake(ADMUNet(input_size=8, num_heads=2, num_classes=3, **options))
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), lf.Condition(label=torch.tensor([0, 2]))
    plain = network(x, t, c)
    lf.add_lora(network, rank=2)
    layers = lora_layers(network)
    kinds = {(type(layer.base_layer), getattr(layer.base_layer, "kernel_size", None)) for layer in layers.values()}
    assert kinds == {(nn.Linear, None), (nn.Conv2d, (1, 1))}
    assert {name.rpartition(".")[2] for name in layers} == {"embed", "qkv", "proj", "skip"}
    lf.remove_adapters(network)
    lf.add_lora(network, rank=2, targets=["conv1", "conv2", "qkv"])  # 3x3 where they are asked for
    adapted = trained(network)(x, t, c)
    assert (adapted - plain).abs().max() > 0.1
    assert close(lf.merge_adapters(network)(x, t, c), adapted, 2e-5)


class Own(nn.Module):
    """A user's network without blocks, with a part whose weights are read, not called."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.place, self.dilated = nn.Parameter(torch.zeros(8)), nn.Conv2d(1, 1, 1, dilation=2)

    def forward(self, x):
        y = self.first(x) + self.place
        return self.attention(y, y, y)[0]


def test_networks_of_users_without_blocks():
    network = Own()
    assert list(lf.add_lora(network, rank=2)) == ["first.lora_A.default.weight", "first.lora_B.default.weight"]
    with pytest.raises(ValueError, match="hits nothing"):
        lf.add_lora(Own(), targets=["attention.*"])


def test_a_checkpointed_or_compiled_block_takes_adapters():
    module = model()
    lf.add_lora(module, rank=2)
    reference = trained(module)
    wanted = output(reference)
    for change, order in [(checkpoint_blocks, "before"), (checkpoint_blocks, "after"), (compile_blocks, "before")]:
        other = model()
        options = {"backend": "eager"} if change is compile_blocks else {}
        if order == "before":
            change(other.network, **options)
            other.network(*inputs())
        lf.add_lora(other, rank=2)
        if order == "after":
            change(other.network, **options)
        other.load_state_dict(reference.state_dict())
        assert close(output(other), wanted)
        other.network(*inputs()).sum().backward()
        assert all(p.grad is not None for p in other.parameters() if p.requires_grad)


# ------------------------------------------------------------------ several, merged, removed


def two():
    """A model with two trained adapters, "a" and "b", and its output without them."""
    module = model()
    plain = output(module)
    lf.add_lora(module, rank=4, name="a", train=["y_embedder.*"])
    trained(module, seed=1)
    lf.add_lora(module, rank=2, name="b", targets=ATTENTION, alpha=6, train=["y_embedder.*"])
    trained(module, seed=2)
    return module, plain


def test_adapters_are_chosen_by_name_and_weight():
    module, plain = two()
    b = output(module)
    a = output(lf.use_adapters(module, ["a"]))
    assert not close(a, b, 1e-2)
    assert torch.equal(output(lf.use_adapters(module, [])), plain)
    assert torch.equal(output(lf.use_adapters(module, {"a": 0.0})), plain)
    assert torch.equal(output(lf.use_adapters(module, ["b"])), b)
    assert torch.equal(output(lf.use_adapters(module, {"a": 1})), a)
    assert adapters_of(module) == {"a": 1.0, "b": 0.0}


def test_a_blend_is_the_sum_of_the_formula():
    module, _ = two()
    base = {name: p.detach().clone() for name, p in lf.use_adapters(copy.deepcopy(module), []).named_parameters()}
    weights, alpha = {"a": 0.7, "b": -0.5}, {"a": 4 / 4, "b": 6 / 2}
    full = {name: values["network.y_embedder.embedding_table.weight"] for name, values in module._adapters.full.items()}
    full["b"] = dict(module.named_parameters())["network.y_embedder.embedding_table.weight"].detach().clone()
    factors = {name: p.detach().clone() for name, p in module.named_parameters() if ".lora_" in name}
    lf.merge_adapters(module, weights)
    found = dict(module.named_parameters())
    for layer in ("network.blocks.0.attn.qkv", "network.blocks.0.mlp.fc1"):
        expected = base[f"{layer}.base_layer.weight"].double()
        for name in weights:
            if (a := factors.get(f"{layer}.lora_A.{name}.weight")) is not None:
                b = factors[f"{layer}.lora_B.{name}.weight"]
                expected = expected + weights[name] * alpha[name] * (b.double() @ a.double())
        assert close(found[f"{layer}.weight"].double(), expected, 1e-6)
    table = base["network.y_embedder.embedding_table.weight"]
    expected = table + 0.7 * (full["a"] - table) - 0.5 * (full["b"] - table)
    assert close(found["network.y_embedder.embedding_table.weight"], expected, 1e-6)


@pytest.mark.parametrize("weights", [None, ["a"], {"a": 0.7, "b": 0.3}])
def test_a_merged_model_computes_the_same_and_is_a_plain_one(tmp_path, weights):
    module, _ = two()
    fresh = model()
    if weights is not None:
        lf.use_adapters(module, weights)
    adapted = output(module)
    assert lf.merge_adapters(module) is module
    assert close(output(module), adapted)
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert kind_of(module) == kind_of(fresh)
    assert config_of(module) == config_of(fresh)
    assert all(p.requires_grad for p in module.parameters())
    assert not hasattr(module, "peft_config")
    assert adapters_of(module) == {}
    module.save_pretrained(tmp_path / "out")
    assert torch.equal(output(lf.from_pretrained(tmp_path / "out")), output(module))


def test_our_merge_is_that_of_peft():
    module, _ = two()
    lf.use_adapters(module, {"a": 0.7, "b": 0.3})
    state, said = module.state_dict(), record(module)
    other = copy.deepcopy(module)
    for layer in lora_layers(other).values():
        layer.merge()
    theirs = {name.replace(".base_layer.", "."): v for name, v in other.state_dict().items() if ".lora_" not in name}
    ours = plain_state(state, said)
    assert ours.keys() == theirs.keys()
    assert all(close(ours[name], theirs[name], 1e-6) for name in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_rounded_once(dtype):
    module = model()
    lf.add_lora(module, rank=4)
    trained(module, by=0.05).to(dtype)
    layer = lora_layers(module)["network.blocks.0.mlp.fc1"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer.weight.double() + b.double() @ a.double()).to(dtype)
    lf.merge_adapters(module)
    merged = module.network.blocks[0].mlp.fc1.weight
    assert merged.dtype == dtype
    assert torch.equal(merged, expected)


def test_a_merge_that_overflows_leaves_the_model_as_it_was():
    module = model().to(torch.float16)
    lf.add_lora(module, rank=1)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_A["default"].weight.fill_(500.0)
            layer.lora_B["default"].weight.fill_(500.0)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        lf.merge_adapters(module)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())
    assert adapters_of(module) == {"default": 1.0}


def test_removed_adapters_leave_the_base():
    module, plain = two()
    b = output(module)
    lf.remove_adapters(module, ["a"])
    assert torch.equal(output(module), b)
    assert set(adapters_of(module)) == {"b"}
    assert all("attn" in name for name in lora_layers(module))  # layers that only "a" had are plain again
    lf.remove_adapters(module)
    assert torch.equal(output(module), plain)
    assert kind_of(module) == kind_of(model())
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(ValueError, match="has no adapters"):
        lf.remove_adapters(module)


def test_frozen_parts_of_the_base_stay_frozen_after_a_merge():
    module = model()
    module.network.x_embedder.requires_grad_(False)
    lf.add_lora(module)
    lf.merge_adapters(module)
    flags = {name.split(".")[1]: p.requires_grad for name, p in module.network.named_parameters(prefix="network")}
    assert flags["x_embedder"] is False
    assert flags["blocks"] is True


def test_training_goes_on_where_it_stopped():
    module, _ = two()
    b = output(module)
    lf.use_adapters(module, ["a"], train=["a"])
    assert {name.split(".")[-2] for name, p in module.named_parameters() if p.requires_grad} == {"a", "embedding_table"}
    trained(module, seed=3)
    a = output(module)
    assert torch.equal(output(lf.use_adapters(module, ["b"])), b)
    assert torch.equal(output(lf.use_adapters(module, ["a"])), a)


def test_a_model_in_eval_mode_stays_in_eval_mode():
    module = model().eval()
    lf.add_lora(module, dropout=0.5)
    assert not any(part.training for part in module.modules())


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha positive"),
        ({"dropout": 1.0}, "dropout in"),
        ({"targets": ["nonsense"]}, r"targets=\['nonsense'\] hits nothing"),
        ({"targets": "attn.*"}, "give a list"),
        ({"train": ["nonsense.*"]}, r"train=\['nonsense"),
        ({"name": "blocks"}, "a part of the model"),
        ({"name": "a.b"}, "no name for an adapter"),
        ({"name": "keys"}, "no name for an adapter"),
        ({"targets": ["qkv"], "train": ["qkv.*"]}, "leaves no layer"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(options, message):
    module = model()
    kinds = kind_of(module)
    with pytest.raises(ValueError, match=message):
        lf.add_lora(module, **options)
    assert kind_of(module) == kinds
    assert adapters_of(module) == {}
    assert all(p.requires_grad for p in module.parameters())


def test_names_and_weights_of_adapters_are_checked():
    module, _ = two()
    for call, message in [
        (lambda: lf.add_lora(module, name="a"), "is taken"),
        (lambda: lf.use_adapters(module, ["c"]), r"\['c'\] are not in the model"),
        (lambda: lf.use_adapters(module, "a"), "give a list"),
        (lambda: lf.use_adapters(module, {"a": float("nan")}), "must be finite"),
        (lambda: lf.use_adapters(module, ["a"], train=["b"]), "not among those in use"),
        (lambda: lf.use_adapters(module, ["a", "b"], train=["a"]), "in full"),
        (lambda: lf.use_adapters(module, {"a": 0.5}, train=["a"]), "must be 1"),
        (lambda: lf.remove_adapters(module, ["c"]), "are not in the model"),
        (lambda: lf.save_adapter(module, "nowhere"), "say which of them"),
        (lambda: lf.add_lora(module, name="c", train=["attn.*"]), "adapted and trained in full"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert adapters_of(module) == {"a": 0.0, "b": 1.0}


def test_random_tensors_are_not_frozen(tmp_path):
    model().save_pretrained(tmp_path)
    module = lf.from_pretrained(tmp_path, num_classes=5, reinit=["network.y_embedder.*"])
    with pytest.raises(ValueError, match=r"train must name what started afresh.*y_embedder"):
        lf.add_lora(module)
    assert any("y_embedder" in name for name in lf.add_lora(module, train=["y_embedder.*"]))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flows\[peft\]"'):
        lf.add_lora(model())


# ------------------------------------------------------------------ files


def saved(folder):
    """A folder with a base model and one with an adapter of it, and what both compute together."""
    base = model()
    base.save_pretrained(folder / "base")
    module = lf.from_pretrained(folder / "base")
    lf.add_lora(module, rank=4, alpha=8, train=["y_embedder.*"])
    trained(module)
    lf.save_adapter(module, folder / "adapter")
    return output(module)


def test_an_adapter_goes_out_and_in(tmp_path):
    wanted = saved(tmp_path)
    module = lf.from_pretrained(tmp_path / "base")
    plain = output(module)
    assert lf.load_adapter(module, tmp_path / "adapter", name="signs") is module
    assert torch.equal(output(module), wanted)
    assert not any(p.requires_grad for p in module.parameters())
    assert torch.equal(output(lf.use_adapters(module, [])), plain)
    lf.use_adapters(module, ["signs"], train=["signs"])
    assert close(output(lf.merge_adapters(module)), wanted)


def test_the_folder_is_small_and_names_its_base(tmp_path):
    saved(tmp_path)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["modules_to_save"] == ["network.y_embedder.embedding_table"]
    tensors = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 5 + 1
    assert all(name.startswith("base_model.model.network.") for name in tensors)


def test_peft_itself_reads_the_folder(tmp_path):
    from peft import PeftModel

    wanted = saved(tmp_path)
    base = lf.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert close(output(theirs.base_model.model), wanted, 1e-6)


def test_the_base_is_named_by_the_caller_or_by_its_revision(tmp_path):
    module = model()
    lf.add_lora(module)
    lf.save_adapter(module, tmp_path, base="org/base@abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    module.origin = "org/other"
    lf.remove_adapters(module)
    with pytest.warns(UserWarning, match="was trained on org/base@abc, and this model has the weights of org/other"):
        lf.load_adapter(module, tmp_path)


def rewrite(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retensor(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_tensors(file)
    change(tensors)
    save_tensors(file, tensors)


QKV = "base_model.model.network.blocks.0.attn.qkv.lora_A.weight"
BROKEN = {
    "does not fit.*qkv.lora_A is missing": lambda f: retensor(f, lambda t: t.pop(QKV)),
    r"qkv.lora_A has shape \(4, 9\)": lambda f: retensor(f, lambda t: t.update({QKV: torch.zeros(4, 9)})),
    "no layer network.other": lambda f: retensor(
        f, lambda t: t.update({"base_model.model.network.other.lora_A.weight": t[QKV]})
    ),
    "no parameter network.other": lambda f: retensor(f, lambda t: t.update({"network.other": torch.ones(1)})),
    r"embedding_table.weight has shape \(9, 16\)": lambda f: retensor(
        f, lambda t: t.update({"base_model.model.network.y_embedder.embedding_table.weight": torch.ones(9, 16)})
    ),
    r"lora_A has shape \(4, 16\) instead of \(5, 16\)": lambda f: rewrite(f, r=5),
    "'use_dora': True.*not supported": lambda f: rewrite(f, use_dora=True),
    "'rank_pattern'.*not supported": lambda f: rewrite(f, rank_pattern={"qkv": 2}),
    "'peft_type': 'LOHA'.*not supported": lambda f: rewrite(f, peft_type="LOHA"),
    "'bias': 'all'.*not supported": lambda f: rewrite(f, bias="all"),
    "r must be a positive integer": lambda f: rewrite(f, r="8"),
    "no JSON object": lambda f: (f / "adapter_config.json").write_text("[]"),
    "missing or no JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "is a pickle": lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x02}."),
    "leads to no folder with adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path, message):
    saved(tmp_path)
    module = lf.from_pretrained(tmp_path / "base")
    plain, kinds = output(module), kind_of(module)
    BROKEN[message](tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        lf.load_adapter(module, tmp_path / "adapter")
    assert kind_of(module) == kinds
    assert torch.equal(output(module), plain)
    assert adapters_of(module) == {}


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    wanted = saved(tmp_path)
    module = lf.from_pretrained(tmp_path / "base")
    lf.add_lora(module, rank=2)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_flows.store.folder._write", fail)
    with pytest.raises(OSError, match="disk full"):
        lf.save_adapter(module, tmp_path / "adapter")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert torch.equal(output(lf.load_adapter(lf.from_pretrained(tmp_path / "base"), tmp_path / "adapter")), wanted)


def test_saving_a_model_with_adapters_saves_what_it_computes(tmp_path):
    module, _ = two()
    lf.use_adapters(module, {"a": 0.7, "b": 0.3})
    module.save_pretrained(tmp_path)
    assert close(output(lf.from_pretrained(tmp_path)), output(module))
    assert adapters_of(module) == {"a": 0.7, "b": 0.3}


def test_a_bare_network_takes_adapters_too(tmp_path):
    network = dit()
    lf.add_lora(network, rank=2, train=["y_embedder.*"])
    trained(network)
    wanted = network.eval()(*inputs())
    lf.save_adapter(network, tmp_path)
    assert torch.equal(lf.load_adapter(dit().eval(), tmp_path)(*inputs()), wanted)
