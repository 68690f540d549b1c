"""The U-Net of Stable Diffusion against diffusers, which is the live reference."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from lightning_flows.flow import Condition
from lightning_flows.flow.condition import Tokens
from lightning_flows.hub.convert.stable_diffusion import load_unet
from lightning_flows.networks import (
    ADMUNet,
    StableDiffusionUNet,
    VelocityNetwork,
    attention_backend,
    blocks_of,
    check_condition,
    checkpoint_blocks,
    widen,
)
from lightning_flows.networks.resize_rules import resized, rules_of
from lightning_flows.store import build, load_into

TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
THREE = {
    "sample_size": (8, 16),
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}
CASES = {
    "version 1": {},
    "version 2": {"use_linear_projection": True, "attention_head_dim": (2, 8), "upcast_attention": True},
    "three levels": {**THREE, "attention_head_dim": [1, 2, 8], "layers_per_block": [1, 2, 1]},
    "deep": {"transformer_layers_per_block": [2, 3], "use_linear_projection": True},
    "deep everywhere": {"transformer_layers_per_block": 2, "layers_per_block": 2},
    "no text outside": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "sines first": {"flip_sin_to_cos": False, "freq_shift": 1},
    "norms": {"norm_eps": 1e-3, "norm_num_groups": 16, "act_fn": "swish", "only_cross_attention": [False, False]},
    "odd widths": {"block_out_channels": (24, 40), "attention_head_dim": 8, "in_channels": 3, "out_channels": 3},
}
EVERY = pytest.mark.parametrize("case", CASES)


def randomised(network, seed=0):
    """Every parameter drawn again, so that no part is silent."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = max(1, parameter[0].numel()) if parameter.dim() else 1
            parameter.copy_(torch.randn(parameter.shape, generator=source) * fan**-0.5 + (0.5 if "norm" in name else 0))
    return network.eval()


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(changes, **arguments):
    """Their network, ours with its weights, and a text."""
    theirs = randomised(UNet2DConditionModel(**TINY | changes))
    text = drawn(5, 24, seed=3)
    settings = json.loads(theirs.to_json_string())
    return theirs, load_unet(settings, theirs.state_dict(), text, **arguments), text


def tiny(**arguments):
    sizes = {"channels": (32, 64), "attention": (True, False), "num_blocks": 1, "num_heads": 4, "groups": 8}
    text = {"context_dim": 24, "context_length": 5}
    return StableDiffusionUNet(**{"input_size": 8, **sizes, **text, **arguments})


def close(value, expected):
    assert (value - expected).abs().max() <= 1e-4 * expected.abs().max()


@EVERY
@pytest.mark.parametrize("steps", [(981, 3), (0, 0.7)], ids=["steps", "raw"])
def test_it_is_the_network_of_diffusers(case, steps):
    theirs, ours, text = pair(CASES[case], time_scale=1.0)
    x, t = drawn(2, *ours.shape), torch.tensor(steps, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(x, t, text.expand(2, -1, -1)).sample
        close(ours(x, t), expected)
    assert expected.std() > 0.1
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_time_scale_turns_our_times_into_their_steps():
    theirs, ours, text = pair({}, time_scale=1000.0)
    x = drawn(2, 4, 8, 8)
    with torch.no_grad():
        close(ours(x, torch.tensor([0.25, 0.5])), theirs(x, torch.tensor([250, 500]), text.expand(2, -1, -1)).sample)


def test_gradients_are_those_of_diffusers():
    theirs, ours, text = pair(CASES["version 2"], time_scale=1.0)
    x, t = drawn(2, 4, 8, 8).requires_grad_(), torch.tensor([0.1, 0.9])
    weight = drawn(2, 4, 8, 8, seed=9)
    (theirs(x, t, text.expand(2, -1, -1)).sample * weight).sum().backward()
    expected, x.grad = x.grad, None
    (ours(x, t) * weight).sum().backward()
    close(x.grad, expected)
    close(ours.stem.weight.grad, theirs.conv_in.weight.grad)
    close(ours.encoder[0].blocks[0].transformer.layers[0].cross.key.weight.grad,
          theirs.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad)  # fmt: skip
    close(ours.t_embedder.mlp[0].weight.grad, theirs.time_embedding.linear_1.weight.grad)


def test_tokens_and_their_mask_are_read_as_diffusers_reads_them():
    theirs, ours, _ = pair({}, time_scale=1.0, reads_tokens=True)
    x, t, values = drawn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), drawn(2, 7, 24, seed=4)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    with torch.no_grad():
        expected = theirs(x, t, values, encoder_attention_mask=mask).sample
        close(ours(x, t, Condition(tokens=Tokens(values, mask))), expected)
        garbage = torch.where(mask[:, :, None], values, torch.nan)
        close(ours(x, t, Condition(tokens=Tokens(garbage, mask))), expected)


@pytest.mark.parametrize("length", [3, 5, 9])
def test_samples_without_tokens_have_the_text_in_the_network(length):
    network = randomised(tiny(reads_tokens=True, context_dropout=0.5))
    x, t = drawn(2, 4, 8, 8), torch.tensor([0.2, 0.6])
    condition = Condition(tokens=Tokens(drawn(2, length, 24, seed=6), torch.ones(2, length, dtype=torch.bool)))
    check_condition(network, condition)
    full, null = network(x, t, condition), network(x, t)
    own = Tokens(network.context.expand(2, -1, -1), torch.ones(2, 5, dtype=torch.bool))
    close(network(x, t, Condition(tokens=own)), null)
    close(network(x, t, network.null(condition)), null)
    assert (full - null).abs().max() > 1e-3
    mixed = network(x, t, condition.absent("tokens", where=torch.tensor([True, False])))
    close(mixed, torch.stack([null[0], full[1]]))
    padding = Condition(tokens=Tokens(condition.tokens.values, torch.zeros(2, length, dtype=torch.bool)))
    close(network(x, t, padding), null)
    source = torch.Generator().manual_seed(0)
    rates = [network.drop(condition, source).presence("tokens").float().mean() for _ in range(200)]
    assert 0.4 < sum(rates) / 200 < 0.6


def test_a_network_with_a_fixed_text_reads_no_tokens():
    network = randomised(tiny())
    assert network.streams == ()
    condition = Condition(tokens=Tokens(drawn(2, 3, 24), torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="tokens"):
        check_condition(network, condition)
    assert network.drop(condition, torch.Generator()) is condition
    assert network.null(condition) is condition
    changed = randomised(tiny())
    changed.context = network.context + 1
    x = drawn(1, 4, 8, 8)
    assert (network(x, torch.tensor(0.5)) - changed(x, torch.tensor(0.5))).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"reads_tokens": True}, {"depth": 2, "num_heads": (1, 8), "in_channels": 6}])
def test_the_contract_of_a_velocity_network(options):
    network = tiny(**options)
    x, t = drawn(2, *network.shape), torch.tensor([0.3, 0.9])
    assert isinstance(network, VelocityNetwork)
    assert network.shape == (options.get("in_channels", 4), 8, 8)
    assert torch.equal(network(x, t), torch.zeros_like(x))  # fresh
    randomised(network)
    out = network(x, t)
    torch.testing.assert_close(network(x, torch.tensor(0.3)), network(x, torch.full((2,), 0.3)))
    alone = [network(x[i : i + 1], t[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), out, rtol=1e-4, atol=1e-5)
    json.dumps(network.config)
    again = build(network.config)
    load_into(again, network.state_dict())
    assert torch.equal(again.eval()(x, t), out)  # the text travels with the weights
    assert len(blocks_of(network)) == 8
    checkpoint_blocks(network.train())
    assert torch.equal(network(x, t), out)


def test_every_parameter_gets_a_gradient_and_time_is_seen():
    network = randomised(tiny(channels=(32, 64)))
    x, t = drawn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    network(x, t).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    assert (network(x, t) - network(x, 1 - t)).abs().max() > 1e-3


def test_fresh_weights_after_the_meta_device_are_like_those_of_the_constructor():
    with torch.device("meta"):
        network = tiny()
    network.to_empty(device="cpu").reset_parameters()
    fresh = tiny()
    for name, value in network.state_dict().items():
        like = fresh.state_dict()[name]
        assert value.isfinite().all()
        assert value.std().item() == pytest.approx(like.std().item(), rel=0.5, abs=1e-6), name
    assert torch.equal(network(drawn(1, 4, 8, 8), torch.tensor(0.5)), torch.zeros(1, 4, 8, 8))


def test_forward_derivatives_and_one_graph():
    network = randomised(tiny(reads_tokens=True))
    x, t = drawn(1, 4, 8, 8), torch.tensor([0.4])
    with attention_backend("math"):
        tangent = torch.func.jvp(lambda x: network(x, t), (x,), (torch.ones_like(x),))[1]
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    condition = Condition(tokens=Tokens(drawn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool)))
    assert torch.equal(compiled(x, t, condition), network(x, t, condition))
    exact, x, t = network.double(), x.double(), t.double()
    close(tangent.double(), (exact(x + 1e-4, t) - exact(x - 1e-4, t)) / 2e-4)


def test_16_bits_stay_near():
    network = randomised(tiny())
    x, t = drawn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        exact = network(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x, t)
        whole = network.to(torch.bfloat16)(x, t)
    assert whole.dtype == torch.bfloat16
    for value in (rough.float(), whole.float()):
        assert (value - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize(
    ("arguments", "parameters"), [({}, 865_910_724), ({"num_heads": 8, "context_dim": 768}, 859_520_964)]
)
def test_the_published_sizes(arguments, parameters):
    with torch.device("meta"):
        network = StableDiffusionUNet(**arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters


# ---- more channels ----


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_a_picture_give_copies_of_the_prediction(copies):
    network = randomised(tiny())
    x, t = drawn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    wide = widen(network, 4 * copies, halve=True)
    assert (wide.shape, wide.training) == ((4 * copies, 8, 8), False)
    close(wide(x.repeat(1, copies, 1, 1), t), network(x, t).repeat(1, copies, 1, 1))
    official = widen(network, 4 * copies)
    assert torch.equal(official.stem.weight, network.stem.weight.repeat(1, copies, 1, 1))
    assert torch.equal(official.out_conv.weight, network.out_conv.weight.repeat(copies, 1, 1, 1))
    assert torch.equal(official.out_conv.bias, network.out_conv.bias.repeat(copies))
    assert torch.equal(official.context, network.context)


def test_weights_for_other_channels_are_copies_where_they_can_be():
    network = randomised(tiny())
    wide, further = tiny(in_channels=8), tiny(in_channels=6)
    for target in (wide, further):
        load_into(target, resized(network.state_dict(), rules_of(target, network.config))[0])
    x, t = drawn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    rest = drawn(2, 2, 8, 8, seed=5)
    assert torch.equal(wide.eval()(x.repeat(1, 2, 1, 1), t), widen(network, 8)(x.repeat(1, 2, 1, 1), t))
    close(further.eval()(torch.cat([x, rest], 1), t)[:, :4], network(x, t))  # the house's rule: new channels are silent
    grey, colour = randomised(tiny(in_channels=1)), tiny(in_channels=3).eval()
    load_into(colour, resized(grey.state_dict(), rules_of(colour, grey.config))[0])
    close(colour(x[:, :1].repeat(1, 3, 1, 1), t), grey(x[:, :1], t).repeat(1, 3, 1, 1))
    assert torch.equal(widen(grey, 2).stem.weight, grey.stem.weight.repeat(1, 2, 1, 1))


@pytest.mark.parametrize("channels", [6, 2, 0])
def test_only_multiples_are_copies(channels):
    with pytest.raises(ValueError, match=f"in_channels must be a multiple of 4, got {channels}"):
        widen(tiny(), channels)


def test_another_network_cannot_be_widened():
    with pytest.raises(ValueError, match=r"network must be a U-Net .*, got Linear"):
        widen(torch.nn.Linear(2, 2), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 9}, r"input_size must be divisible by 2 \(2 levels\), got \(9, 9\)"),
        ({"channels": (30, 64)}, r"channels must be multiples of groups=8, got \[30, 64\]"),
        ({"channels": ()}, "channels must be multiples"),
        ({"in_channels": 0}, "in_channels must be positive, got 0"),
        ({"context_length": 0}, "context_length must be positive, got 0"),
        ({"attention": (True,)}, r"attention must have one entry for each of 2 levels, got \[True\]"),
        ({"num_heads": (2, 4, 8)}, r"num_heads must be one positive number, or one for each of 2 levels, got \(2, 4"),
        ({"num_blocks": 0}, "num_blocks must be one positive number"),
        ({"depth": (1, 0)}, "depth must be one positive number"),
        ({"num_heads": 5}, "num_heads must divide the 32 channels of an attention, got 5"),
        ({"context_dropout": 0.1}, r"context_dropout must lie in \[0, 1\), and be 0 without reads_tokens, got 0.1"),
        ({"context_dropout": 1.0, "reads_tokens": True}, "context_dropout .* got 1.0"),
        ({"frequency_shift": 16.0}, r"frequency_shift must lie in \[0, 16\), got 16.0"),
        ({"groups": 0}, "groups must be positive, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_inputs_of_another_shape_are_named():
    network = tiny(reads_tokens=True)
    with pytest.raises(ValueError, match=r"x must have shape \(B, \*\(4, 8, 8\)\), got \(2, 3, 8, 8\)"):
        network(drawn(2, 3, 8, 8), torch.tensor(0.5))
    tokens = Tokens(drawn(2, 3, 7), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"condition.tokens must have shape \(2, L, 24\), got \(2, 3, 7\)"):
        network(drawn(2, 4, 8, 8), torch.tensor(0.5), Condition(tokens=tokens))


@pytest.mark.parametrize("options", [{"patch_size": 2}, {"pooled_channels": 1}])
def test_patches_and_pooled_channels_cannot_be_widened(options):
    network = ADMUNet(input_size=8, hidden_size=32, channel_mult=[1], attention_factors=[], **options)
    with pytest.raises(ValueError, match=r"neither patches .* nor pooled_channels"):
        widen(network, 8)
