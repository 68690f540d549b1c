"""Normalizing flows as modules: densities, exact samples, denoising, guidance, conditions, training."""

import functools
import json
import math

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_flows.callbacks import EMA, Evaluation, SampleGrid
from lightning_flows.codecs import PromptTemplate, WordEncoder
from lightning_flows.data import Arrays, Digits, Requests
from lightning_flows.flow import (
    RK4,
    Condition,
    Dequantization,
    GaussianNoise,
    GaussianProduct,
    LogLinear,
    MaximumLikelihood,
    SampleNoise,
    StepNoise,
    bits_per_dim,
    dequantize,
    key,
)
from lightning_flows.flow import log_normal as normal_nats
from lightning_flows.metrics import BitsPerDim
from lightning_flows.modules import NormalizingFlow, WarmupCosine, from_pretrained
from lightning_flows.networks import Jacobi, PerBlock, Sequential, STARFlow, TARFlow
from lightning_flows.store import build, config_of
from tests.modules.test_pretrained import by_command
from tests.modules.tiny import Affine, ToGaussian, Unconditional, batch, model
from tests.modules.tiny_flow import FLOWS, flow, gaussian, log_normal, preserving, star, tar, texts
from tests.networks.tiny_flows import normal, redrawn, tarflow

LABEL = torch.tensor([0, 1, 2, 2])
CONDITION = Condition(label=LABEL)
EVERY_FLOW = pytest.mark.parametrize("network", FLOWS.values(), ids=FLOWS)


def data(n=4, *shape, seed=3):
    return normal(n, *(shape or (1, 4, 4)), seed=seed)


# ---------------------------------------------------------------------- density


@pytest.mark.parametrize("scaled", [False, True])
def test_the_density_of_a_gaussian_flow_is_known(scaled):
    """With a scale the latent 4 x + 1 is standardised by mean 2 and deviation 0.25 before the flow sees it."""
    made, x = flow(gaussian(0.3, 0.5), codec=Affine(4.0, 1.0) if scaled else None), data(3, 1, 2, 2)
    if scaled:
        made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
        torch.testing.assert_close(made.log_prob(x), log_normal(4 * x + 1, 2 + 0.25 * 0.3, 0.25 * 0.5))
    else:
        torch.testing.assert_close(made.log_prob(x), log_normal(x, 0.3, 0.5))


@pytest.mark.parametrize("network", [tarflow, lambda **o: star(**o, num_classes=None, label_dropout=0.0)])
@torch.no_grad()
def test_the_density_of_the_encoded_data_integrates_to_one(network):
    made = flow(redrawn(network(input_size=(1, 2), patch_size=1, in_channels=1), seed=2, std=0.3))
    made.set_latent_statistics(torch.tensor([0.4]), torch.tensor([1.7]))
    u = torch.linspace(-5, 5, 121)
    widths = u.cosh() * (u[1] - u[0])
    x = torch.cartesian_prod(u.sinh(), u.sinh()).reshape(-1, 1, 1, 2)
    mass = made.eval().log_prob(x).exp() @ torch.outer(widths, widths).flatten()
    assert mass.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", [Sequential(), Jacobi(segment=2, threshold=1e-12)])
@EVERY_FLOW
def test_a_sample_tells_the_density_with_which_it_was_drawn(network, method):
    made = flow(network(), codec=Affine(4.0, 1.0), method=method)
    made.set_latent_statistics(torch.tensor([2.0]), torch.tensor([0.25]))
    x, log_prob = made.sample(CONDITION, seed=2, return_log_prob=True)
    torch.testing.assert_close(log_prob, made.log_prob(x, CONDITION), rtol=1e-3, atol=1e-3)
    assert torch.equal(x, made.sample(CONDITION, seed=2))
    assert (log_prob - made.log_prob(x, None)).abs().max() > 1e-3


def test_the_density_of_a_guided_sample_is_that_of_the_guided_map():
    """By finite differences of the map from noise to data."""
    network = tar(input_size=2, patch_size=1).double()
    made = flow(network, guidance=GaussianProduct(3.0)).double()
    condition, z = Condition(label=torch.tensor([1])), normal(1, 1, 2, 2, dtype=torch.float64)
    h = 1e-5 * torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    every = Condition(label=torch.tensor([1] * 4))
    with torch.no_grad():
        drawn, up, down = made.draw(z, condition), made.draw(z + h, every), made.draw(z - h, every)
    slopes = ((up.x - down.x) / 2e-5).flatten(1)  # row i: dx / dz_i
    torch.testing.assert_close(torch.linalg.slogdet(slopes)[1], drawn.log_det[0], rtol=1e-6, atol=1e-6)
    assert (drawn.log_det + network(drawn.x, condition)[1]).abs().item() > 1e-3  # not that of the model


def test_samples_of_a_gaussian_flow_are_mean_plus_deviation_times_noise():
    seeds = [3, 4, 5]
    noise = SampleNoise(seeds).normal("source", torch.empty(3, 1, 2, 2))
    torch.testing.assert_close(flow(gaussian(0.3, 0.5)).sample(seeds=seeds), 0.3 + 0.5 * noise)


@EVERY_FLOW
def test_noise_and_data_are_inverse_to_each_other(network):
    made, x = flow(network(), codec=Affine(4.0, 1.0)), data() / 4
    made.set_latent_statistics(torch.tensor([1.0]), torch.tensor([2.0]))
    z = made.normalize(x, CONDITION)
    torch.testing.assert_close(made.from_noise(z, CONDITION), x, rtol=1e-4, atol=1e-4)
    assert (made.from_noise(z, None) - x).abs().max() > 1e-3
    torch.testing.assert_close(made.normalize(made.from_noise(x, CONDITION), CONDITION), x, rtol=1e-4, atol=1e-4)


def test_log_prob_is_differentiable_and_knows_no_options():
    made, x = flow(), data().requires_grad_()
    made.log_prob(x, CONDITION).sum().backward()
    assert (x.grad.abs() > 0).all()
    assert all(p.grad is not None for p in made.network.parameters())
    with pytest.raises(ValueError, match=r"exact and takes no \['steps'\]"):
        made.log_prob(x, CONDITION, steps=3)
    with pytest.raises(ValueError, match=r"'vector', but STARFlow reads \['label'\]"):
        made.log_prob(x, Condition(vector=torch.zeros(4, 2)))


# ---------------------------------------------------------------------- the variance of noise


def test_a_flow_that_preserves_volume_draws_from_the_tracked_variance(tmp_path):
    made = flow(preserving())
    seeds = [1, 2, 3, 4]
    noise = SampleNoise(seeds).normal("source", torch.empty(4, 1, 4, 4))
    z = made.network.unpatchify(made.network.patchify(noise) * made.network.prior_variance.sqrt(), 2, 2)
    torch.testing.assert_close(made.sample(CONDITION, seeds=seeds), made.from_noise(z, CONDITION))
    x = data()
    std = made.network.prior_variance.sqrt()
    found = made.network.patchify(made.normalize(x, CONDITION))
    torch.testing.assert_close(
        made.log_prob(x, CONDITION), torch.distributions.Normal(0, std).log_prob(found).sum((1, 2))
    )
    loaded = from_pretrained(made.save_pretrained(tmp_path))
    assert torch.equal(loaded.network.prior_variance, made.network.prior_variance)
    torch.testing.assert_close(loaded.log_prob(x, CONDITION), made.log_prob(x, CONDITION))


@pytest.mark.parametrize("mode", [True, False])
def test_the_variance_is_tracked_by_training_steps_alone(mode):
    made = flow(preserving(), std=0.3, denoise=1.0).train(mode)
    before, noise = made.network.prior_variance.clone(), StepNoise(0)
    made.log_prob(data(), CONDITION)
    made.denoised(data(), CONDITION)
    made.sample(CONDITION)
    made.normalize(data(), CONDITION)
    assert torch.equal(made.network.prior_variance, before)
    made.losses(batch(4), noise)
    assert torch.equal(made.network.prior_variance, before) != mode


# ---------------------------------------------------------------------- denoising


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.4])
def test_denoising_gives_the_mean_of_clean_gaussian_data(strength):
    """Clean data N(m, s^2), noise of deviation 0.3: the flow models N(m, s^2 + 0.09)."""
    m, s, std = 0.3, 0.4, 0.3
    made = flow(gaussian(m, math.hypot(s, std)), std=std)
    y = data(3, 1, 2, 2)
    clean = (s**2 * y + std**2 * m) / (s**2 + std**2)
    torch.testing.assert_close(made.denoised(y, strength=strength), y + strength * (clean - y))
    noisy = made.sample(n=3, seed=1)
    torch.testing.assert_close(made.sample(n=3, seed=1, denoise=strength), made.denoised(noisy, None, strength))


@EVERY_FLOW
def test_denoising_does_not_depend_on_the_batch_or_on_gradients(network):
    made, x = flow(network(), std=0.3).train(), data()
    whole = made.denoised(x, CONDITION)
    assert (whole - x).abs().max() > 1e-3
    for i in range(4):
        torch.testing.assert_close(made.denoised(x[[i]], CONDITION[[i]]), whole[[i]], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(made.denoised(x, CONDITION), whole)
    assert not whole.requires_grad
    assert all(p.grad is None for p in made.parameters())
    assert all(part.training for part in made.network.modules())


def test_denoising_is_left_out_where_there_is_nothing_to_remove():
    x = data()
    assert flow(std=0.3).denoised(x, CONDITION, 0.0) is x
    assert flow(std=0.0, denoise=1.0).denoised(x, CONDITION) is x
    uniform = flow(objective=MaximumLikelihood(Dequantization()), denoise=1.0)
    assert uniform.denoised(x, CONDITION) is x
    with torch.inference_mode():
        assert flow(std=0.3).sample(CONDITION).shape == (4, 1, 4, 4)
        with pytest.raises(RuntimeError, match=r"leave torch\.inference_mode"):
            flow(std=0.3, denoise=1.0).sample(CONDITION)
    with pytest.raises(ValueError, match="denoise must not be negative"):
        flow(denoise=-1.0)


def test_sampling_leaves_the_modes_of_all_parts_as_they_were():
    made = flow(std=0.3, denoise=1.0).train()
    made.network.blocks[1].eval()
    modes = [part.training for part in made.modules()]
    x = made.sample(CONDITION, seed=1)
    assert [part.training for part in made.modules()] == modes
    assert torch.equal(made.eval().sample(CONDITION, seed=1), x)


# ---------------------------------------------------------------------- keyed noise, progress


@pytest.mark.parametrize("method", [Sequential(), Jacobi(segment=2, threshold=1e-2), None])
@EVERY_FLOW
def test_a_sample_depends_on_its_own_seed_and_condition_alone(network, method):
    made = flow(network(), std=0.2, denoise=1.0, method=method, guidance=GaussianProduct(2.0))
    whole = made.sample(CONDITION, seeds=[5, 6, 7, 8])
    parts = made.sample(CONDITION, seeds=[5, 6, 7, 8], batch_size=3)
    turned = made.sample(CONDITION[[3, 1]], seeds=[8, 6])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned, whole[[3, 1]], rtol=1e-4, atol=1e-4)
    assert (made.sample(CONDITION, seeds=[9, 6, 7, 8])[0] - whole[0]).abs().max() > 0.1
    assert torch.equal(made.sample(CONDITION, seeds=[5, 6, 7, 8]), whole)


@pytest.mark.parametrize("method", [Sequential(), Jacobi(segment=3), PerBlock([Sequential(), Jacobi(2), Sequential()])])
@pytest.mark.parametrize("network", [tar, lambda: star(depth=(1, 0, 1))])
def test_progress_counts_to_the_end(network, method):
    seen, made = [], flow(network(), method=method)
    made.sample(CONDITION, progress=lambda step, steps: seen.append((step, steps)))
    total = 4 * sum(len(block.attn_blocks) > 0 for block in made.network.stack)
    assert {steps for _, steps in seen} == {total}
    counts = [step for step, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert len(set(counts)) > 2


# ---------------------------------------------------------------------- guidance


@EVERY_FLOW
def test_guidance_of_scale_one_is_no_guidance_and_asks_for_no_null(network, monkeypatch):
    made = flow(network(), guidance=LogLinear(2.0))
    plain = flow(made.network).sample(CONDITION)
    assert (made.sample(CONDITION) - plain).abs().max() > 1e-4
    monkeypatch.setattr(type(made.network), "null", None)
    monkeypatch.setattr(made, "null_condition", None)
    for off in (1, 1.0, GaussianProduct(1.0), LogLinear(1.0, annealed=True)):
        assert torch.equal(made.sample(CONDITION, guidance=off), plain)


def test_a_number_is_the_scale_of_the_rule_of_the_module():
    rule = LogLinear(4.0, annealed=True, temperature=0.7)
    made, plain = flow(guidance=rule), flow()
    assert torch.equal(made.sample(CONDITION), plain.sample(CONDITION, guidance=rule))
    other = LogLinear(2.0, annealed=True, temperature=0.7)
    assert torch.equal(made.sample(CONDITION, guidance=2.0), plain.sample(CONDITION, guidance=other))
    assert torch.equal(plain.sample(CONDITION, guidance=2.0), plain.sample(CONDITION, guidance=GaussianProduct(2.0)))
    with pytest.raises(ValueError, match="scale must be a finite number >= 1"):
        made.sample(CONDITION, guidance=0.5)


@pytest.mark.parametrize(
    ("made", "condition", "message"),
    [
        (flow, None, "needs a condition with one of"),
        (lambda: flow(gaussian()), None, "needs a network with a condition, or a temperature"),
        (flow, Condition(vector=torch.zeros(4, 2)), r"'vector', but STARFlow reads \['label'\]"),
        (flow, Condition(label=torch.tensor([3])), r"condition.label must lie in \[0, 3\)"),
    ],
)
def test_guidance_and_conditions_that_do_not_fit_are_errors(made, condition, message):
    with pytest.raises(ValueError, match=message):
        made().sample(condition, guidance=2.0)


def test_a_flow_without_condition_can_be_guided_by_a_temperature():
    made = flow(redrawn(tar(num_classes=None, label_dropout=0.0), std=0.25))
    guided = made.sample(n=2, guidance=LogLinear(2.0, temperature=0.5))
    assert (guided - made.sample(n=2)).abs().max() > 1e-4


# ---------------------------------------------------------------------- texts


def words(**options):
    torch.manual_seed(0)
    return WordEncoder(6, length=5, **options)


def written(**options):
    return flow(texts(), text=words(**options), guidance=GaussianProduct(2.0))


def test_guidance_is_against_the_null_prompt_in_the_template():
    made = written(template=PromptTemplate(aspect="1:1"))
    request = {"id": ["a"], "seed": torch.tensor([3]), "caption": ["two dogs"], "aspect": ["1:1"]}
    condition = made.condition_of(request)
    null = Condition(tokens=made.text.null(1, aspect=["1:1"]))
    expected = made.sample(condition, seeds=[3], null=null)
    assert torch.equal(made.predict_step(request, 0)["sample"], expected)
    other = made.sample(condition, seeds=[3], null=Condition(tokens=made.text.null(1, aspect=["21:9"])))
    assert (other - expected).abs().max() > 1e-6
    zeros = flow(made.network, guidance=made.guidance).sample(condition, seeds=[3])  # without a text encoder: zeros
    assert (zeros - expected).abs().max() > 1e-6


def test_absent_texts_are_the_null_prompt_in_densities_too():
    made, x = written(), data(2)
    condition = made.condition_of({"caption": ["a cat", "two dogs"]})
    empty = made.condition_of({"caption": ["a cat", ""]})
    lost = condition.absent("tokens", where=torch.tensor([False, True]))
    torch.testing.assert_close(made.log_prob(x, lost), made.log_prob(x, empty))
    assert (made.log_prob(x, condition) - made.log_prob(x, empty)).abs().max() > 1e-6


def test_a_text_encoder_must_fit_the_network():
    with pytest.raises(ValueError, match=r"text: STARFlow reads \['label'\], no tokens"):
        flow(star(), text=words())
    with pytest.raises(ValueError, match="text gives 4 tokens of 6 channels, but STARFlow has text_length=5"):
        flow(texts(), text=WordEncoder(6, length=4))


def test_aspect_requests_give_samples_of_the_size_of_their_bucket(tmp_path, quiet_trainer):
    made = flow(texts(input_size=8, text_length=5), text=words(template=PromptTemplate(aspect="1:1")))
    requests = Requests(prompts=["a cat", "a dog", "a bird"], aspect=["16:9", "1:1", "9:16"], seed=1, batch_size=2)
    found = quiet_trainer(inference_mode=False).predict(made, requests)
    shapes = {name: tuple(x.shape) for part in found for name, x in zip(part["id"], part["sample"], strict=True)}
    assert shapes == {"00000": (1, 6, 10), "00001": (1, 8, 8), "00002": (1, 10, 6)}
    assert [made.size_of(ratio) for ratio in ("16:9", "1:1", "9:16")] == [(6, 10), (8, 8), (10, 6)]
    with pytest.raises(ValueError, match="patches, those of the table"):
        flow(tar(num_classes=None, label_dropout=0.0)).sample(n=1, size=(6, 10))


# ---------------------------------------------------------------------- losses


def test_the_loss_is_the_objective_of_the_standardised_latent():
    made, noise = flow(std=0.3, penalty=1e-2, codec=Affine(4.0, 1.0)).eval(), StepNoise(1, 2)
    made.set_latent_statistics(torch.tensor([1.0]), torch.tensor([4.0]))
    given = batch(6)
    z = given["image"] + 0.3 * noise.normal("data_noise", given["image"])  # (4 x + 1 - 1) / 4
    found, label = made.losses(given, noise), Condition(label=given["label"])
    noisy, log_det, states = made.network(z, label, states=True)
    nats = normal_nats(noisy) + log_det
    penalty = sum(state.square().flatten(1).mean(1) for state in states)
    torch.testing.assert_close(found.logs["nll"], -nats / 16)
    torch.testing.assert_close(found.loss, -nats / 16 - 0.5 * math.log(2 * math.pi) + 1e-2 * penalty)
    assert not found.logs["nll"].requires_grad


@pytest.mark.parametrize("network", [tar, star])
def test_labels_are_dropped_in_training_alone_by_keyed_draws(network):
    made, seen = flow(network(label_dropout=0.5)), []
    made.network.register_forward_pre_hook(lambda part, given: seen.append(given[1].presence("label")))
    given = batch(60)
    for mode, step in ((True, 1), (True, 1), (True, 2), (False, 1)):
        made.train(mode).losses(given, StepNoise(0, step))
    first, again, other, whole = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.3 < first.float().mean() < 0.7
    assert whole.all()


def test_dropped_captions_are_the_null_prompt_in_training():
    made, seen = flow(texts(text_dropout=0.5), text=words()).train(), []
    made.network.register_forward_pre_hook(lambda part, given: seen.append(given[1].tokens.values))
    made.losses({"image": data(40), "caption": ["a cat"] * 40}, StepNoise(0))
    (cat,), (null,) = made.text.encode(["a cat"]).values, made.text.null(1).values
    kinds = [torch.equal(row, cat) + 2 * torch.equal(row, null) for row in seen[0]]
    assert set(kinds) == {1, 2}
    assert 8 < kinds.count(2) < 32


@pytest.mark.parametrize("network", [tar, star, texts])
def test_every_parameter_gets_a_gradient(network):
    made = flow(network(), text=words() if network is texts else None, penalty=1e-3).train()
    given = {**batch(12), "caption": ["a cat", "two dogs", "", "one"] * 3}
    made.losses(given, StepNoise(3)).loss.mean().backward()
    dead = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


# ---------------------------------------------------------------------- training


def correlated(n=4096):
    """Two pixels with deviations 0.5 and 0.8 and correlation 0.6, and the entropy of their law in nats."""
    covariance = torch.tensor([[0.25, 0.24], [0.24, 0.64]])
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) @ torch.linalg.cholesky(covariance).T
    entropy = math.log(2 * math.pi * math.e) + 0.5 * torch.logdet(covariance).item()
    return (0.3 + x).reshape(n, 1, 1, 2), entropy


class Keep(L.Callback):
    def __init__(self):
        self.nll = []

    def on_train_batch_end(self, trainer, module, *_):
        self.nll.append(trainer.callback_metrics["train/nll"].item())


@pytest.mark.parametrize("kind", [functools.partial(TARFlow, num_blocks=2), STARFlow], ids=["tarflow", "starflow"])
def test_training_reaches_the_entropy_of_a_gaussian(quiet_trainer, kind):
    x, entropy = correlated()
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 1, "hidden_size": 16, "head_size": 8}
    network = (
        TARFlow((1, 2), num_blocks=2, depth=1, **sizes)
        if kind == "tarflow"
        else STARFlow((1, 2), depth=(1, 1), **sizes)
    )
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    schedule = functools.partial(WarmupCosine, total_steps=200, warmup_steps=10)
    made = flow(network, std=0.0, optimizer=optimizer, lr_scheduler=schedule)
    loader = DataLoader([{"image": part} for part in x.split(256)], batch_size=None, shuffle=True)
    keep = Keep()
    quiet_trainer(max_steps=200, gradient_clip_val=1.0, callbacks=[keep]).fit(made, loader)
    with torch.no_grad():
        nats = -made.eval().log_prob(x).mean().item()
        samples = made.sample(n=2000, seed=1)
    assert keep.nll[0] * 2 > entropy + 0.2
    empirical = entropy + 0.02  # of a finite set of samples
    assert entropy - 0.03 < nats < empirical + 0.02
    assert 2 * sum(keep.nll[-16:]) / 16 == pytest.approx(nats, abs=0.03)
    torch.testing.assert_close(samples.flatten(1).T.cov(), x.flatten(1).T.cov(), rtol=0, atol=0.07)
    torch.testing.assert_close(samples.mean(0), x.mean(0), rtol=0, atol=0.07)


@pytest.mark.parametrize("network", [tar, star])
def test_scales_densities_and_losses_are_float32_in_16_bits(quiet_trainer, network):
    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, given, *_):
            with trainer.precision_plugin.forward_context():
                found = module.losses(given, StepNoise(1))
                z, log_det = module.network(module.latent_of(given), module.condition_of(given))
                nats = module.log_prob(given["image"], module.condition_of(given))
                drawn = module.draw(z, module.condition_of(given))
            self.values = {**found.logs, "loss": found.loss, "z": z, "log_det": log_det, "nats": nats, "x": drawn.x}

    looks = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        torch.manual_seed(0)
        looks[precision] = Look()
        loader = DataLoader([{name: value[i] for name, value in batch(6).items()} for i in range(6)], batch_size=6)
        quiet_trainer(max_steps=1, precision=precision, callbacks=[looks[precision]]).fit(flow(network()), loader)
    pairs = [(name, value) for bits in ("bf16-mixed", "bf16-true") for name, value in looks[bits].values.items()]
    for name, value in pairs:
        assert value.dtype == torch.float32, name
        exact = looks["32-true"].values[name]
        torch.testing.assert_close(value, exact, rtol=0.05, atol=0.1, msg=lambda text, n=name: f"{n}: {text}")


# ---------------------------------------------------------------------- weights and configs


def everything():
    made = flow(
        texts(soft_clip=3.0, qk_norm=True),
        text=words(),
        objective=MaximumLikelihood(GaussianNoise(0.3, weighted=True), latent_penalty=1e-4),
        guidance=LogLinear(2.0, annealed=True),
        method=PerBlock([Jacobi(segment=2), Sequential(), Jacobi(segment=4, refresh=True)]),
        denoise=0.9,
        standardize=2,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.003, betas=(0.9, 0.95)),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=10, warmup_steps=2),
    )
    made.set_latent_statistics(torch.tensor([0.3]), torch.tensor([0.7]))
    return made


@pytest.mark.parametrize("make", [flow, lambda: flow(preserving()), everything], ids=["plain", "volume", "everything"])
def test_what_was_saved_is_what_is_loaded_bit_for_bit(tmp_path, make):
    made = make()
    loaded = from_pretrained(made.save_pretrained(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert type(loaded) is NormalizingFlow
    assert config_of(loaded) == config_of(made) == config_of(build(config))
    state = loaded.state_dict()
    assert list(state) == list(made.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    condition = made.condition_of({"caption": ["a", "b"], "label": torch.tensor([0, 1])})
    assert torch.equal(loaded.sample(condition, seed=3), made.sample(condition, seed=3))


RECIPE = """
class_path: lightning_flows.modules.NormalizingFlow
init_args:
  network: {class_path: lightning_flows.networks.TARFlow, init_args: {input_size: 4, patch_size: 2, in_channels: 1,
    hidden_size: 8, head_size: 4, num_blocks: 2, depth: [1, 2], num_classes: 3, label_dropout: 0.1}}
  objective:
    class_path: lightning_flows.flow.MaximumLikelihood
    init_args: {data_noise: {class_path: lightning_flows.flow.Dequantization, init_args: {levels: 17}}}
  guidance: {class_path: lightning_flows.flow.LogLinear, init_args: {scale: 2.0, what: mean}}
  method:
    class_path: lightning_flows.networks.PerBlock
    init_args:
      methods:
        - {class_path: lightning_flows.networks.Sequential}
        - {class_path: lightning_flows.networks.Jacobi, init_args: {segment: 2}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002}}
"""


def test_python_and_the_command_line_make_one_config(tmp_path):
    sizes = {"patch_size": 2, "in_channels": 1, "hidden_size": 8, "head_size": 4, "num_blocks": 2}
    hand = NormalizingFlow(
        network=TARFlow(4, **sizes, depth=[1, 2], num_classes=3, label_dropout=0.1),
        objective=MaximumLikelihood(Dequantization(17)),
        guidance=LogLinear(2.0, what="mean"),
        method=PerBlock([Sequential(), Jacobi(segment=2)]),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.002),
    )
    command = by_command(tmp_path, yaml.safe_load(RECIPE))
    assert config_of(command) == config_of(hand)
    assert config_of(by_command(tmp_path, config_of(hand))) == config_of(hand)


@pytest.mark.parametrize(("network", "names"), [(tar, "class_embed"), (star, "proj_txt.weight")])
def test_another_number_of_classes_names_the_tensors(tmp_path, network, names):
    folder = flow(network()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{names} has shape .*reinit"):
        from_pretrained(folder, num_classes=7)
    loaded = from_pretrained(folder, num_classes=7, reinit=[f"*{names}"])
    assert loaded.sample(Condition(label=torch.tensor([6]))).shape == (1, 1, 4, 4)
    kept = {name: value for name, value in flow(network()).state_dict().items() if names not in name}
    assert kept
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in kept.items())


# ---------------------------------------------------------------------- evaluation


def images(folder, n=10):
    """Grey images of 4 x 4 pixels in 17 levels, in a file."""
    import numpy as np

    levels = torch.randint(0, 17, (n, 4, 4), generator=torch.Generator().manual_seed(0))
    np.savez(folder / "train.npz", images=(levels / 16).numpy(), labels=(torch.arange(n) % 3).numpy())
    np.savez(folder / "test.npz", images=(levels / 16).numpy(), labels=(torch.arange(n) % 3).numpy())
    options = {"layout": "NHW", "value_range": (0.0, 1.0), "batch_size": 4, "classes": ["a", "b", "c"]}
    return levels / 8 - 1, Arrays(str(folder), **options)


@pytest.mark.parametrize("network", [tar, star])
def test_bits_per_dim_of_the_trainer_are_those_by_hand(tmp_path, quiet_trainer, network):
    x, arrays = images(tmp_path)
    made = flow(network()).eval()
    evaluation = Evaluation([BitsPerDim(17)])
    quiet_trainer(inference_mode=False, callbacks=[evaluation]).test(made, arrays, verbose=False)
    noise = SampleNoise([key("evaluation", i) for i in range(10)])
    spread = dequantize(x[:, None].float(), 17, noise)
    nats = made.log_prob(spread, Condition(label=torch.arange(10) % 3))
    expected = ((-nats / 16 - math.log(2 / 17)) / math.log(2)).mean().item()
    entry = json.loads((tmp_path / "metrics.json").read_text())["test"]["values"]["bits_per_dim"]
    assert entry["value"] == pytest.approx(expected, rel=1e-5)
    assert entry["divergence"] == "Exact()"
    assert bits_per_dim(nats, 16, 17).mean().item() == pytest.approx(expected, rel=1e-5)


def test_both_families_give_one_number_for_one_density():
    """N(0, 0.5^2) of every pixel, by a flow in one pass and by an integration along the exact velocity."""
    x, values = dequantize(torch.linspace(-1, 1, 16).reshape(4, 1, 2, 2), 256, SampleNoise([1, 2, 3, 4])), {}
    families = {
        "normalizing flow": flow(gaussian(0.0, 0.5)),
        "flow matching": model(ToGaussian(0.5), solver=RK4(), steps=60),
    }
    for name, made in families.items():
        nats = made.log_prob(x).detach()
        torch.testing.assert_close(nats, log_normal(x, 0.0, 0.5), rtol=1e-4, atol=1e-3)
        values[name] = bits_per_dim(nats, made.density_dims(x), 256)
    torch.testing.assert_close(*values.values(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "network", [lambda: tar(input_size=8, num_classes=10), lambda: star(input_size=8, num_classes=10)]
)
def test_a_fit_validates_draws_averages_and_tests(tmp_path, quiet_trainer, network):
    made = flow(network(), std=0.1, denoise=1.0, standardize=1, optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))
    digits = Digits(batch_size=24, val_fraction=0.02, test_fraction=0.93)
    callbacks = [EMA(0.9), SampleGrid(labels=[0, 1, 2], n=3, every_n_epochs=1), Evaluation([BitsPerDim(17)])]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, inference_mode=False)
    trainer.fit(made, digits)
    assert (tmp_path / "samples").is_dir()
    assert made.latent_shift.abs().max() > 0.1  # digits are dark, and were measured
    for name in ("train/loss", "train/nll", "val/loss", "val/nll"):
        assert torch.isfinite(trainer.callback_metrics[name]), name
    gap = trainer.callback_metrics["val/nll"] - trainer.callback_metrics["val/loss"]
    assert gap.item() == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-4)
    small = Digits(batch_size=24, val_fraction=0.02, test_fraction=0.02)
    (scores,) = trainer.test(made, small, verbose=False)
    assert 0 < scores["test/bits_per_dim"] < 20
    (tail,) = quiet_trainer(inference_mode=False).predict(made, Requests(labels=[3, 1], seed=2))
    assert torch.equal(tail["sample"], made.sample(Condition(label=torch.tensor([3, 1])), seed=2))


def test_a_family_without_a_density_of_its_samples_says_so():
    with pytest.raises(ValueError, match="LatentFlowMatching does not know it"):
        model(Unconditional(), shape=(1, 4, 4)).sample(n=1, return_log_prob=True)
