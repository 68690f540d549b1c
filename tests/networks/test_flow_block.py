"""Laws of one autoregressive block, in float64, for every option."""

import itertools
import math

import pytest
import torch

from lightning_flows.networks import LayerStyle, Sequential
from lightning_flows.networks.flow_block import FlowBlock
from tests.networks.tiny_flows import TOKEN, WIDTH, block, context_of, inverted, jacobian, normal, redrawn, turns_of

STYLE = LayerStyle(WIDTH, 20)
OPTIONS = {
    f"{place}, {first}, {scale}, {order}": {
        "table": place == "table",
        "start_token": first == "start",
        "scale": scale,
        "reverse": order == "reversed",
        **extra,
    }
    for (place, first, scale, order), extra in zip(
        itertools.product(
            ("table", "rotary"), ("start", "copy"), ("exp", "softplus", "none"), ("forwards", "reversed")
        ),
        itertools.cycle(
            [
                {"classes": True},
                {"text": True, "soft_clip": 4.0},
                {"classes": True, "text": True, "final_norm": True},
                {},
            ]
        ),
        strict=False,
    )
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def tokens(n=2, seed=1):
    return normal(n, 6, TOKEN, seed=seed, dtype=torch.float64)


def scan(options):
    """Raster index of the tokens in the order in which they are scanned."""
    return list(range(6))[:: -1 if options.get("reverse") else 1]


@EVERY_OPTION
def test_the_jacobian_is_triangular_in_scan_order_and_its_determinant_is_told(options):
    made = block(**options)
    context, turns, x = context_of(made), turns_of(made), tokens()
    z, log_det = made(x, context, turns)
    assert (z.dtype, log_det.dtype, log_det.shape) == (torch.float64, torch.float64, (2,))
    for i in range(2):

        def one(leaf, i=i):
            rows = [None if part is None else part[i : i + 1].expand(len(leaf), -1, -1) for part in context]
            return made(leaf, type(context)(*rows), turns)[0]

        found = jacobian(one, x[i : i + 1])
        torch.testing.assert_close(torch.linalg.slogdet(found)[1], log_det[i])
        order = scan(options)
        parts = found.unflatten(1, (6, TOKEN)).unflatten(0, (6, TOKEN)).transpose(1, 2)[order][:, order]
        own = parts[range(6), range(6)]  # (6, D, D)
        assert not parts.flatten(2).abs().amax(2).triu(1).any()
        assert not (own - torch.diag_embed(own.diagonal(dim1=1, dim2=2))).any()
        assert (own.diagonal(dim1=1, dim2=2) > 0).all()
        below = parts.flatten(2).abs().amax(2)
        assert (below.tril(-1) + torch.ones(6, 6).triu() > 1e-9).all()  # each token depends on all before it
    if options["scale"] == "none":
        assert not log_det.any()


@EVERY_OPTION
@torch.no_grad()
def test_a_token_changes_nothing_that_is_scanned_before_it(options):
    made = block(**options)
    context, turns, x = context_of(made), turns_of(made), tokens()
    z = made(x, context, turns)[0]
    for place, k in enumerate(scan(options)):
        changed = x.clone()
        changed[:, k] += 1
        after, before = made(changed, context, turns)[0], scan(options)[:place]
        assert torch.equal(after[:, before], z[:, before])
        assert not torch.equal(after[:, k], z[:, k])


@EVERY_OPTION
@torch.no_grad()
def test_both_round_trips(options):
    made = block(layers=2, **options)
    context, turns, x = context_of(made), turns_of(made), tokens()
    z, log_det = made(x, context, turns)
    back, inverse_log_det, run = inverted(made, z, Sequential(), context, turns)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    assert run.passes == run.steps == (6 if options["start_token"] else 5)
    drawn, _, _ = inverted(made, x, Sequential(), context, turns)
    torch.testing.assert_close(made(drawn, context, turns)[0], x)


@torch.no_grad()
def test_a_prefix_and_a_class_are_seen_by_every_token():
    made, x = block(classes=True, text=True, start_token=True), tokens()
    context, turns = context_of(made), turns_of(made)
    z = made(x, context, turns)[0]
    for change in ("added", "prefix"):
        other = context._replace(**{change: getattr(context, change) * -1})
        assert ((made(x, other, turns)[0] - z).abs().amax((0, 2)) > 1e-6).all()
    tail = context._replace(prefix=context.prefix * torch.tensor([[1.0], [-1.0]]))  # the last word alone
    assert ((made(x, tail, turns)[0] - z).abs().amax((0, 2)) > 1e-6).all()


def test_no_class_is_the_mean_of_all():
    made = block(table=True, classes=True)
    found = made.context(torch.tensor([0, 2, -1])).added
    table = made.class_embed
    torch.testing.assert_close(found, torch.stack([table[0], table[2], table.mean(0)]))
    assert made.context().added is None


@torch.no_grad()
def test_the_first_token_is_copied_or_modelled():
    for options, copied in (({"start_token": False}, True), ({"start_token": True}, False)):
        for reverse in (False, True):
            made, first = block(table=True, reverse=reverse, **options), -1 if reverse else 0
            x = tokens()
            assert torch.equal(made(x)[0][:, first], x[:, first]) == copied


@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_a_table_turns_with_the_tokens_and_a_rotation_does_not(reverse):
    """Reversing the scan is: reverse the tokens (and the rows of a table), transform, reverse back."""
    forwards = block(table=True, start_token=True)
    other = block(table=True, start_token=True, reverse=reverse)
    if reverse:
        other.pos_embed.copy_(forwards.pos_embed.flip(0))
    x, turn = tokens(), (lambda y: y.flip(1)) if reverse else (lambda y: y)
    torch.testing.assert_close(other(turn(x))[0], turn(forwards(x)[0]))
    straight, back = block(start_token=True), block(start_token=True, reverse=reverse)
    turns = turns_of(straight)
    torch.testing.assert_close(back(turn(x), rotation=turns)[0], turn(straight(x, rotation=turns)[0]))


@torch.no_grad()
def test_soft_clipping_bounds_both_outputs():
    made = block(start_token=True, scale="softplus", soft_clip=4.0)
    redrawn(made, std=30.0)
    gaussian = made.affine(tokens(50), made.context(), turns_of(made))
    scale = gaussian.log_scale.exp()
    for found, low, high in ((scale, 0.0310, 4.5519), (gaussian.mean, -4.0, 4.0)):
        assert found.min().item() == pytest.approx(low, abs=2e-4)
        assert found.max().item() == pytest.approx(high, abs=2e-4)


@pytest.mark.parametrize("scale", ["exp", "softplus", "none"])
@torch.no_grad()
def test_an_output_of_zero_is_a_deviation_of_one(scale):
    made = block(start_token=True, scale=scale)
    made.proj_out.weight.zero_()
    made.proj_out.bias.zero_()
    x = tokens()
    z, log_det = made(x, rotation=turns_of(made))
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det))


def test_a_fresh_block_has_the_published_initial_scales():
    torch.manual_seed(0)
    fresh = FlowBlock(
        TOKEN, 2, LayerStyle(64, 32), num_tokens=200, num_classes=200, text_size=5, start_token=True, final_norm=True
    )
    again = {name: value.clone() for name, value in fresh.state_dict().items()}
    assert not fresh.proj_out.weight.any()
    assert not fresh.final_norm.weight.any()
    for table in (fresh.pos_embed, fresh.class_embed):
        assert table.std().item() == pytest.approx(0.01, rel=0.05)
    qkv = fresh.attn_blocks[0].attention.qkv.weight
    assert qkv.abs().max().item() == pytest.approx(1 / math.sqrt(64), rel=0.01)
    redrawn(fresh, std=9.0)
    torch.manual_seed(0)
    fresh.reset_parameters()
    assert not fresh.proj_out.weight.any()
    stds = {name: (value.float().std(), again[name].float().std()) for name, value in fresh.state_dict().items()}
    for name, (found, expected) in stds.items():
        if fresh.state_dict()[name].numel() > 60:
            assert found.item() == pytest.approx(expected.item(), rel=0.2), name


@torch.no_grad()
def test_a_block_without_layers_is_the_identity():
    made, x = block(layers=0), tokens().bfloat16()
    z, log_det = made(x)
    assert torch.equal(z, x.float())
    assert (log_det.dtype, log_det.tolist()) == (torch.float32, [0.0, 0.0])


@pytest.mark.parametrize("scale", ["exp", "softplus"])
@torch.no_grad()
def test_scales_and_log_dets_are_float32_under_autocast(scale):
    made = block(start_token=True, classes=True, layers=2, scale=scale, soft_clip=4.0, final_norm=True).float()
    context, turns, x, seen = context_of(made), turns_of(made), tokens().float(), []
    made.proj_out.register_forward_hook(lambda part, given, out: seen.append(out.dtype))
    exact = made(x, context, turns)
    with torch.autocast("cpu", torch.bfloat16):
        gaussian = made.affine(made.scanned(x), context, turns)
        found = made(x, context, turns)
    assert set(seen[1:]) == {torch.bfloat16}
    for value, expected in zip((*gaussian, *found), (None, None, *exact), strict=True):
        assert value.dtype == torch.float32
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=0.05, atol=0.1)
    rounded = gaussian.log_scale.bfloat16().float()
    assert not torch.equal(rounded, gaussian.log_scale)  # more digits than bfloat16 has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "tanh"}, "scale must be one of .* got 'tanh'"),
        ({"soft_clip": -1.0}, "soft_clip must not be negative, got -1.0"),
        ({"depth": -1}, "depth must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FlowBlock(**{"token_size": TOKEN, "depth": 1, "style": STYLE, **options})
