"""The automatic inverse: segments that grow, what it does where they do not pay, and what iterations must survive."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_flows.networks import (
    Automatic,
    FlowBlock,
    Jacobi,
    LayerStyle,
    PerBlock,
    Sequential,
    calibrate,
    shard_blocks,
)
from lightning_flows.networks import pass_cost as costs
from lightning_flows.networks.block_run import BlockRun
from lightning_flows.networks.pass_cost import Cost
from tests.networks.tiny_flows import condition_of, inverted, normal, redrawn, starflow

TOKENS = 24


def long_block(std=0.15):
    options = {"num_tokens": TOKENS, "scale": "softplus", "soft_clip": 4.0}
    return redrawn(FlowBlock(3, 2, LayerStyle(16, 8), **options), std=std).double()


def noise(n=2):
    return normal(n, TOKENS, 3, seed=5, dtype=torch.float64)


class Passes:
    """(rows, tokens) of every pass over a block."""

    def __init__(self, block):
        self.seen = []
        block.proj_in.register_forward_hook(lambda part, given, out: self.seen.append(tuple(out.shape[:2])))


@pytest.fixture
def overhead(monkeypatch):
    """Sets the operations in the overhead of a pass; layers have none."""
    return lambda value: monkeypatch.setattr(costs, "OVERHEAD", {"cpu": (value, 0.0), "cuda": (0.0, 0.0)})


def work_of(block, n=2):
    return Cost.of(BlockRun(block, noise(n), block.context())).work


# ---------------------------------------------------------------------- what passes cost


@torch.no_grad()
def test_a_pass_costs_its_overhead_and_its_tokens(overhead):
    block = long_block()
    overhead(1000.0)
    cost = Cost.of(BlockRun(block, noise(5), block.context()))
    assert cost.fixed == 1000.0
    assert cost.work == 2 * 5 * sum(p.numel() for p in block.attn_blocks.parameters())
    assert Cost(10.0, 2.0).passes(3, 4) == 54.0


@pytest.mark.parametrize("cost", [Cost(0.0, 1.0), Cost(10.0, 1.0), Cost(1000.0, 1.0), Cost(5.0, 7.0)])
def test_no_more_passes_are_worth_it_than_cost_the_tokens_one_by_one(cost):
    for tokens in (1, 2, 16, 100):
        worth = cost.worth(tokens)
        assert worth == 1 or cost.passes(worth, tokens) <= cost.passes(tokens, 1)
        assert cost.passes(worth + 1, tokens) > cost.passes(tokens, 1)


@pytest.mark.parametrize("cost", [Cost(10.0, 1.0), Cost(1000.0, 1.0), Cost(50.0, 7.0)])
def test_a_first_segment_that_does_not_settle_costs_at_most_a_third_more(cost):
    tokens = cost.cheap()
    worth = cost.worth(tokens)
    spent = sum(cost.passes(1, tokens - k) for k in range(worth)) + cost.passes(tokens - worth, 1)
    assert spent <= 1.34 * cost.passes(tokens, 1)


# ---------------------------------------------------------------------- segments


@torch.no_grad()
def test_each_pass_leaves_out_one_more_input_whose_keys_are_exact():
    block = long_block(std=0.5)
    seen = Passes(block)
    found, log_det, run = inverted(block, noise(), Jacobi(segment=12, threshold=0.0))
    lengths = [tokens for _, tokens in seen.seen]
    assert lengths == [*range(12, 0, -1), *range(11, 0, -1)]  # 23 tokens are to be found
    assert run.passes == 23
    exact, expected, _ = inverted(block, noise(), Sequential())
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(log_det, expected)


@torch.no_grad()
def test_a_dear_pass_takes_the_whole_block_and_a_cheap_one_single_tokens(overhead):
    block = long_block()
    work = work_of(block)
    for value, expected in ((1e4 * work, TOKENS - 1), (0.0, 1)):
        overhead(value)
        seen = Passes(block)
        inverted(block, noise(), Automatic(segment=4))
        assert seen.seen[0][1] == expected


@torch.no_grad()
def test_segments_double_while_that_is_cheaper(overhead):
    block = long_block()
    overhead(12 * work_of(block))
    seen = Passes(block)
    inverted(block, noise(), Automatic(segment=3, threshold=1e-5, iterations=1.0))
    lengths = [tokens for _, tokens in seen.seen]
    first = lengths.index(15)  # all others
    assert 3 <= first <= 5
    assert lengths[:first] == list(range(8, 8 - first, -1))  # 0.7 of the overhead of twelve tokens


@torch.no_grad()
def test_where_a_segment_does_not_settle_while_it_pays_the_rest_goes_token_by_token(overhead):
    block = long_block(std=0.8)
    overhead(2 * work_of(block))
    seen, news = Passes(block), []
    run = BlockRun(block, noise(), block.context())
    Automatic(segment=8, threshold=0.0, iterations=1.0)(run, news.append)
    exact, expected, _ = inverted(block, noise(), Sequential())
    worth = Cost.of(run).worth(8)
    assert [tokens for _, tokens in seen.seen[:worth]] == list(range(8, 8 - worth, -1))
    assert {tokens for _, tokens in seen.seen[worth : run.passes]} == {1}
    assert run.passes == TOKENS - 1
    assert news == [worth, *range(worth + 1, TOKENS)]
    torch.testing.assert_close(run.result()[0], exact)
    torch.testing.assert_close(run.result()[1], expected)


@pytest.mark.parametrize("threshold", [1e-5, 1e-8])
@torch.no_grad()
def test_the_samples_are_those_of_token_by_token_for_the_eye(threshold, overhead):
    network = starflow(num_classes=3, input_size=(8, 12))
    condition, z = condition_of(network, 4), normal(4, *network.shape, seed=3)
    exact = network.draw(z, condition, method=Sequential())
    overhead(1e9)
    found = network.draw(z, condition, method=Automatic(segment=2, threshold=threshold))
    assert found.passes < exact.passes
    assert (found.x - exact.x).square().mean().sqrt() < 10 * threshold**0.5 * exact.x.square().mean().sqrt()


def test_calibration_weighs_passes_by_their_overhead_on_this_device(overhead):
    network = starflow(num_classes=3, input_size=(8, 12))
    condition, x = condition_of(network, 4), normal(4, *network.shape, seed=3)
    overhead(0.0)
    assert calibrate(network, x, condition, threshold=1e-6).methods == [Sequential()] * 3
    overhead(1e12)
    assert all(isinstance(method, Jacobi) for method in calibrate(network, x, condition, threshold=1e-6).methods)


# ---------------------------------------------------------------------- guesses that overflow


@pytest.mark.parametrize("guess", ["noise", "zeros"])
@torch.no_grad()
def test_a_guess_that_overflows_is_made_afresh(guess):
    block = redrawn(FlowBlock(1, 1, LayerStyle(8, 8), num_tokens=8)).float()
    for parameter in block.attn_blocks.parameters():
        parameter.zero_()
    block.proj_in.weight.fill_(1.0)  # h = x + position, log sigma = 30 mean(h) of the last token
    block.proj_in.bias.zero_()
    block.pos_embed.zero_()
    block.proj_out.weight.zero_()
    block.proj_out.weight[0].fill_(30 / 8)
    block.proj_out.bias.zero_()
    z = torch.full((2, 8, 1), 4.0)
    z[1] = 0.0
    z[:, 1] = -0.1  # the first guess of token 2 is e^120; its true value is e^-3 4
    z[0, 0] = 0.0
    z[0, 2:] = torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0, -4.0])[:, None]
    exact, log_det, _ = inverted(block, z, Sequential())
    found, other, _ = inverted(block, z, Jacobi(segment=8, threshold=1e-12, guess=guess))
    finite = exact.isfinite().all(dim=(1, 2))
    assert finite.tolist() == [False, True] or finite.all()
    torch.testing.assert_close(found[finite], exact[finite])
    torch.testing.assert_close(other[finite], log_det[finite])


# ---------------------------------------------------------------------- parameters over devices


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
def test_parameters_that_are_spread_over_devices_mean_token_by_token(mesh, overhead):
    network = starflow(num_classes=3, input_size=(8, 12))
    condition, z = condition_of(network, 2), normal(2, *network.shape, seed=3)
    exact = network.draw(z, condition, method=Sequential())
    overhead(1e12)
    assert network.draw(z, condition).passes < exact.passes
    shard_blocks(network, mesh)
    for method in (None, PerBlock([Automatic()] * 3)):
        found = network.draw(z, condition, method=method)
        assert found.passes == exact.passes
        torch.testing.assert_close(found.x, exact.x)
