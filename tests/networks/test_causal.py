"""Layers of a causal transformer: nobody looks ahead, and parts with a cache give what the whole gives."""

import pytest
import torch
import torch.nn.functional as F

from lightning_flows.networks import CausalLayer, KeyValueCache, LayerStyle, attention_backend
from lightning_flows.networks.causal import LayerCache, OffsetRMSNorm
from lightning_flows.networks.rotary import grid_positions, rotation
from tests.networks.tiny_flows import normal, redrawn

STYLES = {
    "plain": {},
    "rms": {"norm": "rms", "bias": False},
    "gated": {"gated_mlp": True},
    "norms": {"qk_norm": True, "post_norm": True},
    "shared keys": {"num_heads": 4, "num_kv_heads": 2},
    "one key": {"num_heads": 3, "num_kv_heads": 1, "qk_norm": True, "norm": "rms", "gated_mlp": True},
}
EVERY_STYLE = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
TOKENS = 8


def layers(n=1, **options):
    return [redrawn(CausalLayer(LayerStyle(16, 8, **options)), seed) for seed in range(n)]


def turned():
    return rotation(grid_positions(2, TOKENS // 2, 3.0), 8)


def run(stack, x, cache=None, start=0, turns=None, sharpness=None):
    here = None if turns is None else turns.between(start, start + x.shape[1])
    for i, layer in enumerate(stack):
        x = layer(x, here, None if cache is None else cache.layers[i], sharpness)
    return x


@EVERY_STYLE
@torch.no_grad()
def test_a_token_changes_nothing_before_it(style):
    stack, x = layers(2, **style), normal(2, TOKENS, 16)
    before = run(stack, x, turns=turned())
    for k in range(TOKENS):
        changed = x.clone()
        changed[:, k] *= -2  # (a shift of all channels is what a norm takes away)
        after = run(stack, changed, turns=turned())
        assert torch.equal(after[:, :k], before[:, :k])
        assert ((after[:, k:] - before[:, k:]).abs().amax((0, 2)) > 1e-5).all()


@EVERY_STYLE
@pytest.mark.parametrize("parts", [[1] * 8, [8], [3, 1, 4], [1, 6, 1]], ids=str)
@torch.no_grad()
def test_parts_of_any_length_are_the_whole(style, parts):
    stack, x, sharpness = layers(2, **style), normal(2, TOKENS, 16), torch.tensor([1.0, 0.6])
    whole = run(stack, x, turns=turned(), sharpness=sharpness)
    cache, found = KeyValueCache(2, TOKENS), []
    for part in x.split(parts, dim=1):
        found.append(run(stack, part, cache, cache.filled, turned(), sharpness))
    assert cache.filled == TOKENS
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_storage_is_allocated_once_and_a_rewound_cache_forgets():
    stack, x, cache = layers(2), normal(2, TOKENS, 16), KeyValueCache(2, TOKENS)
    run(stack, x[:, :3], cache)
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    expected = run(stack, x[:, 3:], cache)
    cache.rewind(3)
    run(stack, x[:, 3:5] + 5, cache)  # what is forgotten leaves no trace
    cache.rewind(3)
    assert torch.equal(run(stack, x[:, 3:], cache), expected)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places


def test_a_cache_keeps_the_dtype_and_the_place_of_what_comes_first():
    cache = LayerCache(5)
    k, v = normal(2, 3, 2, 4).bfloat16(), normal(2, 3, 2, 4, seed=2).bfloat16()
    keys, values = cache.append(k, v)
    assert (keys.dtype, tuple(cache.keys.shape), cache.filled) == (torch.bfloat16, (2, 3, 5, 4), 2)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@torch.no_grad()
def test_rows_of_a_cache_go_on_alone_and_come_back():
    stack, x, cache, whole = layers(2), normal(3, TOKENS, 16), KeyValueCache(2, TOKENS), KeyValueCache(2, TOKENS)
    expected = run(stack, x, whole)
    run(stack, x[:, :4], cache)
    index = torch.tensor([2, 0])
    part = cache.rows(index)
    torch.testing.assert_close(run(stack, x[index, 4:6], part), expected[index, 4:6], rtol=1e-5, atol=1e-5)
    run(stack, -x[:, 4:6], cache)  # another continuation in the rows that are not taken back
    cache.put(index, part, 4, 6)
    found = run(stack, x[:, 6:], cache)
    torch.testing.assert_close(found[index], expected[index, 6:], rtol=1e-5, atol=1e-5)
    assert (found[1] - expected[1, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_shared_keys_are_full_heads_with_the_same_keys():
    (shared,), (full,) = layers(num_heads=4, num_kv_heads=2), layers(num_heads=4)
    full.load_state_dict({**full.state_dict(), **{n: v for n, v in shared.state_dict().items() if ".qkv." not in n}})
    for ours, theirs in (
        (full.attention.qkv.weight, shared.attention.qkv.weight),
        (full.attention.qkv.bias, shared.attention.qkv.bias),
    ):
        q, k, v = theirs.split([32, 16, 16])
        k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
        ours.copy_(torch.cat([q, k, v]))
    x = normal(2, TOKENS, 16)
    torch.testing.assert_close(shared(x, turned()), full(x, turned()))


@torch.no_grad()
def test_sharpness_is_a_factor_on_the_logits_of_each_row():
    (layer,), (sharper,), x = layers(), layers(), normal(2, TOKENS, 16)
    sharper.attention.qkv.weight[:16] *= 3
    sharper.attention.qkv.bias[:16] *= 3
    found = layer(x, sharpness=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found[0], layer(x)[0])
    torch.testing.assert_close(found[1], sharper(x)[1])


@torch.no_grad()
def test_a_layer_by_hand():
    (layer,), x = layers(), normal(2, TOKENS, 16)
    attention, mlp = layer.attention, layer.mlp
    q, k, v = (
        part.unflatten(2, (2, 8)).transpose(1, 2)
        for part in attention.qkv(F.layer_norm(x, (16,), attention.norm.weight, attention.norm.bias)).chunk(3, 2)
    )
    logits = (q @ k.mT / 8**0.5).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    y = x + attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = y + mlp.main[2](F.gelu(mlp.main[0](F.layer_norm(y, (16,), mlp.norm.weight, mlp.norm.bias))))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", [STYLES["plain"], STYLES["one key"]], ids=["plain", "one key"])
@torch.no_grad()
def test_backends_agree(style):
    stack, x = layers(2, **style), normal(2, TOKENS, 16)
    found = {}
    for backend in ("auto", "flash", "math"):
        with attention_backend(backend):
            cache = KeyValueCache(2, TOKENS)
            found[backend] = [run(stack, x, turns=turned()), run(stack, x[:, :5], cache), run(stack, x[:, 5:], cache)]
    for backend in ("flash", "math"):
        torch.testing.assert_close(found[backend], found["auto"], rtol=1e-5, atol=1e-5)


def test_the_norm_keeps_its_gain_as_a_distance_from_one():
    norm, x = OffsetRMSNorm(4), normal(3, 4) * 2
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    redrawn(norm)
    torch.testing.assert_close(norm(x), expected * (1 + norm.weight))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm(x.double()).dtype == torch.float64


def test_sizes_of_a_style():
    style = LayerStyle(24, 8, num_kv_heads=1, mlp_ratio=1.5)
    assert (style.heads, style.kv_heads, style.mlp_size) == (3, 1, 36)
    assert LayerStyle(10, 8, num_heads=2).heads == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_size": 5}, "head_size must divide hidden_size=16, got 5"),
        ({"head_size": 0}, "head_size must .* got 0"),
        ({"head_size": 4, "norm": "batch"}, "norm must be one of .* got 'batch'"),
        ({"head_size": 4, "num_kv_heads": 3}, "num_kv_heads must divide the 4 heads, got 3"),
        ({"head_size": 4, "num_kv_heads": 0}, "num_kv_heads must .* got 0"),
        ({"head_size": 4, "num_heads": 0}, "num_heads must .* got 0"),
        ({"head_size": 4, "mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LayerStyle(16, **options)
