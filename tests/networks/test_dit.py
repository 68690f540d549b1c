import json
import subprocess
import sys

import pytest
import torch

from lightning_flows.flow import Condition
from lightning_flows.networks import DIT_SIZES, DiT, attention_backend, check_condition

TINY = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "frequency_size": 32}


def tiny(**arguments):
    return DiT(**{**TINY, **arguments})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(network, seed=0):
    source = generator(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return network.eval()


def inputs(network, batch=3, seed=1):
    source = generator(seed)
    return torch.randn(batch, *network.shape, generator=source), torch.rand(batch, generator=source)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [8, (8, 16), (24, 8)])
def test_output_has_the_shape_of_the_input(size, patch):
    network = randomised(tiny(input_size=size, patch_size=patch, in_channels=3, depth=1))
    x, t = inputs(network, batch=2)
    assert network.shape == (3, *((size, size) if isinstance(size, int) else size))
    assert network(x, t).shape == x.shape


def test_each_patch_is_put_back_where_it_came_from():
    network = tiny(input_size=(4, 6), in_channels=3)
    patches = torch.arange(2 * 3 * 12.0).reshape(1, 6, 12)
    image = network.unpatchify(patches)
    for token in range(6):
        row, column = divmod(token, 3)
        patch = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(patch.permute(1, 2, 0).flatten(), patches[0, token])


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"learn_sigma": True, "qk_norm": True}])
def test_a_fresh_network_returns_zero(options):
    network = tiny(**options)
    x, t = inputs(network)
    label = torch.tensor([0, 1, 4]) if network.streams else None
    assert torch.equal(network(x, t, Condition(label=label)), torch.zeros_like(x))


def test_a_fresh_network_has_the_published_initial_scales():
    network = DiT(8, hidden_size=256, depth=1, num_heads=4, num_classes=2000)
    assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = (6 / (256 + 768)) ** 0.5
    assert network.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    bound = (6 / (256 + 16)) ** 0.5  # the patch convolution seen as a Linear from 4 * 2 * 2 values
    assert network.x_embedder.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "learn_sigma": True}])
def test_every_parameter_gets_a_gradient(options):
    network = randomised(tiny(num_classes=3, label_dropout=0.1, **options))
    x, t = inputs(network, batch=4)
    label = torch.tensor([0, 1, 2, 0])
    condition = Condition(label=label, present={"label": torch.tensor([True, True, True, False])})
    network(x, t, condition).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_learned_sigma_heads_are_dropped():
    network = randomised(tiny(learn_sigma=True, in_channels=3))
    x, t = inputs(network)
    before = network(x, t)
    with torch.no_grad():  # channel is the fastest axis of a patch: 3 velocities, then 3 sigmas
        network.final_layer.linear.weight.unflatten(0, (4, 6))[:, 3:] = 1.0
    assert torch.equal(network(x, t), before)
    with torch.no_grad():
        network.final_layer.linear.weight.unflatten(0, (4, 6))[:, 2] += 1.0
    assert not torch.equal(network(x, t), before)


def test_one_time_for_all_equals_the_same_time_for_each():
    network = randomised(tiny())
    x, _ = inputs(network)
    torch.testing.assert_close(network(x, torch.tensor(0.3)), network(x, torch.full((3,), 0.3)))


def test_samples_do_not_see_each_other():
    network = randomised(tiny(num_classes=4, label_dropout=0.1))
    x, t = inputs(network)
    label = torch.tensor([3, 0, 2])
    alone = [network(x[i : i + 1], t[i : i + 1], Condition(label=label[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(network(x, t, Condition(label=label)), torch.cat(alone))


@pytest.mark.parametrize("order", ["torch.func", "autograd"])
def test_forward_mode_derivatives_work_under_the_math_backend(order):
    network = randomised(tiny(qk_norm=True)).double()
    x, t = inputs(network, batch=2)
    x, t = x.double(), t.double()
    dx, dt = torch.ones_like(x), torch.ones_like(t)
    with attention_backend("math"):
        if order == "torch.func":
            tangent = torch.func.jvp(network, (x, t), (dx, dt))[1]
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in ((x, dx), (t, dt))]
                tangent = torch.autograd.forward_ad.unpack_dual(network(*dual)).tangent
    h = 1e-5
    slope = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip_restores_the_function_and_holds_no_table():
    network = randomised(tiny(num_classes=3))
    other = tiny(num_classes=3)
    other.load_state_dict(network.state_dict(), strict=True)
    x, t = inputs(network)
    condition = Condition(label=torch.tensor([0, 1, 2]))
    assert torch.equal(other.eval()(x, t, condition), network(x, t, condition))
    assert "pos_embed" not in network.state_dict()


@pytest.mark.parametrize(("size", "millions"), [("S", 32.96), ("B", 130.50), ("L", 458.09), ("XL", 674.8)])
def test_published_parameter_counts(size, millions):
    with torch.device("meta"):
        network = DiT.of_size(size, input_size=32, patch_size=2, num_classes=1000, label_dropout=0.1)
    count = sum(p.numel() for p in network.parameters()) + network.pos_embed.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.005 if size != "XL" else 0.5)


def test_of_size_records_plain_arguments_and_lets_them_be_changed():
    with torch.device("meta"):
        network = DiT.of_size("B", input_size=32, patch_size=4, depth=2)
    arguments = network.config["init_args"]
    assert {name: arguments[name] for name in DIT_SIZES["B"]} == {**DIT_SIZES["B"], "depth": 2}
    assert arguments["patch_size"] == 4
    json.dumps(network.config)
    with pytest.raises(ValueError, match=r"size.*'S', 'B', 'L', 'XL'.*'M'"):
        DiT.of_size("M", input_size=32)


def test_time_scale_stretches_time():
    slow, fast = randomised(tiny()), randomised(tiny(time_scale=10.0))
    x, t = inputs(slow)
    torch.testing.assert_close(fast(x, t / 10), slow(x, t), rtol=1e-4, atol=1e-5)


# ---- conditions ----


def test_an_absent_label_reads_the_null_row():
    network = randomised(tiny(num_classes=3, label_dropout=0.1))
    x, t = inputs(network)
    null = network.y_embedder.embedding_table.weight[3]
    unconditional = network(x, t)
    label = torch.tensor([0, 1, 2])
    assert torch.equal(network(x, t, network.null(Condition(label=label), 3)), unconditional)
    assert torch.equal(network(x, t, network.null(None, 3)), unconditional)
    mixed = Condition(label=label).absent("label", where=torch.tensor([False, True, False]))
    given = network(x, t, Condition(label=label))
    expected = torch.stack([given[0], unconditional[1], given[2]])
    torch.testing.assert_close(network(x, t, mixed), expected)
    with torch.no_grad():
        null += 1
    assert not torch.allclose(network(x, t), unconditional)


def test_the_value_of_an_absent_label_does_not_matter():
    network = randomised(tiny(num_classes=3, label_dropout=0.1))
    x, t = inputs(network)
    garbage = Condition(label=torch.tensor([-1, 99, 0])).absent("label")
    assert torch.equal(network(x, t, garbage), network(x, t))


def test_a_single_class_without_null_row_needs_no_label():
    network = randomised(tiny(num_classes=1))
    x, t = inputs(network)
    assert torch.equal(network(x, t), network(x, t, Condition(label=torch.zeros(3, dtype=torch.long))))


def test_several_classes_without_null_row_need_a_label_or_the_last_class():
    x, t = inputs(tiny())
    label = torch.tensor([0, 1, 2])
    half = Condition(label=label).absent("label", where=torch.tensor([False, True, False]))
    strict = randomised(tiny(num_classes=3))
    for condition in (None, Condition(), half):
        with pytest.raises(ValueError, match=r"label is absent.*3 classes.*label_dropout"):
            strict(x, t, condition)
    official = randomised(tiny(num_classes=3, absent_label="last"))
    assert torch.equal(official(x, t), official(x, t, Condition(label=torch.full((3,), 2))))


@pytest.mark.parametrize("label", [[0, 1, 3], [-1, 0, 0]])
def test_a_label_out_of_range_is_an_error(label):
    network = tiny(num_classes=3, label_dropout=0.1)
    x, t = inputs(network)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        network(x, t, Condition(label=torch.tensor(label)))


def test_labels_of_another_batch_size_are_an_error():
    network = tiny(num_classes=3)
    x, t = inputs(network)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        network(x, t, Condition(label=torch.tensor([0, 1])))


def test_dropping_labels_is_keyed_and_has_the_rate_of_the_embedding():
    network = tiny(num_classes=3, label_dropout=0.25)
    condition = Condition(label=torch.zeros(4000, dtype=torch.long))
    first, again = (network.drop(condition, generator(7)).presence("label") for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, network.drop(condition, generator(8)).presence("label"))
    assert (~first).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_dropping_never_brings_a_label_back():
    network = tiny(num_classes=3, label_dropout=0.5)
    absent = Condition(label=torch.zeros(50, dtype=torch.long)).absent("label")
    assert not network.drop(absent, generator()).presence("label").any()


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"num_classes": 3, "label_dropout": 0.5}])
def test_dropping_changes_nothing_where_there_is_nothing_to_drop(options):
    network = tiny(**options)
    label = Condition(label=torch.tensor([0, 1])) if options == {"num_classes": 3} else Condition()
    source = generator()
    assert network.drop(label, source) is label
    assert network.drop(None, source) is None
    assert torch.equal(source.get_state(), generator().get_state())


def test_a_network_without_classes_reads_no_condition():
    network = randomised(tiny())
    x, t = inputs(network)
    assert network.streams == ()
    assert network.y_embedder is None
    assert network.null(None, 3).streams == ()
    assert torch.equal(network(x, t, Condition(label=torch.tensor([0, 1, 2]))), network(x, t))


def test_check_condition_names_the_stream_that_would_be_ignored():
    check_condition(tiny(num_classes=3), Condition(label=torch.tensor([0])))
    check_condition(tiny(), None)
    with pytest.raises(ValueError, match=r"'vector'.*DiT reads \['label'\]"):
        check_condition(tiny(num_classes=3), Condition(vector=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"'label'.*no condition at all"):
        check_condition(tiny(), Condition(label=torch.tensor([0])))


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, r"patch_size.*\(8, 8\).*3"),
        ({"patch_size": 0}, r"patch_size.*0"),
        ({"input_size": (8, 8, 8)}, r"input_size.*\(8, 8, 8\)"),
        ({"input_size": 0}, r"input_size.*0"),
        ({"hidden_size": 18}, r"hidden_size.*18"),
        ({"num_heads": 3}, r"num_heads.*3"),
        ({"num_classes": 0}, r"num_classes.*0"),
        ({"num_classes": 3, "label_dropout": 1.0}, r"label_dropout.*1.0"),
        ({"label_dropout": 0.1}, r"label_dropout.*num_classes.*0.1"),
        ({"num_classes": 3, "absent_label": "zero"}, r"absent_label.*'zero'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_inputs_of_another_shape_are_named():
    network = tiny()
    x, t = inputs(network)
    with pytest.raises(ValueError, match=r"x must have shape.*4, 8, 8.*\(3, 4, 4, 8\)"):
        network(x[:, :, :4], t)
    with pytest.raises(ValueError, match=r"t must have shape.*\(2,\)"):
        network(x, t[:2])
    with pytest.raises(ValueError, match=r"t must have shape.*\(3, 1\)"):
        network(x, t[:, None])


# ---- precision ----


def test_autocast_keeps_time_and_modulation_in_float32():
    network = randomised(tiny(num_classes=3))
    x, t = inputs(network)
    condition = Condition(label=torch.tensor([0, 1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        assert network.embed_condition(t, condition, 3).dtype == torch.float32
        low = network(x, t, condition)
    high = network(x, t, condition)
    assert (low.float() - high).norm() < 0.05 * high.norm()


def test_weights_in_bfloat16_run():
    network = randomised(tiny(num_classes=3, qk_norm=True)).bfloat16()
    x, t = inputs(network)
    out = network(x.bfloat16(), t, Condition(label=torch.tensor([0, 1, 2])))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_networks_load_no_framework():
    heavy = ["lightning", "torchmetrics", "torchvision", "diffusers", "transformers", "timm"]
    code = f"import sys, lightning_flows.networks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
