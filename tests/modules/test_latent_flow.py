"""Flow matching in a latent space against closed forms: samples, densities, statistics, keyed losses."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_flows.flow import (
    RK4,
    ClassifierFree,
    Condition,
    EulerMaruyama,
    FlowMatching,
    Gaussian,
    Heun,
    Hutchinson,
    SampleNoise,
    StepNoise,
)
from tests.modules.tiny import Affine, ToGaussian, Unconditional, batch, dit, model

LABEL = torch.tensor([0, 1, 2, 2])
FINE = {"solver": RK4(), "steps": 40}


def exact(**options):
    return model(ToGaussian(std=0.5), **{**FINE, **options})


# ---------------------------------------------------------------------- samples


def test_samples_of_an_exact_velocity_are_mean_plus_deviation_times_noise():
    seeds = [3, 4, 5, 6]
    x0 = SampleNoise(seeds).normal("source", torch.empty(4, 1, 2, 2))
    expected = LABEL.reshape(-1, 1, 1, 1) + 0.5 * x0
    torch.testing.assert_close(exact().sample(Condition(label=LABEL), seeds=seeds), expected, rtol=1e-4, atol=1e-4)


def test_samples_are_what_the_codec_decodes_the_latent_to():
    plain, coded = exact(), exact(codec=Affine(gain=4.0, offset=1.0))
    for made in (plain, coded):
        made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
    latent = 0.25 * exact().sample(n=2) + 2.0  # z = latent / scale + shift
    torch.testing.assert_close(plain.sample(n=2), latent)
    torch.testing.assert_close(coded.sample(n=2), (latent - 1) / 4)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coded.decode(coded.encode(x)), x)


def test_options_of_one_call_leave_the_module_as_it_is():
    made = exact(solver=Heun(), steps=2)
    rough = made.sample(n=1)
    fine = made.sample(n=1, **FINE)
    assert not torch.allclose(rough, fine, atol=1e-3)
    assert torch.equal(fine, exact().sample(n=1))
    assert torch.equal(made.sample(n=1), rough)


# ---------------------------------------------------------------------- guidance


def test_guidance_of_scale_one_is_no_guidance():
    made, condition = model(), Condition(label=LABEL)
    assert torch.equal(made.sample(condition, guidance=1.0), made.sample(condition))
    assert torch.equal(made.sample(condition, guidance=1), made.sample(condition))


def test_a_number_is_the_scale_of_classifier_free_guidance():
    made, condition = model(), Condition(label=LABEL)
    guided = made.sample(condition, guidance=3.0)
    assert torch.equal(guided, made.sample(condition, guidance=ClassifierFree(3.0)))
    assert (guided - made.sample(condition)).abs().max() > 1e-3


def test_guidance_of_an_exact_velocity_has_its_closed_form():
    """At t = 0 the velocity at 0 is the mean, 0 in the null branch: guidance multiplies it by the scale."""
    made, label = exact(), torch.tensor([2])
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor(0.0)
    plain = made.field(Condition(label=label))(x, t)
    guided = made.field(Condition(label=label), ClassifierFree(2.5))(x, t)
    torch.testing.assert_close(plain, torch.full_like(x, 2.0))
    torch.testing.assert_close(guided, torch.full_like(x, 5.0))


def test_a_number_replaces_the_scale_of_the_guidance_of_the_module_and_keeps_its_interval():
    rule, condition = ClassifierFree(4.0, interval=(0.25, 0.75)), Condition(label=LABEL)
    made = model(guidance=rule)
    assert torch.equal(made.sample(condition), made.sample(condition, guidance=rule))
    other = ClassifierFree(2.0, interval=(0.25, 0.75))
    assert torch.equal(made.sample(condition, guidance=2.0), made.sample(condition, guidance=other))
    assert torch.equal(made.sample(condition, guidance=1.0), model().sample(condition))


@pytest.mark.parametrize(
    ("made", "condition", "message"),
    [
        (lambda: model(Unconditional(), shape=(1, 4, 4)), None, "needs a network with a condition"),
        (model, None, "needs a condition with one of"),
        (lambda: model(dit(label_dropout=0.0)), Condition(label=LABEL), "no null row"),
    ],
)
def test_guidance_without_an_unconditional_branch_is_an_error(made, condition, message):
    with pytest.raises(ValueError, match=message):
        made().sample(condition, guidance=2.0)


# ---------------------------------------------------------------------- stochastic solvers


def test_a_stochastic_solver_samples_the_same_law():
    made = exact(solver=EulerMaruyama(), steps=100)
    samples = made.sample(Condition(label=torch.full((400,), 2)), seed=1)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.05)
    assert samples.std().item() == pytest.approx(0.5, rel=0.06)
    assert torch.equal(samples[:3], made.sample(Condition(label=torch.full((400,), 2)), seed=1)[:3])
    x0 = SampleNoise([9]).normal("source", torch.empty(1, 1, 2, 2))
    assert (made.sample(seeds=[9]) - 0.5 * x0).abs().max() > 0.05  # it is not the flow


@dataclass(frozen=True)
class NotGaussian(Gaussian):
    @property
    def gaussian(self):
        return False


def test_a_stochastic_solver_needs_a_gaussian_source():
    objective = FlowMatching(source=NotGaussian())
    with pytest.raises(ValueError, match="EulerMaruyama needs the score"):
        model(objective=objective, solver=EulerMaruyama())
    with pytest.raises(ValueError, match="EulerMaruyama needs the score"):
        model(objective=objective).sample(n=1, solver=EulerMaruyama())


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("network", "condition", "message"),
    [
        (
            lambda: dit(num_classes=None, label_dropout=0.0),
            Condition(label=LABEL),
            "'label'.*no condition at all",
        ),
        (dit, Condition(vector=torch.zeros(4, 2)), r"'vector', but DiT reads \['label'\]"),
        (dit, Condition(label=LABEL + 1), r"label must lie in \[0, 3\)"),
        (lambda: dit(label_dropout=0.0), None, "label is absent"),
    ],
)
@pytest.mark.parametrize("call", ["sample", "log_prob"])
def test_a_condition_that_the_network_cannot_use_is_named(call, network, condition, message):
    made = model(network())
    arguments = (condition,) if call == "sample" else (torch.zeros(4, 1, 4, 4), condition)
    with pytest.raises(ValueError, match=message):
        getattr(made, call)(*arguments)


def test_arguments_of_the_constructor_are_checked():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        model(steps=0)
    with pytest.raises(ValueError, match=r"shape must be .*Unconditional does not say it"):
        model(Unconditional())
    with pytest.raises(ValueError, match="std must be positive"):
        model().set_latent_statistics(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"steps must be .* got 0"):
        model().sample(n=1, steps=0)
    with pytest.raises(ValueError, match=r"steps must be .* got 0"):
        model().log_prob(torch.zeros(1, 1, 4, 4), steps=0)


# ---------------------------------------------------------------------- likelihood


def test_log_prob_is_the_density_of_the_latent_and_counts_the_volume():
    made = exact()
    made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
    x = 2 + 0.25 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = (x - 2) / 0.25
    expected = made.network.log_prob(z, Condition(label=LABEL)) + 4 * math.log(4)  # four elements, dz/dx = 4
    found = made.log_prob(x, Condition(label=LABEL))
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_density_is_that_of_what_the_codec_encodes_to():
    plain, coded = exact(), exact(codec=Affine(gain=4.0, offset=1.0))
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = coded.log_prob((x - 1) / 4, Condition(label=LABEL))
    torch.testing.assert_close(found, plain.log_prob(x, Condition(label=LABEL)), rtol=1e-4, atol=1e-4)


def test_a_density_integrates_to_one_and_is_nothing_but_the_law_of_the_samples():
    """Mean of -log p over samples is the entropy of the normal law."""
    made = exact(steps=20)
    x = made.sample(Condition(label=torch.ones(300).long()), seed=2)
    entropy = 4 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    found = -made.log_prob(x, Condition(label=torch.ones(300).long())).mean()
    assert found.item() == pytest.approx(entropy, abs=0.3)


def test_hutchinson_is_exact_for_a_field_whose_jacobian_is_a_multiple_of_one():
    made, x = exact(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exactly = made.log_prob(x, Condition(label=LABEL))
    guess = made.log_prob(x, Condition(label=LABEL), divergence=Hutchinson(), seed=5)
    torch.testing.assert_close(guess, exactly, rtol=1e-4, atol=1e-4)


def test_probes_of_a_sample_have_the_key_of_their_seed():
    made, x = model(), batch(3)["image"]
    first, again, other = (made.log_prob(x, divergence=Hutchinson(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradients_of_the_density_reach_the_data_and_the_parameters():
    made, x = exact(steps=10), torch.full((2, 1, 2, 2), 0.7, requires_grad=True)
    made.log_prob(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, -0.7 / 0.25), rtol=1e-3, atol=1e-3)
    slope = 8 * (0.7**2 / 0.5**3 - 1 / 0.5)  # d/ds of eight log N(0.7; 0, s)
    assert made.network.std.grad.item() == pytest.approx(slope, rel=1e-2)
    with torch.no_grad():
        assert not made.log_prob(x).requires_grad


def test_a_density_with_a_stochastic_solver_or_in_inference_mode_is_an_error():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="EulerMaruyama"):
        model().log_prob(x, solver=EulerMaruyama())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        model().log_prob(x)


# ---------------------------------------------------------------------- losses


def test_losses_have_the_key_of_their_noise():
    made, data = model().train(), batch(6)
    first, again = made.losses(data, StepNoise(1, 2, 0)), made.losses(data, StepNoise(1, 2, 0))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.logs["t"], again.logs["t"])
    for noise in (StepNoise(2, 2, 0), StepNoise(1, 3, 0), StepNoise(1, 2, 1)):
        assert not torch.equal(made.losses(data, noise).loss, first.loss)
    assert first.loss.shape == (6,)


def test_the_loss_is_the_mean_squared_error_of_the_velocity_at_the_latent():
    made, data = exact(codec=Affine()).eval(), batch(4, size=2)
    made.set_latent_statistics(torch.tensor([0.5]), torch.tensor([2.0]))
    noise = StepNoise(5)
    losses = made.losses(data, noise)
    z = (4 * data["image"] + 1 - 0.5) / 2
    x0, t = noise.normal("source", z), losses.logs["t"].reshape(-1, 1, 1, 1)
    output = made.network(t * z + (1 - t) * x0, losses.logs["t"], Condition(label=data["label"]))
    expected = (output - (z - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.loss, expected)


def test_noise_that_was_coupled_before_is_used():
    made, data = model(), batch(4)
    data["source"] = torch.zeros(4, 1, 4, 4)
    losses = made.losses(data, StepNoise(0))
    t = losses.logs["t"].reshape(-1, 1, 1, 1)
    made.eval()
    output = made.network(t * data["image"], losses.logs["t"], Condition(label=data["label"]))
    loss = (output - data["image"]).square().mean((1, 2, 3))
    torch.testing.assert_close(made.losses(data, StepNoise(0)).loss, loss)


def dropped(made, noise):
    made.network.conditions.clear()
    made.losses(batch(64, size=2), noise)
    return made.network.conditions[0].presence("label")


def test_labels_are_dropped_by_the_key_in_training_only():
    made = exact().train()
    first = dropped(made, StepNoise(1, 2, 0))
    assert 10 < int(first.sum()) < 54
    assert torch.equal(first, dropped(made, StepNoise(1, 2, 0)))
    assert not torch.equal(first, dropped(made, StepNoise(1, 3, 0)))
    made.eval()
    assert bool(dropped(made, StepNoise(1, 2, 0)).all())


# ---------------------------------------------------------------------- statistics


class Items:
    """Images with mean 2 and deviation 3 in the first channel, -1 and 0.5 in the second."""

    def __init__(self, n=24):
        self.x = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(7))
        self.x = self.x * torch.tensor([3.0, 0.5]).reshape(2, 1, 1) + torch.tensor([2.0, -1.0]).reshape(2, 1, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": self.x[i], "label": i % 3}


def standardized(**options):
    return model(dit(in_channels=2), optimizer=functools.partial(torch.optim.SGD, lr=1e-3), **options)


def test_latents_are_standardized_before_the_first_step(quiet_trainer):
    made, items = standardized(standardize=100, codec=Affine()), Items()
    before = []
    losses = made.losses
    made.losses = lambda data, noise: before.append(made.latent_scale.clone()) or losses(data, noise)
    quiet_trainer(max_steps=2).fit(made, DataLoader(items, batch_size=8))
    latents = 4 * items.x + 1
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)
    torch.testing.assert_close(made.latent_shift.flatten(), mean)
    torch.testing.assert_close(made.latent_scale.flatten(), 1 / std)
    assert torch.equal(before[0], made.latent_scale)
    z = made.encode(items.x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(2))


def test_only_as_many_batches_are_measured_as_were_asked_for(quiet_trainer):
    made, items = standardized(standardize=2), Items()
    quiet_trainer(max_steps=1).fit(made, DataLoader(items, batch_size=8))
    torch.testing.assert_close(made.latent_shift.flatten(), items.x[:16].mean((0, 2, 3)))


def test_statistics_are_saved_and_not_measured_again_on_resuming(quiet_trainer, tmp_path):
    made, items = standardized(standardize=3), Items()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(made, DataLoader(items, batch_size=8))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    later = standardized(standardize=3)
    items.x = items.x + 100
    quiet_trainer(max_steps=2).fit(later, DataLoader(items, batch_size=8), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(later.latent_shift, made.latent_shift)
    assert torch.equal(later.latent_scale, made.latent_scale)


def test_statistics_that_came_with_weights_are_kept(quiet_trainer):
    """The network that is finetuned was trained on latents with these numbers."""
    made, items = standardized(standardize=3), Items()
    made.set_latent_statistics(torch.tensor([5.0, 6.0]), torch.tensor([0.5, 0.25]))
    quiet_trainer(max_steps=1).fit(made, DataLoader(items, batch_size=8))
    assert made.latent_shift.flatten().tolist() == [5.0, 6.0]
    assert made.latent_scale.flatten().tolist() == [2.0, 4.0]


def test_without_standardize_latents_are_left_as_they_are(quiet_trainer):
    made = standardized()
    quiet_trainer(max_steps=1).fit(made, DataLoader(Items(), batch_size=8))
    assert made.latent_shift.eq(0).all()
    assert made.latent_scale.eq(1).all()
