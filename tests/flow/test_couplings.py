"""Laws of the couplings: bijection, least cost, unchanged data, unbiased conditions."""

import itertools
import pickle
import warnings

import pytest
import torch

from lightning_flows.flow.condition import Condition, Tokens
from lightning_flows.flow.couplings import Independent, OptimalTransport


def batch(n, shape=(3,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randn(n, *shape, generator=generator) * 0.5 + 1


def permutation(paired, x0):
    """Which row of x0 each row of the paired noise is."""
    same = (paired.flatten(1)[:, None] == x0.flatten(1)[None]).all(-1)
    assert bool((same.sum(0) == 1).all()), "a sample was dropped or used twice"
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1)


def cost_of(x0, x1, order):
    return float((x1 - x0[order]).double().square().sum())


def test_independent_changes_nothing():
    x0, x1 = batch(5)
    condition = Condition(label=torch.arange(5))
    a, b, c = Independent()(x0, x1, condition)
    assert a is x0
    assert b is x1
    assert c is condition


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("seed", range(3))
def test_transport_equals_brute_force(n, seed):
    x0, x1 = batch(n, seed=seed)
    order = permutation(OptimalTransport()(x0, x1)[0], x0)
    best = min(cost_of(x0, x1, list(p)) for p in itertools.permutations(range(n)))
    assert cost_of(x0, x1, order) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (2, 3, 4, 4)])
def test_transport_uses_every_sample_once_and_is_never_dearer_than_other_pairings(shape):
    x0, x1 = batch(40, shape)
    order = permutation(OptimalTransport()(x0, x1)[0], x0)
    ours = cost_of(x0, x1, order)
    assert ours <= cost_of(x0, x1, torch.arange(40))
    generator = torch.Generator().manual_seed(1)
    assert all(ours <= cost_of(x0, x1, torch.randperm(40, generator=generator)) for _ in range(20))


def test_noise_is_permuted_and_data_and_condition_stay():
    x0, x1 = batch(20)
    condition = Condition(label=torch.arange(20) % 3)
    paired, data, same = OptimalTransport(1.0)(x0, x1, condition)
    assert data is x1
    assert same is condition
    assert not torch.equal(paired, x0)


def test_a_known_pairing_is_found():
    x1 = torch.arange(30.0)[:, None] * 4
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    x0 = (x1 + 0.5)[shuffle]
    assert torch.equal(OptimalTransport()(x0, x1)[0], x1 + 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_goes_through_and_the_cost_is_at_least_float32(dtype):
    x0, x1 = (x.to(dtype) for x in batch(16, (8,)))
    paired, data, _ = OptimalTransport()(x0, x1)
    assert paired.dtype == data.dtype == dtype
    exact = OptimalTransport()(x0.double(), x1.double())[0]
    assert torch.equal(paired.double(), exact)


def test_autocast_does_not_coarsen_the_cost():
    x0, x1 = batch(64, (16,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = OptimalTransport()(x0, x1)[0]
    assert torch.equal(inside, OptimalTransport()(x0, x1)[0])


def test_transport_is_deterministic_and_leaves_global_random_states_alone():
    x0, x1 = batch(32)
    state = torch.get_rng_state()
    first = OptimalTransport()(x0, x1)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, OptimalTransport()(x0, x1)[0])


def test_gradients_pass_through_the_pairing():
    x0, x1 = batch(8)
    x0.requires_grad_()
    paired = OptimalTransport()(x0, x1)[0]
    (gradient,) = torch.autograd.grad(paired.square().sum(), x0)
    torch.testing.assert_close(gradient, 2 * x0.detach())


def test_a_coupling_travels_to_a_worker():
    coupling = OptimalTransport(2.0)
    assert pickle.loads(pickle.dumps(coupling)) == coupling


@pytest.mark.parametrize("weight", [0.3, 2.0])
@pytest.mark.parametrize("stream", ["label", "vector", "spatial"])
def test_condition_enters_the_cost_as_stated(weight, stream):
    n = 6
    x0, x1 = batch(n, seed=5)
    generator = torch.Generator().manual_seed(2)
    values = {
        "label": torch.tensor([0, 1, 0, 2, 1, 0]),
        "vector": torch.randn(n, 4, generator=generator),
        "spatial": torch.randn(n, 1, 2, 2, generator=generator),
    }[stream]
    order = permutation(OptimalTransport(weight)(x0, x1, Condition(**{stream: values}))[0], x0)

    def total(p):
        moved = values[list(p)]
        penalty = (values != moved).sum() if stream == "label" else (values - moved).square().sum()
        return cost_of(x0, x1, list(p)) + weight * float(penalty)

    best = min(total(p) for p in itertools.permutations(range(n)))
    assert total(order.tolist()) == pytest.approx(best, rel=1e-5)


def test_large_weight_pairs_within_classes_so_noise_of_a_class_stays_as_drawn():
    label = torch.arange(60) % 3
    x0, x1 = batch(60)
    x1 = x1 + 3 * label[:, None]
    order = permutation(OptimalTransport(1e4)(x0, x1, Condition(label=label))[0], x0)
    assert torch.equal(label[order], label)
    with pytest.warns(UserWarning, match="condition"):
        biased = permutation(OptimalTransport()(x0, x1, Condition(label=label))[0], x0)
    assert not torch.equal(label[biased], label)


def test_rows_without_label_are_one_class_of_their_own():
    n = 12
    label = torch.arange(n) % 2
    present = torch.arange(n) < 6
    x0, x1 = batch(n)
    condition = Condition(label=label, present={"label": present})
    order = permutation(OptimalTransport(1e4)(x0, x1, condition)[0], x0)
    assert torch.equal(present[order], present)
    assert torch.equal(label[order][present], label[present])


def test_plain_transport_under_a_condition_warns_once():
    x0, x1 = batch(4)
    condition, coupling = Condition(label=torch.arange(4)), OptimalTransport()
    with pytest.warns(UserWarning, match="condition_weight"):
        coupling(x0, x1, condition)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coupling(x0, x1, condition)
        OptimalTransport()(x0, x1, Condition())
        OptimalTransport()(x0, x1)
        OptimalTransport(1.0)(x0, x1, condition)
    assert coupling == OptimalTransport()


def test_errors_name_what_is_wrong():
    x0, x1 = batch(4)
    with pytest.raises(ValueError, match="condition_weight"):
        OptimalTransport(-1.0)
    with pytest.raises(ValueError, match="x0 and x1"):
        OptimalTransport()(x0[:3], x1)
    with pytest.raises(ValueError, match="finite"):
        OptimalTransport()(x0, x1 * float("nan"))
    tokens = Tokens(torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens"):
        OptimalTransport(1.0)(x0, x1, Condition(tokens=tokens))
