import math

import pytest
import torch
import torch.nn.functional as F

from lightning_flows.networks import (
    Attention,
    RMSNorm,
    TimestepEmbedder,
    attention,
    attention_backend,
    modulate,
    position_table,
    sinusoid,
)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_attention_is_the_softmax_average_of_the_values(backend, masked):
    q, k, v = (draws(2, 3, 5, 4, seed=i) for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(4)
    if masked:
        logits = logits.masked_fill(~mask, -math.inf)
    expected = torch.einsum("bhnm,bhmd->bhnd", logits.softmax(-1), v)
    with attention_backend(backend):
        torch.testing.assert_close(attention(q, k, v, mask), expected)


def test_flash_backend_agrees_with_math():
    q, k, v = (draws(1, 2, 6, 8, seed=i) for i in range(3))
    with attention_backend("flash"):
        fused = attention(q, k, v)
    with attention_backend("math"):
        torch.testing.assert_close(fused, attention(q, k, v))


def test_attention_backend_is_restored_after_an_error():
    q = draws(1, 1, 2, 4)

    def tangent():
        return torch.func.jvp(lambda x: attention(x, x, x), (q,), (torch.ones_like(q),))[1]

    with pytest.raises(KeyError), attention_backend("math"):
        raise KeyError
    with attention_backend("math"), attention_backend("math"):
        assert tangent().isfinite().all()
    with pytest.raises(NotImplementedError):  # the fused kernel of "auto" has no forward-mode derivative
        tangent()


def test_attention_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"auto.*flash.*math.*'fast'"), attention_backend("fast"):
        raise AssertionError


def test_math_attention_has_second_derivatives():
    q, k, v = (draws(1, 1, 3, 2, seed=i).double().requires_grad_() for i in range(3))
    with attention_backend("math"):
        assert torch.autograd.gradgradcheck(attention, (q, k, v))


def test_sinusoid_has_cosines_first_and_scales_the_time():
    t = torch.tensor([0.0, 0.25])
    embedding = sinusoid(t, 8, max_period=100.0, time_scale=10.0)
    angles = 10 * t[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(embedding, torch.cat([angles.cos(), angles.sin()], 1))


def test_sinusoid_tells_close_times_apart_under_autocast():
    embedder = TimestepEmbedder(8, frequency_size=16)
    t = torch.tensor([0.5, 0.5005])  # the same number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        near, far = embedder(t)
    assert near.dtype == torch.float32
    assert not torch.equal(near, far)
    torch.testing.assert_close(torch.stack([near, far]), embedder(t))


@pytest.mark.parametrize("size", [0, 7])
def test_time_embedding_refuses_an_odd_size(size):
    with pytest.raises(ValueError, match=f"frequency_size.*{size}"):
        TimestepEmbedder(8, frequency_size=size)


def test_position_table_is_column_then_row_each_sine_then_cosine():
    table = position_table(2, 3, 8).reshape(2, 3, 8)
    frequencies = 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
    for row in range(2):
        for column in range(3):
            x, y = column * frequencies, row * frequencies
            expected = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]).float()
            torch.testing.assert_close(table[row, column], expected)


def test_position_table_gives_every_place_its_own_row():
    assert len(position_table(5, 7, 16).unique(dim=0)) == 35


def test_position_table_refuses_a_size_that_four_does_not_divide():
    with pytest.raises(ValueError, match=r"divisible by 4.*10"):
        position_table(2, 2, 10)


def test_modulate_by_zero_changes_nothing():
    x = draws(2, 3, 4)
    zero = torch.zeros(2, 4)
    torch.testing.assert_close(modulate(x, zero, zero), x)
    torch.testing.assert_close(modulate(x, zero + 2, zero + 1), 2 * x + 2)


def test_rms_norm_agrees_with_torch_in_16_bits_too():
    x = draws(2, 3, 8)
    norm = RMSNorm(8)
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys():
    layer = Attention(8, 2, qk_norm=True)
    x = draws(1, 4, 8)
    with torch.no_grad():
        layer.qkv.weight.copy_(draws(24, 8))  # queries and keys far above the epsilon of the norm
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[:16] *= 7
        layer.qkv.bias[:16] *= 7
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_attention_mask_hides_tokens():
    layer = Attention(8, 2)
    x = draws(1, 4, 8)
    mask = torch.tensor([[True, True, False, False]])
    changed = torch.cat([x[:, :2], x[:, 2:] + 1], 1)
    torch.testing.assert_close(layer(x, mask)[:, :2], layer(changed, mask)[:, :2])


@pytest.mark.parametrize("heads", [0, 3])
def test_attention_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"num_heads.*8.*{heads}"):
        Attention(8, heads)
