"""Holes: conditional densities that are known, the published scheme step by step, what is known stays as it is."""

import math

import pytest
import torch

from lightning_flows.flow import Condition, GaussianProduct, SampleNoise, seeds_from
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import Sequential
from tests.modules.gaussian_flows import Halved, LinearFlow, data, flow
from tests.modules.tiny import Affine
from tests.networks.tiny_flows import tarflow

MASK = torch.tensor([[0, 1, 0], [7, 0, 1]])  # what is not zero is to be filled
HOLE = MASK.flatten() > 0
CHAINS = 500


def conditional(factor, known):
    """Mean and covariance of the hole given the rest (6,), of N(0, factor factor^T)."""
    covariance = factor @ factor.T
    gain = covariance[HOLE][:, ~HOLE] @ torch.linalg.inv(covariance[~HOLE][:, ~HOLE])
    return gain @ known[~HOLE], covariance[HOLE][:, HOLE] - gain @ covariance[~HOLE][:, HOLE], gain


def agree(found, mean, covariance):
    """Chains (N, n) have a mean and a covariance, within four deviations of such estimates."""
    std = covariance.diagonal().sqrt()
    assert ((found.mean(0) - mean).abs() < 4 * std / len(found) ** 0.5).all()
    spread = 4 * (std[:, None] * std) * (2 / len(found)) ** 0.5
    assert ((torch.cov(found.T) - covariance).abs() < spread).all()


def many(x, n=CHAINS):
    return x[None].expand(n, *x.shape)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 30, "leapfrog": 6, "step_size": 1.0},
        {"steps": 120, "leapfrog": 1},
        {"steps": 120, "rule": "paper", "step_size": 0.7},  # exact too: this flow is linear
    ],
    ids=["hamiltonian", "langevin", "paper"],
)
def test_chains_end_in_the_conditional_density(options):
    made, x = flow(), data(1)[0]
    found = made.inpaint(many(x), MASK, **options)
    mean, covariance, _ = conditional(made.network.factor.detach(), x.flatten())
    agree(found.x.flatten(1)[:, HOLE], mean, covariance)
    assert torch.equal(found.x.flatten(1)[:, ~HOLE], many(x).flatten(1)[:, ~HOLE])
    assert 0.2 < found.accepted.mean() < 0.98
    last = made.network.log_prob(found.x)
    torch.testing.assert_close(found.log_prob[:, -1], last, rtol=1e-4, atol=1e-4)
    assert found.log_prob.shape == (CHAINS, options["steps"])


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_where_the_flow_bends_only_the_exact_rule_is_exact(rule):
    """x = sinh(0.7 z): the walk in z accepted by densities of x leaves N(z) / cosh(0.7 z) invariant."""
    made = flow(LinearFlow(mixed=False, bent=True))
    options = {"steps": 60, "leapfrog": 8} if rule == "exact" else {"steps": 100, "step_size": 1.5}
    found = made.inpaint(many(data(1)[0], 700), MASK, rule=rule, **options)
    z = made.network(found.x)[0].detach().flatten(1)[:, HOLE]
    grid = torch.linspace(-8, 8, 4001)
    weight = torch.exp(-0.5 * grid.square()) / (1 if rule == "exact" else torch.cosh(0.7 * grid))
    variance = float((weight * grid.square()).sum() / weight.sum())
    assert (variance == pytest.approx(1, abs=1e-3)) == (rule == "exact")
    assert float(z.square().mean()) == pytest.approx(variance, abs=4 * variance * (2 / z.numel()) ** 0.5)


def test_the_surroundings_get_the_noise_of_the_training_data():
    made, x = flow(noise=0.4), data(1)[0]
    options = {"steps": 30, "leapfrog": 6, "denoise": 0.0}
    mean, covariance, gain = conditional(made.network.factor.detach(), x.flatten())
    plain = made.inpaint(many(x), MASK, noisy=False, **options).x.flatten(1)[:, HOLE]
    agree(plain, mean, covariance)
    noisy = made.inpaint(many(x), MASK, **options).x.flatten(1)[:, HOLE]
    agree(noisy, mean, covariance + 0.4**2 * gain @ gain.T)


def test_the_noise_is_removed_and_the_known_pixels_are_the_given_ones():
    made, x = flow(noise=0.4), data(4)
    raw = made.inpaint(x, MASK, steps=5, denoise=0.0, paste=False)
    found = made.inpaint(x, MASK, steps=5)
    expected = made.denoised(raw.x)
    torch.testing.assert_close(found.x.flatten(1)[:, HOLE], expected.flatten(1)[:, HOLE])
    assert torch.equal(found.x.flatten(1)[:, ~HOLE], x.flatten(1)[:, ~HOLE])
    own = SampleNoise(seeds_from(0, 4)).normal("data_noise", x)
    torch.testing.assert_close(raw.x.flatten(1)[:, ~HOLE], (x + 0.4 * own).flatten(1)[:, ~HOLE])


def test_a_class_moves_the_hole():
    made, x = flow(LinearFlow(5, mixed=False)), data(1)[0]
    found = made.inpaint(many(x, 300), MASK, Condition(label=torch.full((300,), 4)), steps=30)
    agree(found.x.flatten(1)[:, HOLE], torch.full((3,), 2.0), 0.49 * torch.eye(3))


def test_the_published_scheme_step_by_step():
    made, x, steps, tau = flow(), data(3), 6, 0.8
    noise, free = SampleNoise(seeds_from(4, 3)), HOLE.reshape(1, 1, 2, 3)
    now = torch.where(free, noise.normal("fill", x), x)
    for i in range(steps):
        z = made.network(now)[0] + tau * free * noise.normal(f"move {i}", x)
        other = torch.where(free, made.network.draw(z).x, now)
        ratio = (made.network.log_prob(other) - made.network.log_prob(now)).exp()
        now = torch.where((noise.uniform(f"accept {i}", 3) < ratio).reshape(-1, 1, 1, 1), other, now)
    found = made.inpaint(x, MASK, rule="paper", steps=steps, step_size=tau, seed=4)
    torch.testing.assert_close(found.x, now.detach())


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_guidance_is_that_of_the_module_or_of_the_call(rule):
    made, x = NormalizingFlow(network=tarflow(num_classes=3), denoise=0.0), data(2, shape=(2, 4, 6))
    made.guidance = GaussianProduct(3.0)
    condition, mask = Condition(label=torch.tensor([0, 2])), torch.arange(24).reshape(4, 6) % 3
    options = {"rule": rule, "steps": 4, "noisy": False, "seed": 1}
    guided = made.inpaint(x, mask, condition, **options)
    plain = made.inpaint(x, mask, condition, guidance=1.0, **options)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(plain.log_prob[:, -1], made.log_prob(plain.x, condition).detach(), **close)
    z = made.network.draw(torch.zeros_like(x), condition, guidance=made.guidance)
    assert (guided.log_prob - plain.log_prob).abs().min() > 1e-3
    # the density of the guided flow at a point of its own: that of its noise over the volume of the map
    whole = made.inpaint(z.x, torch.zeros(4, 6), condition, **options)
    expected = -0.5 * 48 * math.log(2 * math.pi) - z.log_det
    torch.testing.assert_close(whole.log_prob[:, -1], expected.detach(), **close)


def test_a_result_does_not_depend_on_the_batch_nor_on_what_was_under_the_mask():
    made, x = flow(noise=0.2), data(4)
    for options in ({"steps": 8}, {"steps": 8, "rule": "paper"}):
        together = made.inpaint(x, MASK, seed=3, **options)
        alone = made.inpaint(x[2:3], MASK, seeds=seeds_from(3, 4)[2:3], **options)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[2:3], other, rtol=1e-4, atol=1e-4)
        hidden = torch.where(MASK > 0, 100.0, x)
        assert torch.equal(made.inpaint(hidden, MASK, seed=3, **options).x, together.x)


def test_latents_are_filled_where_any_of_their_pixels_is():
    made, x = flow(codec=Halved()), data(2, shape=(1, 4, 6))
    mask = torch.zeros(2, 4, 6)
    mask[0, 0, 3] = mask[1, 3, 5] = 1
    found = made.inpaint(x, mask, steps=5)
    changed = (found.x != x)[:, 0]
    assert torch.equal(changed, mask > 0)  # the known pixels are pasted
    raw = made.inpaint(x, mask, steps=5, paste=False).x
    latents = Halved().encode(x * (mask == 0)[:, None])
    moved = (Halved().encode(raw) - latents).abs().flatten(1) > 1e-5
    assert moved.nonzero().tolist() == [[0, 1], [1, 5]]
    cells = torch.zeros(2, 1, 2, 3)
    cells[0, 0, 0, 1] = cells[1, 0, 1, 2] = 1
    by_cells = made.inpaint(x, cells, steps=5)
    assert torch.equal((by_cells.x != x)[0, 0].nonzero(), torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]]))


def test_densities_are_those_of_the_codes_before_their_scale():
    made, x = flow(codec=Affine(gain=4.0, offset=1.0)), data(2)
    made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
    found = made.inpaint(x, MASK, steps=5)
    torch.testing.assert_close(found.log_prob[:, -1], made.log_prob(found.x).detach(), rtol=1e-4, atol=1e-3)


def test_a_sample_without_a_hole_comes_back():
    made, x = flow(), data(2)
    found = made.inpaint(x, torch.stack([MASK, 0 * MASK]), steps=3)
    assert torch.equal(found.x[1], x[1])
    assert (found.x[0] != x[0]).any()


def test_they_run_in_eval_mode_report_and_leave_the_mode():
    made, seen = flow().train(), []
    found = made.inpaint(data(2), MASK, steps=3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(made.network.modes)
    assert made.training
    assert not found.x.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        made.inpaint(data(2), MASK, steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.zeros(3, 3)}, r"mask must have shape \(2, 2, 3\), or that of one sample, got \(3, 3\)"),
        ({"mask": torch.zeros(3, 2, 3)}, "mask must have shape"),
        ({"mask": torch.zeros(2, 2, 2, 3)}, "mask must have shape"),
        ({"x": torch.zeros(2, 6)}, r"x must have shape \(B, C, H, W\)"),
        ({"rule": "gibbs"}, r"rule must be one of \('exact', 'paper'\), got 'gibbs'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 4, "warmup": 4}, r"warmup must lie in \[0, steps=4\), got 4"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"leapfrog": 0}, "leapfrog must be at least 1"),
        ({"rule": "paper", "leapfrog": 4}, "leapfrog=4 has no meaning for rule='paper'"),
        ({"rule": "paper", "warmup": 4}, "warmup=4 has no meaning for rule='paper'"),
        ({"method": Sequential()}, "has no meaning for rule='exact'"),
        ({"seeds": [1]}, "number of samples disagrees"),
        ({"condition": Condition(label=torch.tensor([0, 1]))}, "'label', but LinearFlow reads no condition"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    given = {"x": data(2), "mask": MASK, **options}
    with pytest.raises(ValueError, match=message):
        flow().inpaint(**given)
