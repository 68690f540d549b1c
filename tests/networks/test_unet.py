import json
import warnings

import pytest
import torch

from lightning_flows.flow import Condition
from lightning_flows.flow.condition import Tokens
from lightning_flows.networks import (
    ADMUNet,
    EDMUNet,
    ReversedTime,
    SemanticRescaler,
    UNetBlock,
    VelocityNetwork,
    attention_backend,
    check_condition,
)
from lightning_flows.networks.unet_blocks import BlockOptions, PlaneAttention
from lightning_flows.store import build, load_into

TINY = {
    ADMUNet: {
        "input_size": 8,
        "hidden_size": 32,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attention_factors": (2,),
        "num_heads": 2,
    },
    EDMUNet: {
        "input_size": 8,
        "hidden_size": 16,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attention_sizes": (4,),
        "head_channels": 16,
    },
}
BOTH = pytest.mark.parametrize("cls", [ADMUNet, EDMUNet])


def tiny(cls, **arguments):
    return cls(**{**TINY[cls], **arguments})


def randomised(network, seed=0):
    """Every parameter drawn again, so that no part is silent."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = max(1, parameter[0].numel()) if parameter.dim() else 1
            parameter.copy_(torch.randn(parameter.shape, generator=source) * fan**-0.5 + (0.5 if "norm" in name else 0))
    return network.eval()


def inputs(network, batch=2, seed=1):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *network.shape, generator=source), torch.rand(batch, generator=source)


def everything(network, batch=2, seed=2):
    """A condition with every stream that the network reads."""
    source = torch.Generator().manual_seed(seed)
    draw = {
        "label": lambda: torch.arange(batch) % 3,
        "tokens": lambda: Tokens(
            torch.randn(batch, 3, 6, generator=source), torch.tensor([[True, True, False]]).repeat(batch, 1)
        ),
        "spatial": lambda: torch.randn(batch, network.spatial_channels, *network.shape[1:], generator=source),
    }
    return Condition(**{name: draw[name]() for name in network.streams})


FULL = {
    ADMUNet: {"num_classes": 3, "label_dropout": 0.1, "spatial_channels": 2},
    EDMUNet: {"num_classes": 3, "label_dropout": 0.1, "spatial_channels": 2, "context_dim": 6},
}
OPTIONS = [
    (ADMUNet, {}),
    (ADMUNet, FULL[ADMUNet]),
    (ADMUNet, {"resblock_updown": True, "qkv_order": "kind", "head_channels": 16, "input_size": (8, 12)}),
    (ADMUNet, {"conv_resample": False, "scale_shift": False, "hidden_size": 64, "out_channels": 8}),
    (ADMUNet, {"channel_mult": (2, 1, 3), "attention_factors": (1, 4), "num_blocks": 2, "in_channels": 3}),
    (EDMUNet, {}),
    (EDMUNet, FULL[EDMUNet]),
    (EDMUNet, {"num_heads": 4, "embedding_mult": 2, "input_size": (4, 8), "out_channels": 8}),
    (EDMUNet, {"channel_mult": (2, 1, 3), "attention_sizes": (2, 8), "num_blocks": 2, "in_channels": 3}),
    (ADMUNet, {"patch_size": 2, "pooled_channels": 3, "spatial_channels": 2}),
    (EDMUNet, {"patch_size": 2, "pooled_channels": 3, "attention_sizes": (2,), "out_channels": 4}),
]
EVERY = pytest.mark.parametrize(("cls", "options"), OPTIONS)


@EVERY
def test_the_contract_of_a_velocity_network(cls, options):
    network = tiny(cls, **options)
    x, t = inputs(network)
    condition = everything(network)
    assert isinstance(network, VelocityNetwork)
    assert network.in_channels == network.shape[0] == options.get("in_channels", 4)
    assert torch.equal(network(x, t, condition), torch.zeros_like(x))  # fresh
    randomised(network)
    out = network(x, t, condition)
    assert out.shape == x.shape
    check_condition(network, condition)
    torch.testing.assert_close(network(x, torch.tensor(0.3), condition), network(x, torch.full((2,), 0.3), condition))
    alone = [network(x[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), out, rtol=1e-4, atol=1e-5)
    json.dumps(network.config)
    again = build(network.config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x, t, condition), out)


@EVERY
def test_every_parameter_gets_a_gradient_and_time_is_seen(cls, options):
    network = randomised(tiny(cls, **options))
    x, t = inputs(network)
    condition = everything(network)
    network(x, t, condition).square().sum().backward()
    network(x, t, network.null(condition)).square().sum().backward()  # the null row
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    difference = network(x, t, condition) - network(x, 1 - t, condition)
    assert difference.abs().max() > 1e-3


@BOTH
def test_each_stream_is_read_and_its_absence_is_not_its_value(cls):
    network = randomised(tiny(cls, **FULL[cls]))
    x, t = inputs(network)
    condition = everything(network)
    full, null = network(x, t, condition), network(x, t)
    torch.testing.assert_close(network(x, t, network.null(condition, 2)), null, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(x, t, network.null(None, 2)), null)
    for stream in network.streams:
        less = network(x, t, condition.absent(stream))
        assert (less - full).abs().max() > 1e-3
        mixed = network(x, t, condition.absent(stream, where=torch.tensor([True, False])))
        torch.testing.assert_close(mixed, torch.stack([less[0], full[1]]), rtol=1e-4, atol=1e-5)
    garbage = {
        "label": torch.tensor([99, -1]),
        "spatial": torch.full((2, 2, 8, 8), float("nan")),
        "tokens": Tokens(torch.full((2, 3, 6), float("nan")), torch.ones(2, 3, dtype=torch.bool)),
    }
    absent = Condition(**{name: garbage[name] for name in network.streams}).absent()
    torch.testing.assert_close(network(x, t, absent), null, rtol=1e-4, atol=1e-5)


def test_padding_of_tokens_does_not_matter():
    network = randomised(tiny(EDMUNet, context_dim=6))
    x, t = inputs(network)
    values, mask = everything(network).tokens
    out = network(x, t, Condition(tokens=Tokens(values, mask)))
    torch.testing.assert_close(
        network(x, t, Condition(tokens=Tokens(values[:, :2], mask[:, :2]))), out, rtol=1e-4, atol=1e-5
    )
    changed = values.clone()
    changed[:, 2] = 7.0
    assert torch.equal(network(x, t, Condition(tokens=Tokens(changed, mask))), out)


def test_an_adm_label_without_null_row_cannot_be_absent():
    network = randomised(tiny(ADMUNet, num_classes=3))
    x, t = inputs(network)
    for condition in (None, Condition(label=torch.tensor([0, 1])).absent("label", where=torch.tensor([True, False]))):
        with pytest.raises(ValueError, match=r"label is absent.*3 classes.*label_dropout"):
            network(x, t, condition)


def test_an_edm_label_is_a_linear_of_its_one_hot_vector():
    network = randomised(tiny(EDMUNet, num_classes=3))
    t = torch.tensor([0.1, 0.9])
    table = network.y_embedder.embedding_table.weight
    time = network.embed_condition(t, None, 2)
    label = Condition(label=torch.tensor([2, 0])).absent("label", where=torch.tensor([False, True]))
    expected = time + torch.tensor([[0.0, 0, 1], [0, 0, 0]]) @ table
    torch.testing.assert_close(network.embed_condition(t, label, 2), expected)


def test_streams_are_dropped_together_at_equal_rates_and_keyed():
    rates = {"label_dropout": 0.25, "context_dropout": 0.25, "spatial_dropout": 0.1}
    network = tiny(EDMUNet, num_classes=3, context_dim=6, spatial_channels=1, **rates)
    condition = everything(network, batch=2000)
    first, again = (network.drop(condition, torch.Generator().manual_seed(3)) for _ in range(2))
    gone = {name: ~first.presence(name) for name in network.streams}
    assert torch.equal(gone["label"], gone["tokens"])
    assert torch.equal(gone["label"], ~again.presence("label"))
    assert gone["label"].float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert gone["spatial"].float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert not (gone["spatial"] & ~gone["label"]).any()
    quiet, source = tiny(EDMUNet, num_classes=3), torch.Generator().manual_seed(3)
    state = source.get_state()
    label = Condition(label=torch.tensor([1]))
    assert quiet.drop(label, source) is label
    assert network.drop(None, source) is None
    assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize(
    ("cls", "a", "b"),
    [
        (ADMUNet, {"qkv_order": "head"}, {"qkv_order": "kind"}),
        (ADMUNet, {"num_heads": 2}, {"num_heads": 4}),
        (ADMUNet, {"num_heads": 2}, {"head_channels": 16}),
        (ADMUNet, {"time_scale": 1.0}, {"time_scale": 10.0}),
        (EDMUNet, {"num_heads": 2}, {"num_heads": 4}),
        (EDMUNet, {"head_channels": 32}, {"head_channels": 16}),
    ],
)
def test_options_that_shapes_do_not_show_change_the_numbers(cls, a, b):
    first, second = (randomised(tiny(cls, **options)) for options in (a, b))
    assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
    x, t = inputs(first)
    assert (first(x, t) - second(x, t)).abs().max() > 1e-4


@BOTH
def test_channels_beyond_those_of_x_are_dropped(cls):
    network = randomised(tiny(cls, out_channels=8))
    x, t = inputs(network)
    before = network(x, t)
    with torch.no_grad():
        network.out_conv.weight[4:] += 1
    assert torch.equal(network(x, t), before)


@BOTH
def test_dropout_acts_in_training_only(cls):
    network = randomised(tiny(cls, dropout=0.5))
    x, t = inputs(network)
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize("order", ["head", "kind", "channel"])
def test_qkv_orders_are_permutations_of_each_other(order):
    """With weights permuted by hand into each order, the attention is the same."""
    heads, width, channels = 2, 16, 32

    def module(name):
        options = BlockOptions(embedding_size=8, groups=lambda c: 8, heads=lambda c: heads, qkv_order=name)
        return randomised(PlaneAttention(channels, heads, options))

    reference, other = module("kind"), module(order)
    place = {
        "kind": lambda kind, head, c: (kind * heads + head) * width + c,
        "head": lambda kind, head, c: (head * 3 + kind) * width + c,
        "channel": lambda kind, head, c: (head * width + c) * 3 + kind,
    }
    with torch.no_grad():
        for kind in range(3):
            for head in range(heads):
                for c in range(width):
                    to, source = place[order](kind, head, c), place["kind"](kind, head, c)
                    other.qkv.weight[to] = reference.qkv.weight[source]
                    other.qkv.bias[to] = reference.qkv.bias[source]
    x = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(x), reference(x))


def test_scaled_skips_and_projected_skips():
    def block(**options):
        shared = BlockOptions(embedding_size=8, groups=lambda c: 4, heads=lambda c: 2, **options)
        return UNetBlock(16, 16, shared, attention=True, resample="down")

    x, e = torch.randn(2, 16, 4, 4), torch.zeros(2, 8)
    mean = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(block()(x, e), mean)  # a fresh block is its skip
    torch.testing.assert_close(block(skip_scale=0.5**0.5)(x, e), mean / 2)  # two sums
    projected = block(project_skip=True)
    torch.testing.assert_close(projected(x, e), projected.skip(mean))


# ---- meta, initial weights, precision ----


@pytest.mark.parametrize(
    ("cls", "arguments", "millions"),
    [
        (ADMUNet, {}, 153.1),
        (ADMUNet, {"input_size": 64, "channel_mult": (1, 2, 2, 2, 4), "attention_factors": (8, 16)}, 352.2),
        (ADMUNet, {"channel_mult": (1, 2, 3, 4)}, 356.1),
        (ADMUNet, {"channel_mult": (1, 2, 3, 4), "spatial_channels": 5}, 356.1),
        (EDMUNet, {}, 406.4),
        (EDMUNet, {"num_classes": 1000}, 407.4),
    ],
)
def test_published_parameter_counts(cls, arguments, millions):
    with torch.device("meta"):
        network = cls(**arguments)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_edm_heads_at_the_published_width():
    with torch.device("meta"):
        network = EDMUNet()
    assert [level.blocks[0].attention.num_heads for level in network.encoder[1:]] == [8, 12, 16]
    assert network.encoder[0].blocks[0].attention is None
    with torch.device("meta"):
        network = ADMUNet()
    assert [level.blocks[0].attention is not None for level in network.encoder] == [False, False, False, True]


@BOTH
def test_a_network_from_the_meta_device_is_the_same_when_it_is_filled(cls):
    with torch.device("meta"):
        network = tiny(cls, **FULL[cls])
    assert list(network.buffers()) == []
    other = randomised(tiny(cls, **FULL[cls]))
    load_into(network, other.state_dict())
    x, t = inputs(other)
    assert torch.equal(network.eval()(x, t, everything(other)), other(x, t, everything(other)))


@BOTH
def test_fresh_weights_have_the_published_scales_also_after_meta(cls):
    with torch.device("meta"):
        hollow = tiny(cls, num_classes=2000)
    hollow.to_empty(device="cpu")
    hollow.reset_parameters()
    for network in (tiny(cls, num_classes=2000), hollow):
        assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(1.0, rel=0.02)
        block = network.encoder[1].blocks[0]
        bound = (9 * block.conv1.in_channels) ** -0.5
        assert block.conv1.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert block.conv1.bias.abs().max() <= bound
        zeros = [block.conv2, block.attention.proj, network.out_conv]
        assert not any(p.any() for module in zeros for p in module.parameters())
        assert torch.equal(block.norm1.weight, torch.ones_like(block.norm1.weight))


@BOTH
def test_autocast_keeps_time_and_norms_in_float32(cls):
    network = randomised(tiny(cls, **FULL[cls]))
    x, t = inputs(network)
    condition = everything(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.embed_condition(t, condition, 2).dtype == torch.float32
        low = network(x, t, condition)
    high = network(x, t, condition)
    assert (low.float() - high).norm() < 0.05 * high.norm()
    out = network.bfloat16()(x.bfloat16(), t, condition)
    assert out.dtype == torch.bfloat16
    assert (out.float() - high).norm() < 0.1 * high.norm()


@BOTH
def test_forward_mode_derivatives_work_under_the_math_backend(cls):
    network = randomised(tiny(cls)).double()
    x, t = (value.double() for value in inputs(network))
    dx, dt = torch.ones_like(x), torch.ones_like(t)
    with attention_backend("math"):
        tangent = torch.func.jvp(network, (x, t), (dx, dt))[1]
    h = 1e-5
    slope = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)


def test_reversed_time_wraps_a_unet():
    network = randomised(tiny(ADMUNet, spatial_channels=5))
    wrapped = ReversedTime(network)
    x, t = inputs(network)
    condition = everything(network)
    assert (wrapped.shape, wrapped.streams, wrapped.in_channels) == ((4, 8, 8), ("spatial",), 4)
    torch.testing.assert_close(wrapped(x, t, condition), -network(x, 1 - t, condition))


# ---- warnings and errors ----


def test_time_that_a_norm_removes_is_a_warning_that_names_the_level():
    with pytest.warns(UserWarning, match=r"scale_shift=False.*level\(s\) \[0\].*hidden_size"):
        network = tiny(ADMUNet, scale_shift=False, channel_mult=(1, 2))
    block = randomised(network).encoder[0].blocks[0]
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(block(x, torch.zeros(2, 128)), block(x, torch.ones(2, 128)), rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(ADMUNet, scale_shift=False, channel_mult=(2, 4))
        tiny(ADMUNet)


def test_levels_too_narrow_for_a_head_are_a_warning():
    with pytest.warns(UserWarning, match=r"level\(s\) \[1\].*head_channels=64.*no attention"):
        network = tiny(EDMUNet, head_channels=64)
    assert network.middle[0].attention is None


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ADMUNet, {"input_size": 9}, r"input_size.*divisible by 2.*9"),
        (ADMUNet, {"input_size": (8, 8, 8)}, r"input_size.*\(8, 8, 8\)"),
        (ADMUNet, {"hidden_size": 48}, r"hidden_size.*48 channels.*32 groups"),
        (ADMUNet, {"channel_mult": ()}, r"channel_mult.*\[\]"),
        (ADMUNet, {"channel_mult": (1, 0.3)}, r"channel_mult.*0\.3"),
        (ADMUNet, {"num_blocks": 0}, r"num_blocks.*0"),
        (ADMUNet, {"attention_factors": (2, 8)}, r"attention_factors must be among \[1, 2\].*\[8\]"),
        (ADMUNet, {"num_heads": 3}, r"num_heads must divide the 64 channels.*3"),
        (ADMUNet, {"head_channels": 24}, r"head_channels must divide the 64 channels.*24"),
        (ADMUNet, {"qkv_order": "channel"}, r"qkv_order.*'channel'"),
        (ADMUNet, {"label_dropout": 0.1}, r"label_dropout.*num_classes.*0\.1"),
        (ADMUNet, {"spatial_channels": -1}, r"spatial_channels.*-1"),
        (ADMUNet, {"spatial_channels": 1, "spatial_dropout": 1.0}, r"spatial_dropout.*1\.0"),
        (ADMUNet, {"out_channels": 3}, r"out_channels.*in_channels=4.*3"),
        (EDMUNet, {"attention_sizes": (4, 16)}, r"attention_sizes must be among \[8, 4\].*\[16\]"),
        (EDMUNet, {"num_heads": 0}, r"num_heads.*0"),
        (EDMUNet, {"head_channels": 0}, r"head_channels.*0"),
        (EDMUNet, {"head_channels": 10}, r"num_heads must divide the 32 channels.*3"),
        (EDMUNet, {"context_dropout": 0.1}, r"context_dropout.*context_dim"),
        (EDMUNet, {"num_classes": 0}, r"num_classes.*0"),
    ],
)
def test_arguments_out_of_range_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(cls, **arguments)


def test_inputs_of_another_shape_are_named():
    network = tiny(EDMUNet, spatial_channels=2, context_dim=6, num_classes=3)
    x, t = inputs(network)
    with pytest.raises(ValueError, match=r"x must have shape.*4, 8, 8.*\(2, 4, 4, 8\)"):
        network(x[:, :, :4], t)
    with pytest.raises(ValueError, match=r"t must have shape.*\(1,\)"):
        network(x, t[:1])
    with pytest.raises(ValueError, match=r"condition\.spatial must have shape \(2, 2, 8, 8\)"):
        network(x, t, Condition(spatial=torch.zeros(2, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"condition\.tokens must have shape \(2, L, 6\)"):
        network(x, t, Condition(tokens=Tokens(torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool))))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        network(x, t, Condition(label=torch.tensor([0, 3])))


# ---- semantic maps ----


@pytest.mark.parametrize("bias", [False, True])
def test_the_rescaler_shrinks_a_one_hot_map_and_projects_it(bias):
    rescaler = SemanticRescaler(5, 4, stages=2, bias=bias)
    labels = torch.randint(5, (2, 16, 8), generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    for _ in range(2):  # bilinear, half size: the mean of the four pixels around each new centre
        x = torch.nn.functional.avg_pool2d(x, 2)
    out = rescaler(labels)
    torch.testing.assert_close(out, rescaler.channel_mapper(x))
    assert out.shape == (2, 4, 4, 2)
    out.sum().backward()
    assert rescaler.channel_mapper.weight.grad.abs().sum() > 0


def test_maps_that_the_rescaler_cannot_read_are_named():
    rescaler = SemanticRescaler(5)
    with pytest.raises(ValueError, match=r"\[0, 5\).*from 0 to 5"):
        rescaler(torch.tensor([[[0, 5]]]))
    with pytest.raises(ValueError, match=r"integers.*float32 \(2, 8, 8\)"):
        rescaler(torch.zeros(2, 8, 8))
    for arguments in ({"num_classes": 0}, {"out_channels": 0}, {"stages": -1}, {"factor": 2.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            SemanticRescaler(**{"num_classes": 5, **arguments})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_mixed_precision_is_close_to_float32_and_trains(cls, dtype):
    network = randomised(tiny(cls, num_classes=3, label_dropout=0.1))
    (x, t), condition = inputs(network), Condition(label=torch.tensor([0, 2]))
    wanted = network(x, t, condition).detach()
    with torch.autocast("cpu", dtype):
        found = network(x, t, condition)
    found.float().square().mean().backward()
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@BOTH
def test_weights_in_bfloat16_run(cls):
    network = randomised(tiny(cls, num_classes=3, label_dropout=0.1))
    (x, t), condition = inputs(network), Condition(label=torch.tensor([0, 2]))
    wanted = network(x, t, condition)
    found = network.bfloat16()(x.bfloat16(), t, condition)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


# ---------------------------------------------------------------------- patches and pooled channels

AT = {ADMUNet: {"attention_factors": (2,)}, EDMUNet: {"attention_sizes": (2,)}}


def in_patches(x, p):
    """Pixels of each patch of ``x`` (B, C, H, W) as channels, channel by channel, row by row."""
    rows = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H / p, p, W / p, p)
    return rows.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


@BOTH
def test_a_network_of_patches_is_the_network_of_their_pixels(cls):
    whole = randomised(tiny(cls, in_channels=2, patch_size=2, **AT[cls]))
    inside = tiny(cls, in_channels=8, input_size=4, **AT[cls])
    inside.load_state_dict(whole.state_dict())
    x, t = inputs(whole)
    torch.testing.assert_close(in_patches(whole(x, t), 2), inside.eval()(in_patches(x, 2), t))


@BOTH
def test_pooled_channels_are_the_same_everywhere_and_come_from_the_middle(cls):
    network = randomised(tiny(cls, in_channels=5, pooled_channels=3))
    x, t = inputs(network)
    before = network(x, t)
    pooled = before[:, 2:]
    assert torch.equal(pooled, pooled[..., :1, :1].expand_as(pooled))
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3
    with torch.no_grad():
        for part in (network.decoder, network.out_norm, network.out_conv):
            for parameter in part.parameters():
                parameter.mul_(1.5)
    after = network(x, t)
    assert torch.equal(after[:, 2:], pooled)
    assert (after[:, :2] - before[:, :2]).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize(("dtype", "made"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_pooled_channels_are_computed_with_weights_of_any_dtype(cls, dtype, made):
    network = randomised(tiny(cls, in_channels=5, pooled_channels=3))
    x, t = inputs(network)
    wanted = network(x, t)
    found = network.to(dtype)(x.to(dtype), t)
    assert found.dtype == made
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


@BOTH
def test_pooled_channels_are_float32_under_autocast_and_zero_when_fresh(cls):
    network = tiny(cls, in_channels=5, pooled_channels=3)
    randomised(network)
    x, t = inputs(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x, t).dtype == torch.float32
    network.reset_parameters()
    assert not network(x, t).any()


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be positive, got 0"),
        ({"patch_size": 3}, r"divisible by 6 \(2 levels of patches of 3\), got \(8, 8\)"),
        ({"pooled_channels": 4}, "pooled_channels must be fewer than in_channels=4"),
        ({"pooled_channels": -1}, "pooled_channels must be fewer than in_channels=4.*got -1"),
        ({"pooled_channels": 2, "out_channels": 8}, "with out_channels=None"),
    ],
)
def test_patches_and_pooled_channels_that_do_not_fit_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(cls, **{**({"attention_sizes": ()} if cls is EDMUNet else {}), **options})


@pytest.mark.parametrize(("cls", "width"), [(ADMUNet, 32), (EDMUNet, 16)])
def test_patches_of_more_numbers_than_channels_are_warned_of(cls, width):
    options = {"patch_size": 2, **AT[cls]}
    numbers = width + 4
    said = f"gives {numbers} numbers, more than the {width} channels"
    with pytest.warns(UserWarning, match=said) as caught:
        tiny(cls, in_channels=numbers // 4, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(cls, in_channels=width // 4, **options)
        tiny(cls, in_channels=numbers // 4, pooled_channels=1, **options)
