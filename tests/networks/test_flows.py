"""Laws of TARFlow and STARFlow: determinants, both directions, guidance, conditions."""

import functools
import math
from typing import ClassVar

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lightning_flows.flow import Affine, Condition, GaussianProduct, LogLinear, Tokens, log_normal
from lightning_flows.networks import (
    Sequential,
    STARFlow,
    TARFlow,
    attention_backend,
    blocks_of,
    checkpoint_blocks,
    compile_blocks,
    restore_blocks,
)
from lightning_flows.networks.tarflow import tracked
from lightning_flows.store import build
from tests.networks.tiny_flows import FLOWS, TEXT, condition_of, generator, jacobian, normal, redrawn, starflow, tarflow

EVERY_FLOW = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
EXACT = Sequential()
GUIDED = {name: FLOWS[name] for name in ("class vectors", "class token", "text", "text in all blocks")}
EVERY_CONDITION = pytest.mark.parametrize("make", GUIDED.values(), ids=GUIDED)


def data(network, n=2, seed=1, dtype=torch.float32):
    return normal(n, *network.shape, seed=seed, dtype=dtype)


# ---------------------------------------------------------------------- both directions


@EVERY_FLOW
def test_the_log_determinant_is_that_of_the_jacobian(make):
    network = make().double()
    condition, x = condition_of(network, dtype=torch.float64), data(network, dtype=torch.float64)
    z, log_det = network(x, condition)
    assert (z.shape, z.dtype, log_det.dtype) == (x.shape, torch.float64, torch.float64)
    for i in range(2):

        def one(leaf, i=i):
            return network(leaf, None if condition is None else condition[torch.tensor([i] * len(leaf))])[0]

        torch.testing.assert_close(torch.linalg.slogdet(jacobian(one, x[i : i + 1]))[1], log_det[i])


@EVERY_FLOW
@torch.no_grad()
def test_both_round_trips(make):
    network = make()
    condition, x = condition_of(network), data(network)
    z, log_det = network(x, condition)
    back = network.draw(z, condition, method=EXACT)
    torch.testing.assert_close(back.x, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back.log_det, -log_det, rtol=1e-4, atol=1e-4)
    drawn = network.draw(x, condition, method=EXACT)
    again, log_det = network(drawn.x, condition)
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.log_det, -log_det, rtol=1e-4, atol=1e-4)
    assert torch.equal(network.inverse(x, condition, method=EXACT), drawn.x)
    steps = network.patchify(x).shape[1] - (network.stack[-1].sos_embed is None)
    assert drawn.passes == steps * sum(len(block.attn_blocks) > 0 for block in network.stack)


@EVERY_FLOW
@torch.no_grad()
def test_a_sample_depends_on_itself_alone(make):
    network = make()
    condition, x = condition_of(network, 4), data(network, 4)
    order = torch.tensor([3, 1])
    part = None if condition is None else condition[order]
    for found, whole in (
        (network(x[order], part)[0], network(x, condition)[0]),
        (network.inverse(x[order], part, method=EXACT), network.inverse(x, condition, method=EXACT)),
    ):
        torch.testing.assert_close(found, whole[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_states_are_what_is_between_the_blocks():
    network = starflow(num_classes=3, depth=(1, 0, 2))
    condition, x = condition_of(network), data(network)
    found, (z, log_det) = network(x, condition, states=True), network(x, condition)
    assert torch.equal(found.z, z)
    assert torch.equal(found.log_det, log_det)
    assert torch.equal(found.states[0], network.patchify(x))
    total, turns = 0, network.rotations(2, 3, x.device)
    for block, context, turn, state, after in zip(
        network.blocks,
        network.contexts(condition, 2),
        turns,
        found.states,
        [*found.states[1:], network.patchify(z)],
        strict=True,
    ):
        y, part = block(state, context, turn)
        assert torch.equal(y, after)
        total = total + part
    torch.testing.assert_close(total, log_det)


@pytest.mark.parametrize("make", [tarflow, starflow])
@torch.no_grad()
def test_the_density_integrates_to_one_on_a_grid(make):
    """Two pixels of three blocks, on a grid that is evenly spaced in u = arsinh x, out to 74."""
    network = redrawn(make(input_size=(1, 2), patch_size=1, in_channels=1), seed=2, std=0.3).double()
    u = torch.linspace(-5, 5, 151, dtype=torch.float64)
    widths = u.cosh() * (u[1] - u[0])
    x = torch.cartesian_prod(u.sinh(), u.sinh()).reshape(-1, 1, 1, 2)
    z, log_det = network(x)
    density = (log_normal(z) + log_det).exp()
    assert (density @ torch.outer(widths, widths).flatten()).item() == pytest.approx(1, abs=1e-6)
    assert (density - log_normal(x).exp()).abs().max() > 0.1  # it is not the normal density


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize("make", [tarflow, starflow])
def test_patches_are_in_raster_order_and_come_back(make):
    network, x = make(), normal(2, 2, 4, 6)
    patches = network.patchify(x)
    for token in range(6):
        row, column = divmod(token, 3)
        patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        order = (0, 2, 3, 1) if make is starflow else (0, 1, 2, 3)  # channels last or first
        assert torch.equal(patches[:, token], patch.permute(order).flatten(1))
    assert torch.equal(network.unpatchify(patches, 2, 3), x)


@torch.no_grad()
def test_starflow_takes_any_size_and_tarflow_its_own():
    network = starflow(num_classes=3)
    for size in ((2, 2), (6, 4), (2, 12)):
        x, condition = normal(2, 2, *size), condition_of(network)
        z, _ = network(x, condition)
        torch.testing.assert_close(network.inverse(z, condition, method=EXACT), x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"x must have \(2, 3\) patches.* got \(3, 2\)"):
        tarflow()(normal(2, 2, 6, 4))
    for shape in ((2, 2, 4, 5), (2, 3, 4, 6), (2, 4, 6)):
        with pytest.raises(ValueError, match=r"x must have shape \(B, 2, H, W\), H and W multiples of 2"):
            network(torch.zeros(shape))


# ---------------------------------------------------------------------- conditions


@EVERY_CONDITION
@torch.no_grad()
def test_the_condition_changes_the_density_and_its_absence_is_null(make):
    network, n = make(), 3
    condition, x = condition_of(network, n), data(network, n)
    known, other = network(x, condition)[1], network(x, condition[torch.tensor([1, 2, 0])])[1]
    assert ((known - other).abs() > 1e-5).all()
    free = network(x, None)[1]
    for nothing in (network.null(condition), network.null(), Condition()):
        torch.testing.assert_close(network(x, nothing)[1], free)
    first = torch.tensor([True, False, False])
    mixed = network(x, condition.absent(*network.streams, where=first))[1]
    torch.testing.assert_close(mixed, torch.where(first, free, known))
    assert ((known - free).abs() > 1e-5).all()


@torch.no_grad()
def test_what_no_label_means_to_each_family():
    vectors = tarflow(num_classes=3)
    added = [block.class_embed.mean(0) for block in vectors.stack]
    for found, expected in zip(vectors.contexts(None, 2), added, strict=True):
        torch.testing.assert_close(found.added, expected.expand(2, 1, -1))
    code = starflow(num_classes=3)
    deep = code.stack[-1].proj_txt
    contexts = code.contexts(Condition(label=torch.tensor([1, 0]), present={"label": torch.tensor([True, False])}), 2)
    torch.testing.assert_close(contexts[-1].prefix[:, 0], deep.weight.T[[1, 3]] + deep.bias)
    assert all(context.prefix is None for context in contexts[:-1])


@torch.no_grad()
def test_short_texts_are_padded_with_zeros_that_are_seen():
    network, x = starflow(**TEXT), normal(2, 2, 4, 6)
    values = normal(2, 2, 5, seed=3)
    short = Condition(tokens=Tokens(values, torch.tensor([[True, True], [True, False]])))
    padded = torch.zeros(2, 3, 5)
    padded[0, :2], padded[1, :1] = values[0], values[1, :1]
    whole = Condition(tokens=Tokens(padded, torch.ones(2, 3, dtype=torch.bool)))
    assert torch.equal(network(x, short)[0], network(x, whole)[0])
    nan = torch.where(short.tokens.mask[..., None], values, math.nan)  # padding may hold anything
    assert torch.equal(network(x, Condition(tokens=Tokens(nan, short.tokens.mask)))[0], network(x, short)[0])


@pytest.mark.parametrize(
    ("network", "condition", "message"),
    [
        (tarflow, Condition(label=torch.tensor([0, 3])), r"condition.label must lie in \[0, 3\), got \[0, 3\]"),
        (starflow, Condition(label=torch.tensor([0, -1])), r"condition.label must lie in \[0, 3\), got \[0, -1\]"),
        (starflow, Condition(label=torch.tensor([0])), r"condition.label must have shape \(2,\), got \(1,\)"),
    ],
)
def test_labels_that_do_not_exist_are_refused(network, condition, message):
    made = network(num_classes=3)
    for call in (made, functools.partial(made.inverse, method=EXACT)):
        with pytest.raises(ValueError, match=message):
            call(normal(2, 2, 4, 6), condition)


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3, 4), (1, 3, 5)])
def test_longer_and_other_texts_are_refused(shape):
    condition = Condition(tokens=Tokens(torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"condition.tokens must have shape \(2, at most 3, 5\), got"):
        starflow(**TEXT)(normal(2, 2, 4, 6), condition)


@pytest.mark.parametrize(
    ("make", "stream"),
    [
        (lambda rate: tarflow(num_classes=3, label_dropout=rate), "label"),
        (lambda rate: starflow(num_classes=3, label_dropout=rate), "label"),
        (lambda rate: starflow(**TEXT, text_dropout=rate), "tokens"),
    ],
)
def test_streams_are_dropped_at_their_rate_by_the_generator(make, stream):
    network = make(0.3)
    condition = condition_of(network, 4000)
    found = network.drop(condition, generator(5))
    here = found.presence(stream)
    assert here.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(network.drop(condition, generator(5)).presence(stream), here)
    assert not torch.equal(network.drop(condition, generator(6)).presence(stream), here)
    assert make(0.0).drop(condition, generator(5)).presence(stream).all()
    assert network.drop(None, generator()) is None


# ---------------------------------------------------------------------- guidance


def rows_read(network):
    """Numbers of rows that went through the first layer of every block, filled by calls."""
    seen = {b: [] for b in range(len(network.blocks))}
    for b, block in enumerate(network.stack):
        block.proj_in.register_forward_hook(lambda part, given, out, b=b: seen[b].append(len(out)))
    return seen


@EVERY_CONDITION
@torch.no_grad()
def test_guidance_of_scale_one_costs_and_changes_nothing(make):
    network = make()
    condition, z = condition_of(network), data(network)
    plain, seen = network.draw(z, condition, method=EXACT), rows_read(network)
    for rule in (GaussianProduct(1.0), LogLinear(1.0), LogLinear(1.0, temperature=3.0)):
        found = network.draw(z, condition, guidance=rule, method=EXACT)
        assert torch.equal(found.x, plain.x)
        assert torch.equal(found.log_det, plain.log_det)
    assert {rows for calls in seen.values() for rows in calls} == {2}


@EVERY_CONDITION
@torch.no_grad()
def test_guidance_towards_the_same_condition_changes_nothing(make):
    network = make()
    condition, z = condition_of(network), data(network)
    plain = network.draw(z, condition, method=EXACT)
    for rule in (GaussianProduct(3.0), LogLinear(3.0, annealed=True)):
        found = network.draw(z, condition, guidance=rule, null=condition, method=EXACT)
        torch.testing.assert_close(found.x, plain.x, rtol=1e-4, atol=1e-4)
        assert (network.inverse(z, condition, guidance=rule, method=EXACT) - plain.x).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["class token", "text", "text in all blocks"])
@pytest.mark.parametrize("deep_only", [False, True])
@torch.no_grad()
def test_the_null_branch_is_computed_where_it_differs_and_is_wanted(name, deep_only):
    network = GUIDED[name]()
    seen = rows_read(network)
    network.draw(data(network), condition_of(network), guidance=GaussianProduct(2.0, deep_only=deep_only), method=EXACT)
    doubled = [{4} == set(calls) for calls in seen.values()]
    assert doubled == ([True] * 3 if "all" in name and not deep_only else [False, False, True])


class Told(LogLinear):
    """Takes notes of what it is asked, and answers with the condition's Gaussian."""

    notes: ClassVar[list] = []

    def __call__(self, conditional, unconditional, progress):
        self.notes.append((conditional, unconditional, progress))
        return conditional


@pytest.mark.parametrize("make", [GUIDED["class vectors"], GUIDED["class token"]], ids=["copied", "start token"])
@torch.no_grad()
def test_both_branches_follow_one_trajectory_and_know_its_progress(make):
    network = make()
    condition, z = condition_of(network), data(network)
    rule = Told(2.0)
    rule.notes.clear()
    found = network.draw(z, condition, guidance=rule, method=EXACT)
    torch.testing.assert_close(found.x, network.inverse(z, condition, method=EXACT), rtol=1e-5, atol=1e-5)
    start_token = network.stack[-1].sos_embed is not None
    steps = 6 if start_token else 5
    deep = rule.notes[:steps]
    torch.testing.assert_close(torch.cat([note[2] for note in deep]), torch.arange(1, steps + 1) / steps)
    block, turn = network.stack[-1], network.rotations(2, 3, z.device)[-1]
    seen = []
    network.draw(z, condition, method=EXACT, watch=lambda part: part.x is not None and seen.append(part.x))
    for branch, given in ((0, condition), (1, None)):
        whole = block.affine(block.scanned(seen[0]), network.contexts(given, 2)[-1], turn)
        told = Affine(*(torch.cat(parts, 1) for parts in zip(*(note[branch] for note in deep), strict=True)))
        for ours, expected in zip(told, whole, strict=True):
            torch.testing.assert_close(ours, expected[:, 6 - steps :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tarflow, starflow, FLOWS["class vectors"], FLOWS["class token"]])
@torch.no_grad()
def test_a_temperature_softens_the_null_branch_alone(make):
    network = make()
    condition, z, rule = condition_of(network), data(network), Told(2.0, temperature=0.4)
    rule.notes.clear()
    found = network.draw(z, condition, guidance=rule, null=condition, method=EXACT)
    torch.testing.assert_close(found.x, network.inverse(z, condition, method=EXACT), rtol=1e-5, atol=1e-5)
    gaps = [(a.mean - b.mean).abs().max().item() for a, b, _ in rule.notes]
    assert max(gaps) > 1e-4
    for i, block in enumerate(reversed(network.stack)):  # the first input of a block sees itself (and the prefix) alone
        if block.proj_txt is None:
            assert gaps[i * len(gaps) // 3] < 1e-6


@torch.no_grad()
def test_a_flow_without_condition_is_guided_by_its_own_temperature():
    network, z = tarflow(), normal(2, 2, 4, 6)
    plain = network.inverse(z, method=EXACT)
    for temperature in (0.5, 2.0):
        guided = network.inverse(z, guidance=LogLinear(2.0, temperature=temperature), method=EXACT)
        assert (guided - plain).abs().max() > 1e-4
    assert torch.equal(network.inverse(z, guidance=LogLinear(1.0, temperature=0.5), method=EXACT), plain)


@pytest.mark.parametrize(
    ("make", "condition", "message"),
    [
        (tarflow, None, r"GaussianProduct\(scale=2.0\) needs a network with a condition, or a temperature"),
        (FLOWS["class token"], None, r"GaussianProduct\(scale=2.0\) needs a condition with one of \('label',\)"),
        (FLOWS["text"], Condition(label=torch.tensor([0, 1])), r"needs a condition with one of \('tokens',\)"),
    ],
)
def test_guidance_with_nothing_to_guide_by_is_an_error(make, condition, message):
    with pytest.raises(ValueError, match=message):
        make().inverse(normal(2, 2, 4, 6), condition, guidance=GaussianProduct(2.0))


# ---------------------------------------------------------------------- volume preserving


@torch.no_grad()
def test_the_variance_of_noise_is_tracked_in_training_alone():
    network = tarflow(volume_preserving=True)
    x = 3 * normal(5, 2, 4, 6)
    z, log_det = network(x)
    assert not log_det.any()
    assert torch.equal(network.prior_variance, torch.ones(6, 8))
    assert torch.equal(network.prior_std(), torch.ones(6, 8))
    network.train()(x)
    expected = 0.9 + 0.1 * network.patchify(z).square().mean(0)
    torch.testing.assert_close(network.prior_variance, expected)
    torch.testing.assert_close(tracked(torch.ones(6, 8), network.patchify(z)), expected)
    torch.testing.assert_close(network.prior_std(), expected.sqrt())
    assert "prior_variance" in network.state_dict()
    assert network.train().draw(z, method=EXACT) is not None
    torch.testing.assert_close(network.prior_variance, expected)  # drawing tracks nothing
    assert tarflow().prior_std() is None
    assert "prior_variance" not in tarflow().state_dict()


# ---------------------------------------------------------------------- gradients, backends, blocks


@pytest.mark.parametrize("make", [FLOWS["tarflow"], FLOWS["class vectors"], FLOWS["class token"], FLOWS["gemma"]])
def test_every_parameter_gets_a_gradient(make):
    network = make().train()
    condition, x = condition_of(network, 4), data(network, 4)
    z, log_det = network(x, condition)
    (z.square().flatten(1).sum(1) / 2 - log_det).sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@torch.no_grad()
def test_backends_agree_in_both_directions():
    network = FLOWS["shared keys"]()
    x, found = data(network), {}
    for backend in ("auto", "flash", "math"):
        with attention_backend(backend):
            found[backend] = (*network(x), network.inverse(x, method=EXACT))
    for backend in ("flash", "math"):
        torch.testing.assert_close(found[backend], found["auto"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [FLOWS["class vectors"], FLOWS["text in all blocks"]], ids=["tarflow", "starflow"])
def test_blocks_can_be_recomputed_and_compiled(make):
    network = make().train()
    condition, x, counter = condition_of(network), data(network), CompileCounter()

    def gradients():
        network.zero_grad()
        z, log_det = network(x, condition)
        (z.square().flatten(1).sum(1) / 2 - log_det).sum().backward()
        return [log_det.detach(), *(p.grad.clone() for p in network.parameters())]

    expected, keys = gradients(), list(network.state_dict())
    layers = sum(len(block.attn_blocks) for block in network.stack)
    assert checkpoint_blocks(network) == list(blocks_of(network))
    assert len(blocks_of(network)) == layers
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    torch._dynamo.reset()
    compile_blocks(network, backend=counter, fullgraph=True)
    torch.testing.assert_close(gradients(), expected, rtol=1e-5, atol=1e-6)
    assert 1 <= counter.frame_count <= 2  # with a prefix there are sequences of two lengths
    assert list(network.state_dict()) == keys
    restore_blocks(network)
    torch._dynamo.reset()


@torch.no_grad()
def test_bits_are_float32_where_it_counts_under_autocast():
    for make in (FLOWS["class vectors"], FLOWS["text"]):
        network = make()
        condition, x = condition_of(network), data(network)
        exact, back = network(x, condition), network.draw(x, condition, method=EXACT)
        with torch.autocast("cpu", torch.bfloat16):
            found, drawn = network(x, condition), network.draw(x, condition, method=EXACT)
        assert {value.dtype for value in (*found, drawn.x, drawn.log_det)} == {torch.float32}
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
        torch.testing.assert_close((drawn.x, drawn.log_det), (back.x, back.log_det), rtol=0.1, atol=0.1)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tarflow(input_size=5), r"patch_size must divide input_size=\(5, 5\), got 2"),
        (lambda: tarflow(input_size=0), "input_size must be one positive number or .* got 0"),
        (lambda: tarflow(depth=(1, 1)), r"depth must be one number or one for each of the 3 blocks, got \[1, 1\]"),
        (lambda: tarflow(num_blocks=0), "num_blocks must be at least 1, got 0"),
        (lambda: tarflow(num_classes=0), "num_classes must be positive .* got 0"),
        (lambda: tarflow(label_dropout=0.1), "label_dropout must be 0 without num_classes, got 0.1"),
        (lambda: tarflow(num_classes=3, label_dropout=1.0), r"label_dropout must lie in \[0, 1\), got 1.0"),
        (lambda: starflow(depth=()), "depth must have one number for each block, got none"),
        (lambda: starflow(num_classes=3, **TEXT), "num_classes=3 and text_length=3 exclude each other"),
        (lambda: starflow(text_length=3), "text_size must be positive with text_length=3, got None"),
        (lambda: starflow(text_length=-1), "text_length must not be negative, got -1"),
        (lambda: starflow(text_dropout=0.1), "text_dropout must be 0 without text_length, got 0.1"),
        (lambda: starflow(**TEXT, text_dropout=-0.1), r"text_dropout must lie in \[0, 1\), got -0.1"),
        (lambda: starflow(**TEXT, head_size=4), "head_size must be even, with d / 2 - 8 even and positive, got 4"),
        (lambda: starflow(scale="tanh"), "scale must be one of .* got 'tanh'"),
    ],
)
def test_arguments_that_mean_nothing_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [FLOWS["class vectors"], FLOWS["gemma"]])
def test_a_config_builds_the_same_network(make):
    network = make()
    again = build(network.config)
    assert again.config == network.config
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in network.state_dict().items()}
    again.load_state_dict(network.state_dict())
    x, condition = data(network), condition_of(network)
    assert torch.equal(again.eval()(x, condition)[0], network(x, condition)[0])


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        # reference/starflow.md 2.5: unconditional and conditional ImageNet 64, MNIST; buffers are no parameters
        (lambda: TARFlow(64, patch_size=2), 460.1),
        (lambda: TARFlow(64, patch_size=2, num_classes=1000), 466.3),
        (lambda: TARFlow(28, in_channels=1, hidden_size=128, num_blocks=4, depth=4, num_classes=10), 3.23),
        # 3.3: the text-to-image model
        (lambda: STARFlow(32, hidden_size=3072, depth=(2, 2, 2, 2, 2, 24), text_length=128, text_size=2048), 3858.0),
    ],
)
def test_published_sizes(make, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in make().parameters()) / 1e6
    assert count == pytest.approx(millions, rel=1e-3)
