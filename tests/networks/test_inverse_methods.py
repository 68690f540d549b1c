"""How blocks are inverted: Jacobi finds what Sequential finds, sample by sample, and the passes are counted."""

import itertools
from dataclasses import replace

import pytest
import torch

from lightning_flows.flow import GaussianProduct, LogLinear
from lightning_flows.networks import Automatic, FlowBlock, Jacobi, LayerStyle, PerBlock, Sequential
from lightning_flows.networks.block_run import BlockRun
from tests.networks.tiny_flows import (
    FLOWS,
    block,
    condition_of,
    context_of,
    inverted,
    normal,
    redrawn,
    starflow,
    turns_of,
)

TIGHT = Jacobi(segment=4, threshold=0.0)
FLOWS = {
    name: FLOWS[name] for name in ("class vectors", "class token", "text in all blocks", "gemma", "identity block")
}
EVERY_FLOW = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)


def setting(n=2, **options):
    """A block of 6 tokens in float64 with its context, its turns and a z."""
    made = block(text=True, start_token=True, scale="softplus", soft_clip=4.0, layers=2, **options)
    return made, normal(n, 6, 3, seed=5, dtype=torch.float64), context_of(made, n), turns_of(made)


# ---------------------------------------------------------------------- one answer

METHODS = {
    "segments of 1": Jacobi(segment=1, threshold=0.0),
    "segments of 4": TIGHT,
    "one segment": Jacobi(segment=99, threshold=0.0),
    "from zeros": Jacobi(segment=4, threshold=0.0, guess="zeros"),
    "growing": Jacobi(segment=1, threshold=0.0, growth=3, grow_after=2),
    "fresh keys": Jacobi(segment=2, threshold=1e-20, refresh=True),
    "loose bound": Jacobi(segment=4, threshold=0.0, clamp=1e6),
    "official": Jacobi(segment=2, threshold=1e-25, faithful=True),
    "official, fresh keys": Jacobi(segment=4, threshold=1e-25, faithful=True, refresh=True),
    "automatic": Automatic(segment=4, threshold=1e-25, iterations=4),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@EVERY_FLOW
@torch.no_grad()
def test_converged_iterations_are_sequential(make, method):
    network = make()
    condition, z = condition_of(network, 3), normal(3, *network.shape, seed=4)
    rule = LogLinear(1.5, temperature=0.8) if condition is None else GaussianProduct(1.5)
    for guidance in (None, rule):
        exact = network.draw(z, condition, guidance=guidance, method=Sequential())
        found = network.draw(z, condition, guidance=guidance, method=method)
        torch.testing.assert_close(found.x, exact.x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.log_det, exact.log_det, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_i_of_a_segment_is_exact_after_i_passes():
    made, z, context, turns = setting()
    exact, _, _ = inverted(made, z, Sequential(), context, turns)
    for passes in range(1, 7):
        found, _, run = inverted(made, z, Jacobi(segment=6, threshold=0.0, max_iterations=passes), context, turns)
        assert run.passes == passes
        torch.testing.assert_close(found[:, :passes], exact[:, :passes])
        if passes < 4:
            assert (found[:, passes] - exact[:, passes]).abs().max() > 1e-6
    done, _, run = inverted(made, z, Jacobi(segment=6, threshold=0.0), context, turns)
    assert run.passes == 6  # more cannot change it
    torch.testing.assert_close(done, exact)


@pytest.mark.parametrize(
    "method", [Jacobi(6, threshold=1e-2), Jacobi(6, 1e-4, refresh=True), Jacobi(6, 1e-3, faithful=True)]
)
@torch.no_grad()
def test_the_threshold_bounds_the_error(method):
    made, z, context, turns = setting()
    exact, log_det, _ = inverted(made, z, Sequential(), context, turns)
    found, rough_log_det, quick = inverted(made, z, method, context, turns)
    error = ((found - exact).square().mean() / exact.square().mean()).item()
    assert 0 < error < method.threshold
    torch.testing.assert_close(rough_log_det, log_det, rtol=0.05, atol=0.1)
    exacter, _, slow = inverted(made, z, replace(method, threshold=1e-12), context, turns)
    assert ((exacter - exact).square().mean() / exact.square().mean()).item() < 1e-3 * error
    assert quick.passes < slow.passes


# ---------------------------------------------------------------------- each sample by itself


class Rows:
    """Numbers of rows that a block was asked for."""

    def __init__(self, made):
        self.seen = []
        made.proj_in.register_forward_hook(lambda part, given, out: self.seen.append(len(out)))


@pytest.mark.parametrize("method", [Sequential(), Jacobi(6, 1e-4), Jacobi(6, 1e-4, refresh=True), Jacobi(3, 1e-3)])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_a_sample_does_not_depend_on_the_samples_around_it(method, guided):
    made, z, context, turns = setting(8)
    prefix = context.prefix
    guidance, asked = GaussianProduct(2.0) if guided else None, Rows(made)

    def solved(index):
        here = torch.cat([prefix[index], -prefix[index]]) if guided else prefix[index]
        return inverted(made, z[index], method, type(context)(prefix=here), turns, guidance)[:2]

    whole = solved(torch.arange(8))
    if method.__class__ is Jacobi and method.segment == 6:  # some settled before others
        assert min(asked.seen) < max(asked.seen)
    for index in (*torch.arange(8).split(1), torch.tensor([6, 1, 3])):
        for found, expected in zip(solved(index), whole, strict=True):
            torch.testing.assert_close(found, expected[index], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_samples_that_are_cut_off_get_their_last_pass():
    """Four samples settle in three passes; the fourth and last pass is that of the others, which go on moving."""
    made, z, context, turns = setting(8)
    z[::2] *= 10
    method, asked = Jacobi(segment=6, threshold=1e-4, max_iterations=4), Rows(made)
    whole, log_det, _ = inverted(made, z, method, context, turns)
    assert asked.seen == [8, 8, 8, 4]
    for i in range(8):
        alone, own_log_det, _ = inverted(made, z[[i]], method, type(context)(prefix=context.prefix[[i]]), turns)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own_log_det[0], log_det[i], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_has_settled_costs_nothing_more_and_the_official_way_waits_for_all():
    made, z, context, turns = setting(8)
    asked = Rows(made)
    _, _, run = inverted(made, z, Jacobi(segment=6, threshold=1e-4), context, turns)
    assert asked.seen == [8, 8, 8, 2]
    assert run.passes == 4
    asked.seen.clear()
    _, _, run = inverted(made, z, Jacobi(segment=6, threshold=1e-28, faithful=True), context, turns)
    assert asked.seen == [8] * 7  # the last of them tells that nothing changes any more


# ---------------------------------------------------------------------- segments, starts, bounds


def test_segments_grow_where_they_are_told_to():
    assert list(Jacobi(4).segments(10)) == [(0, 4), (4, 8), (8, 10)]
    assert list(Jacobi(2, growth=3, grow_after=4).segments(13)) == [(0, 2), (2, 4), (4, 10), (10, 13)]
    assert list(Jacobi(16).segments(5)) == [(0, 5)]
    assert list(Jacobi(2, growth=3).segments(5)) == [(0, 2), (2, 4), (4, 5)]


@torch.no_grad()
def test_a_first_guess_is_the_noise_or_zero():
    made, z, context, turns = setting()
    for guess in ("noise", "zeros"):
        seen = []
        handle = made.proj_in.register_forward_hook(lambda part, given, out, seen=seen: seen.append(given[0].clone()))
        inverted(made, z, Jacobi(segment=6, threshold=0.0, max_iterations=1, guess=guess), context, turns)
        handle.remove()
        start = made.sos_embed.expand(2, 1, 3)
        expected = z[:, :5] if guess == "noise" else torch.zeros_like(z[:, :5])
        assert torch.equal(seen[0], torch.cat([start, expected], dim=1))


@torch.no_grad()
def test_guesses_stay_within_the_bound():
    made, z, context, turns = setting()
    found, _, _ = inverted(made, 10 * z, Jacobi(segment=6, threshold=0.0, clamp=3.0), context, turns)
    assert found.abs().max() == 3.0
    free, _, _ = inverted(made, 10 * z, TIGHT, context, turns)
    assert free.abs().max() > 3.0


@torch.no_grad()
def test_later_segments_see_the_keys_of_the_last_guess_only_after_a_refresh():
    made, z, context, turns = setting()
    errors = []
    exact, _, _ = inverted(made, z, Sequential(), context, turns)
    for refresh in (False, True):
        method = Jacobi(segment=3, threshold=0.0, max_iterations=3, refresh=refresh)
        found, _, run = inverted(made, z, method, context, turns)
        cache = inverted_cache(made, z, found, context, turns)
        kept = run.cache.layers[0].keys[:, :, : run.prefix + 3]
        errors.append((kept - cache[:, :, : run.prefix + 3]).abs().max().item())
        assert run.passes == (8 if refresh else 6)
        torch.testing.assert_close(found, exact)
    assert errors[1] < 1e-12


def inverted_cache(made, z, x, context, turns):
    """Keys of the first layer for the tokens x as they are."""
    run = BlockRun(made, z, context, turns)
    run.settle(0, x, torch.zeros(len(x), 6))
    run.evaluate(0, 6)
    return run.cache.layers[0].keys


# ---------------------------------------------------------------------- memory, news, counts


@pytest.mark.parametrize("method", [Sequential(), Jacobi(segment=2, threshold=0.0, faithful=True)])
@torch.no_grad()
def test_keys_and_values_have_one_storage_for_a_whole_block(method):
    made, z, context, turns = setting()
    places = set()

    def note(part, given, out):
        for layer in runs[0].cache.layers:
            places.add(layer.keys.data_ptr())
            places.add(layer.values.data_ptr())

    runs = [BlockRun(made, z, context, turns)]
    made.proj_out.register_forward_hook(note)
    method(runs[0], lambda settled: None)
    assert len(places) == 4  # keys and values of two layers
    assert all(layer.keys.shape[2] == 2 + 6 for layer in runs[0].cache.layers)  # the prefix and all tokens


@pytest.mark.parametrize("method", [Sequential(), Jacobi(segment=4), PerBlock([Jacobi(2), Sequential(), Sequential()])])
@torch.no_grad()
def test_news_come_in_order_and_end_with_the_tokens(method):
    network, news = starflow(num_classes=3, depth=(1, 0, 1)), []
    condition, z = condition_of(network), normal(2, *network.shape)
    found = network.draw(z, condition, method=method, watch=news.append)
    assert [part.block for part in news if part.x is not None] == [2, 1, 0]
    assert torch.equal(news[-1].x, network.patchify(found.x))
    for b, group in itertools.groupby(news, key=lambda part: part.block):
        counts = [part.settled for part in group]
        assert counts == sorted(counts)
        assert counts[-1] == 6
        assert (len(counts) == 1) == (b == 1)
    assert all(part.tokens == 6 for part in news)


@torch.no_grad()
def test_each_block_has_its_own_method():
    network = starflow(num_classes=3)
    condition, z = condition_of(network), normal(2, *network.shape)
    methods = [Sequential(), Jacobi(segment=6, threshold=0.0), Jacobi(segment=6, threshold=0.0, max_iterations=1)]
    found = network.draw(z, condition, method=PerBlock(methods))
    assert found.passes == 6 + 6 + 1
    assert methods[0].of_block(2) is methods[0]
    with pytest.raises(ValueError, match="methods has 2 entries, but the network has a block 2"):
        network.draw(z, condition, method=PerBlock(methods[:2]))
    with pytest.raises(ValueError, match="none for a block alone"):
        inverted(*setting()[:2], PerBlock(methods))


def test_the_automatic_method_weighs_fixed_costs_against_arithmetic():
    made, z, context, turns = setting(1)
    few = Automatic(segment=6, iterations=2)
    assert few.choose(BlockRun(made, z, context, turns)) == Jacobi(segment=6, threshold=1e-5)
    assert Automatic(segment=6, iterations=7).choose(BlockRun(made, z, context, turns)) == Sequential()
    wide = redrawn(FlowBlock(3, 1, LayerStyle(400, 20)))
    assert few.choose(BlockRun(wide, normal(500, 6, 3), wide.context())) == Sequential()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jacobi(segment=0), "segment must be at least 1, got 0"),
        (lambda: Jacobi(max_iterations=0), "max_iterations must be at least 1, got 0"),
        (lambda: Jacobi(growth=0), "growth must be at least 1, got 0"),
        (lambda: Jacobi(threshold=-1.0), "threshold must not be negative, got -1.0"),
        (lambda: Jacobi(threshold=float("nan")), "threshold must not be negative, got nan"),
        (lambda: Jacobi(guess="ones"), "guess must be one of .* got 'ones'"),
        (lambda: Jacobi(clamp=0.0), "clamp must be positive or None, got 0.0"),
        (lambda: Automatic(segment=0), "segment must be at least 1, got 0"),
        (lambda: PerBlock(), "methods must have one for each block of the network, got none"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
