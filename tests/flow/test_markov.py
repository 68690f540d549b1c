"""Hamiltonian Monte Carlo: the density it leaves invariant, reversible proposals, step sizes that adapt."""

import math

import pytest
import torch

from lightning_flows.flow import SampleNoise
from lightning_flows.flow.markov import Hamiltonian, accepted, adapted, jittered

MEAN, STD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
FREE = torch.ones(2)


def gaussian(x):
    return (-0.5 * ((x - MEAN) / STD).square()).sum(1)


def mixture(x):
    """Two normals of deviation 0.6 at -1.2 and 1.2, with weights 0.3 and 0.7."""
    parts = [math.log(w) - 0.5 * ((x[:, 0] - m) / 0.6).square() for w, m in ((0.3, -1.2), (0.7, 1.2))]
    return torch.logsumexp(torch.stack(parts), 0)


def walk(density, x, steps, leapfrog, size, free=FREE):
    """Where chains are after some steps of one size, and the share of accepted proposals."""
    kernel, noise = Hamiltonian(leapfrog), SampleNoise(range(len(x)))
    state, share = kernel.start(density, x, free), 0.0
    sizes = torch.full((len(x),), size)
    for i in range(steps):
        now = jittered(sizes, noise.uniform(f"size {i}", len(x)))
        proposal, ratio = kernel.propose(density, state, noise.normal(f"p {i}", x), now, free)
        yes = accepted(ratio, noise.uniform(f"u {i}", len(x)))
        state, share = state.where(yes, proposal), share + yes.float().mean() / steps
    return state.x, share


@pytest.mark.parametrize(("leapfrog", "steps", "size"), [(1, 60, 0.6), (8, 12, 0.5)])
def test_many_chains_end_in_the_gaussian(leapfrog, steps, size):
    x, share = walk(gaussian, torch.zeros(1500, 2), steps, leapfrog, size)
    assert 0.3 < share < 0.999  # some proposals are refused, or the test would not see a wrong ratio
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=4 * 2.0 / 1500**0.5)
    torch.testing.assert_close(x.std(0), STD, rtol=0.08, atol=0)


@pytest.mark.parametrize("leapfrog", [1, 4])
def test_many_chains_started_in_a_density_stay_in_it(leapfrog):
    """Steps far too long for the integrator: without the right ratio the shape would be lost."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(2500, 1, generator=generator) < 0.7
    x = torch.where(right, 1.2, -1.2) + 0.6 * torch.randn(2500, 1, generator=generator)
    moved, share = walk(mixture, x, 15, leapfrog, 0.9, torch.ones(1))
    assert 0.3 < share < 0.97
    for power in (1, 2, 3):
        deviation = float((x**power).std()) / 2500**0.5
        exact = {1: 0.48, 2: 1.44 + 0.36, 3: 0.4 * (1.2**3 + 3 * 1.2 * 0.36)}[power]
        assert abs(float((moved**power).mean()) - exact) < 4 * deviation


def test_a_proposal_is_walked_back_with_the_momentum_reversed():
    kernel, x = Hamiltonian(5), torch.tensor([[0.3, 0.4]]).double()
    size, momentum = torch.tensor([0.3]).double(), torch.tensor([[1.0, -0.5]]).double()
    state = kernel.start(gaussian, x, FREE)
    there, ratio = kernel.propose(gaussian, state, momentum, size, FREE)
    end = momentum  # the momentum with which it arrives, by the same steps
    now = x
    for _ in range(5):
        end = end - 0.5 * size * (now - MEAN) / STD**2
        now = now + size * end
        end = end - 0.5 * size * (now - MEAN) / STD**2
    torch.testing.assert_close(there.x, now)
    energy = gaussian(now) - gaussian(x) + 0.5 * (momentum.square() - end.square()).sum(1)
    torch.testing.assert_close(ratio, energy)
    back, undone = kernel.propose(gaussian, there, -end, size, FREE)
    torch.testing.assert_close(back.x, x)
    torch.testing.assert_close(undone, -ratio)


def test_what_is_not_free_never_moves():
    x = torch.randn(40, 2)
    moved, _ = walk(gaussian, x, 5, 3, 0.3, torch.tensor([1.0, 0.0]))
    assert torch.equal(moved[:, 1], x[:, 1])
    assert (moved[:, 0] != x[:, 0]).any()


def test_what_is_not_a_number_is_refused_and_shortens_the_step():
    ratio = torch.tensor([math.nan, -math.inf, 0.5])
    assert accepted(ratio, torch.zeros(3)).tolist() == [False, False, True]  # log 0 is below every number
    sizes = adapted(torch.ones(3), ratio, 0.65, 4)
    torch.testing.assert_close(sizes, torch.tensor([-0.325, -0.325, 0.175]).exp())


def test_step_sizes_vary_by_a_fifth():
    sizes = jittered(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]))
    assert sizes.tolist() == pytest.approx([1.6, 2, 2.4])


def test_errors_and_targets():
    with pytest.raises(ValueError, match="leapfrog must be at least 1"):
        Hamiltonian(0)
    assert (Hamiltonian(1).target, Hamiltonian(2).target) == (0.574, 0.651)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        Hamiltonian().start(gaussian, torch.zeros(1, 2), FREE)
