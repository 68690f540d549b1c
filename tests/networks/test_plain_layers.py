"""Layers as bare tensors: the numbers of the modules, and only where the modules are what they were built as."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_flows.flow import GaussianProduct, LogLinear
from lightning_flows.networks import (
    Jacobi,
    Sequential,
    add_lora,
    block_run,
    checkpoint_blocks,
    compile_blocks,
    compile_network,
    merge_adapters,
    restore_blocks,
)
from lightning_flows.networks.causal import LayerCache
from lightning_flows.networks.layers import attention
from lightning_flows.networks.plain_layers import plain_layers
from tests.networks.tiny_flows import FLOWS, condition_of, normal, starflow, tarflow

CPU = torch.device("cpu")
GIVEN_UP = {"all norms", "gated, no bias, halves", "gemma"}  # styles that stay modules
METHODS = {"sequential": Sequential(), "jacobi": Jacobi(segment=4, threshold=0.0)}


def plain_of(network):
    with torch.no_grad():
        return [plain_layers(block.attn_blocks, CPU) for block in network.stack if len(block.attn_blocks)]


def drawn(network, method, guidance=None, n=3):
    condition, z = condition_of(network, n), normal(n, *network.shape, seed=4)
    with torch.no_grad():
        return network.draw(z, condition, guidance=guidance, method=method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", FLOWS)
def test_samples_are_those_of_the_modules(name, method, monkeypatch):
    network = FLOWS[name]()
    assert all((plain is None) == (name in GIVEN_UP) for plain in plain_of(network))
    rule = LogLinear(1.5, temperature=0.8) if not network.streams else GaussianProduct(1.5)
    found = [drawn(network, method, guidance) for guidance in (None, rule)]
    monkeypatch.setattr(block_run, "plain_layers", lambda *_: None)
    for own, guidance in zip(found, (None, rule), strict=True):
        expected = drawn(network, method, guidance)
        torch.testing.assert_close(own.x, expected.x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.log_det, expected.log_det, rtol=1e-4, atol=1e-4)
        assert own.passes == expected.passes


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [lambda: tarflow(num_classes=3), lambda: starflow(num_classes=3)])
def test_in_16_bits_samples_are_those_of_float32_to_their_rounding(make, autocast, monkeypatch):
    network = make()
    exact = drawn(network, Sequential()).x
    network = network if autocast else network.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = drawn(network, Sequential()).x
        monkeypatch.setattr(block_run, "plain_layers", lambda *_: None)
        modules = drawn(network, Sequential()).x
    assert found.dtype == torch.float32
    size = exact.square().mean().sqrt()
    assert 1e-5 < (found - exact).square().mean().sqrt() / size < 0.1
    assert (found - modules).square().mean().sqrt() / size < 0.1


def test_under_autocast_weights_are_cast_once(monkeypatch):
    network, seen = tarflow(num_classes=3), []
    kept = LayerCache.extend
    monkeypatch.setattr(LayerCache, "extend", lambda self, pairs: seen.append(pairs.dtype) or kept(self, pairs))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = plain_layers(network.stack[0].attn_blocks, CPU)
        assert {product.weight.dtype for layer in plain.layers for product in (layer.qkv, layer.down)} == {
            torch.bfloat16
        }
        drawn(network, Sequential())
    assert set(seen) == {torch.float32}  # keys and values, on a CPU


# ---------------------------------------------------------------------- where modules have to be called


def hooked(network):
    network.stack[0].attn_blocks[0].mlp.register_forward_hook(lambda part, given, out: out)


def other_activation(network):
    network.stack[0].attn_blocks[0].mlp.main[1] = nn.ReLU()


@pytest.mark.parametrize(
    "change",
    [hooked, other_activation, checkpoint_blocks, compile_blocks, lambda n: add_lora(n, rank=2)],
    ids=["hook", "activation", "checkpoint", "compile", "adapter"],
)
def test_what_was_changed_is_called_as_modules(change):
    network = tarflow(num_blocks=1)
    assert plain_of(network)[0] is not None
    change(network)
    assert plain_of(network) == [None]


def test_merged_and_restored_layers_are_plain_again():
    network = tarflow(num_blocks=1)
    add_lora(network, rank=2)
    merge_adapters(network)
    checkpoint_blocks(network)
    restore_blocks(network)
    assert plain_of(network)[0] is not None


def test_where_gradients_are_recorded_nothing_is_overwritten():
    network = tarflow(num_blocks=1)
    assert plain_layers(network.stack[0].attn_blocks, CPU) is None
    with torch.no_grad():
        assert plain_layers(network.stack[0].attn_blocks, CPU) is not None


def test_the_weights_of_now_are_used():
    network = tarflow(num_classes=3)
    before = drawn(network, Sequential()).x
    with torch.no_grad():
        network.stack[0].attn_blocks[0].mlp.main[2].weight.mul_(-3)
    assert (drawn(network, Sequential()).x - before).abs().max() > 1e-3


# ---------------------------------------------------------------------- compiled


@pytest.mark.parametrize("make", [lambda: tarflow(patch_size=1, input_size=(4, 5), hidden_size=4, num_classes=3)])
def test_compiled_layers_are_not_compiled_again_for_every_token(make):
    network = make()
    expected = drawn(network, Sequential())
    counter = CompileCounter()
    compile_blocks(network, backend=counter)
    found = drawn(network, Sequential())
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 4  # the first token, the second one, any further one
    before = counter.frame_count
    drawn(network, Sequential())
    assert counter.frame_count == before


def test_a_network_compiled_as_a_whole_does_not_unroll_its_loop_over_tokens():
    network = tarflow(patch_size=1, input_size=(4, 5), hidden_size=4, num_classes=3)
    expected, counter = drawn(network, Sequential()), CompileCounter()
    compile_network(network, backend=counter)
    found = drawn(network, Sequential())
    assert torch.equal(found.x, expected.x)
    assert counter.op_count == 0
    with torch.no_grad():
        network(found.x, condition_of(network, 3))
    assert counter.frame_count == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_query_is_the_last_of_many(groups):
    q, k, v = normal(2, 4, 5, 8), normal(2, groups, 5, 8, seed=2), normal(2, groups, 5, 8, seed=3)
    whole = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), whole[:, :, -1:])
    compiled = torch.compile(attention, backend=CompileCounter())
    torch.testing.assert_close(compiled(q[:, :, -1:], k, v), whole[:, :, -1:])


def test_attention_in_16_bits_is_done_in_float32_on_a_cpu_where_it_is_short():
    q, k, v = (normal(2, 4, 40, 8, seed=seed).bfloat16() for seed in (1, 2, 3))
    found = attention(q, k, v, causal=True)
    assert found.dtype == torch.bfloat16
    exact = attention(q.float(), k.float(), v.float(), causal=True)
    assert torch.equal(found, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, causal=True), found)
