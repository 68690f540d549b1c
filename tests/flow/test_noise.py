"""Laws of keyed randomness."""

import pytest
import torch

from lightning_flows.flow.noise import SampleNoise, StepNoise, key, seeds_from


def normal(noise, purpose, n, shape=(2, 3)):
    return noise.normal(purpose, torch.empty(n, *shape))


def test_a_row_depends_on_its_own_seed_not_on_order_or_size_of_the_batch():
    seeds = [7, 11, 13, 17]
    whole = normal(SampleNoise(seeds), "source", 4)
    order = [2, 0, 3, 1]
    assert torch.equal(normal(SampleNoise([seeds[i] for i in order]), "source", 4), whole[order])
    parts = [normal(SampleNoise(part), "source", 2) for part in (seeds[:2], seeds[2:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normal(SampleNoise(torch.tensor(seeds)), "source", 4), whole)


def test_draws_of_different_purposes_differ_and_do_not_depend_on_what_was_drawn_before():
    noise = SampleNoise([1, 2])
    first, second = normal(noise, 0, 2), normal(noise, 1, 2)
    assert not torch.equal(first, second)
    assert torch.equal(normal(SampleNoise([1, 2]), 1, 2), second)
    assert torch.equal(normal(noise, 0, 2), first)


def test_draws_are_made_in_float32_and_then_cast():
    noise, like = SampleNoise([1, 2]), torch.empty(2, 5)
    exact = noise.normal("source", like)
    assert torch.equal(noise.normal("source", like.double()), exact.double())
    assert torch.equal(noise.normal("source", like.bfloat16()), exact.bfloat16())


def test_an_empty_batch_and_a_wrong_number_of_seeds():
    assert normal(SampleNoise([]), "source", 0).shape == (0, 2, 3)
    with pytest.raises(ValueError, match="seeds"):
        normal(SampleNoise([1, 2]), "source", 3)


@pytest.mark.parametrize(
    "other", [StepNoise(1, 0, 0), StepNoise(0, 1, 0), StepNoise(0, 0, 1)], ids=["seed", "step", "rank"]
)
def test_step_noise_differs_by_seed_step_and_rank(other):
    base = StepNoise(0, 0, 0)
    assert not torch.equal(normal(base, "source", 3), normal(other, "source", 3))
    assert not torch.equal(base.uniform("u", 3), other.uniform("u", 3))


def test_step_noise_differs_by_purpose_and_repeats_by_key():
    noise = StepNoise(3, 5, 1)
    assert not torch.equal(normal(noise, "source", 3), normal(noise, "probe/0", 3))
    assert torch.equal(normal(noise, "source", 3), normal(StepNoise(3, 5, 1), "source", 3))


@pytest.mark.parametrize("noise", [StepNoise(0), SampleNoise(range(20_000))], ids=["step", "sample"])
def test_moments(noise):
    x, u = noise.normal("source", torch.empty(20_000, 1)), noise.uniform("time", 20_000)
    assert x.mean().item() == pytest.approx(0, abs=0.04)
    assert x.std().item() == pytest.approx(1, abs=0.03)
    assert u.shape == (20_000,)
    assert u.mean().item() == pytest.approx(0.5, abs=0.015)
    assert bool(((u >= 0) & (u < 1)).all())


@pytest.mark.parametrize("noise", [StepNoise(0), SampleNoise([1, 2, 3])], ids=["step", "sample"])
def test_no_global_random_state_is_used(noise):
    state = torch.get_rng_state()
    normal(noise, "source", 3)
    noise.uniform("time", 3)
    noise.generator("drop")
    assert torch.equal(state, torch.get_rng_state())


def test_generators_of_a_batch_differ_by_purpose_and_seeds():
    def first(noise, purpose):
        return float(torch.rand((), generator=noise.generator(purpose)))

    assert first(SampleNoise([1, 2]), "time") == first(SampleNoise([1, 2]), "time")
    assert len({first(SampleNoise([1, 2]), "time"), first(SampleNoise([1, 2]), "drop")}) == 2
    assert len({first(SampleNoise([1, 2]), "time"), first(SampleNoise([2, 1]), "time")}) == 2


def test_keys_are_63_bit_and_tell_their_parts_apart():
    keys = {key(1, 2), key(2, 1), key(12), key("12"), key("1", "2"), key(1, "2"), key(), key(-1)}
    assert len(keys) == 8
    assert all(0 <= k < 2**63 for k in keys)


def test_seeds_of_a_run_continue_where_asked_and_differ():
    seeds = seeds_from(7, 10)
    assert seeds.shape == (10,)
    assert seeds.dtype == torch.int64
    assert torch.equal(seeds_from(7, 4, start=6), seeds[6:])
    assert len(set(seeds.tolist()) | set(seeds_from(8, 10).tolist())) == 20
