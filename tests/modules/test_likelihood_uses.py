"""Classes, strangeness and interpolation by a likelihood, against the Gaussians that they are about."""

import math

import pytest
import torch

from lightning_flows.codecs import WordEncoder
from lightning_flows.flow import Condition, SampleNoise, seeds_from
from lightning_flows.modules import NormalizingFlow, slerp
from tests.modules.gaussian_flows import Halved, LinearFlow, Spread, data, flow
from tests.networks.tiny_flows import starflow, tarflow

PRIOR = [0.2, 0.0, 3.0]


def labels(*values):
    return Condition(label=torch.tensor(values))


def densities(network, x, count=3):
    """log p(x | y) of every class, (B, K)."""
    return torch.stack([network.log_prob(x, labels(*[k] * len(x))) for k in range(count)], 1)


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize("batch_size", [None, 1, 4, 100])
def test_posteriors_are_those_of_bayes_whatever_the_chunks(batch_size):
    made, x = flow(LinearFlow(3)), data()
    found = made.classify(x, prior=PRIOR, batch_size=batch_size)
    nats = densities(made.network, x)
    joint = nats.exp() * torch.tensor(PRIOR)
    torch.testing.assert_close(found.log_prob, nats, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores.exp(), joint / joint.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.label, joint.argmax(1))
    assert found.scores[:, 1].eq(-math.inf).all()
    assert found.label.dtype == torch.int64


def test_candidates_may_be_some_classes_in_any_order():
    made, x = flow(LinearFlow(4)), data(20)
    found = made.classify(x, candidates=[3, 0])
    nats = densities(made.network, x, 4)[:, [3, 0]]
    torch.testing.assert_close(found.log_prob, nats, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.label, torch.tensor([3, 0])[nats.argmax(1)])
    assert set(found.label.tolist()) == {0, 3}


def test_a_class_token_and_latent_statistics_are_counted():
    made = NormalizingFlow(network=starflow(num_classes=3))
    made.set_latent_statistics(torch.tensor([0.5, 0.0]), torch.tensor([2.0, 0.5]))
    x = data(2, shape=(2, 4, 6))
    found = made.classify(x)
    for k in range(3):
        torch.testing.assert_close(found.log_prob[:, k], made.log_prob(x, labels(k, k)), rtol=1e-5, atol=1e-4)


def test_captions_are_candidates_of_a_network_that_reads_tokens():
    made = NormalizingFlow(network=starflow(text_length=3, text_size=5), text=WordEncoder(5, length=3, buckets=7))
    captions, x = ["a cat", "a dog", "two dogs"], data(3, shape=(2, 4, 6))
    found = made.classify(x, candidates=captions, batch_size=2)
    for k, caption in enumerate(captions):
        tokens = made.text.encode([caption] * 3)
        torch.testing.assert_close(
            found.log_prob[:, k], made.log_prob(x, Condition(tokens=tokens)).detach(), rtol=1e-5, atol=1e-4
        )
    assert torch.equal(found.label, found.log_prob.argmax(1))
    assert (found.log_prob[:, 0] != found.log_prob[:, 1]).all()


def test_data_are_judged_as_they_are_in_eval_mode_without_gradients():
    made, x, seen = flow(LinearFlow(3), noise=0.5).train(), data().requires_grad_(), []
    found = made.classify(x, batch_size=4, progress=lambda *step: seen.append(step))
    torch.testing.assert_close(found.log_prob, densities(made.network, x).detach(), rtol=1e-4, atol=1e-4)
    assert not found.scores.requires_grad
    assert not any(made.network.modes)
    assert made.training
    assert seen == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_draws_of_a_posterior_are_keyed_by_the_sample():
    made, x = flow(LinearFlow(3), codec=Spread()), data(3, shape=(1, 4, 6))
    together = made.classify(x, seed=5).log_prob
    alone = made.classify(x[2:], seeds=seeds_from(5, 3)[2:]).log_prob
    torch.testing.assert_close(together[2:], alone)
    assert (together - made.classify(x, seed=6).log_prob).abs().min() > 1e-3


# ---------------------------------------------------------------------- strangeness


def test_strangeness_is_nats_per_dimension():
    made, x = flow(), data()
    torch.testing.assert_close(made.anomaly_score(x), -made.network.log_prob(x) / 6, rtol=1e-4, atol=1e-5)
    halved, large = flow(codec=Halved()), data(shape=(1, 4, 6))
    expected = -halved.network.log_prob(halved.codec.encode(large)) / 6  # of the latent, not of 24 pixels
    torch.testing.assert_close(halved.anomaly_score(large), expected, rtol=1e-4, atol=1e-5)


def test_without_a_condition_classes_are_summed_or_dropped():
    made, x = flow(LinearFlow(3)), data()
    nats, prior = densities(made.network, x), torch.tensor(PRIOR)
    mixture = torch.logsumexp(nats + (prior / prior.sum()).log(), 1)
    torch.testing.assert_close(made.anomaly_score(x, prior=PRIOR), -mixture / 6, rtol=1e-4, atol=1e-5)
    equal = torch.logsumexp(nats, 1) - math.log(3)
    torch.testing.assert_close(made.anomaly_score(x, batch_size=2), -equal / 6, rtol=1e-4, atol=1e-5)
    null = made.anomaly_score(x, marginal="null")
    torch.testing.assert_close(null, -made.network.log_prob(x) / 6, rtol=1e-4, atol=1e-5)
    own = made.anomaly_score(x, labels(2, 1, 0, 1, 2), batch_size=2)
    torch.testing.assert_close(own, -nats[range(5), [2, 1, 0, 1, 2]] / 6, rtol=1e-4, atol=1e-5)


def test_without_a_caption_it_is_the_null_prompt():
    made = NormalizingFlow(network=starflow(text_length=3, text_size=5), text=WordEncoder(5, length=3, buckets=7))
    x = data(2, shape=(2, 4, 6))
    null = made.log_prob(x, Condition(tokens=made.text.null(2))).detach()
    torch.testing.assert_close(made.anomaly_score(x), -null / 48, rtol=1e-5, atol=1e-5)


def test_typicality_is_the_distance_from_the_mean_of_the_reference():
    made, x = flow(), data()
    reference = made.anomaly_score(data(50, seed=1))
    expected = (made.anomaly_score(x) - reference.mean()).abs()
    for given in (reference, float(reference.double().mean()), reference.tolist()):
        found = made.anomaly_score(x, method="typicality", reference=given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mode = torch.zeros(1, 1, 2, 3)  # the likeliest point of all is not typical
    assert made.anomaly_score(mode) < reference.min()
    assert made.anomaly_score(mode, method="typicality", reference=reference) > expected.mean()


# ---------------------------------------------------------------------- interpolation


def test_ends_of_data_are_met_and_the_way_is_a_circle_in_z():
    made, x = flow(LinearFlow(3), noise=0.5), data(2)
    path = made.interpolate(x[0], x[1], 3, labels(0, 2))
    torch.testing.assert_close(path[[0, 2]], x, rtol=1e-4, atol=1e-5)
    z = made.network(x, labels(0, 2))[0]
    middle = made.network.draw(slerp(z[0], z[1], torch.tensor([0.5])), labels(0)).x
    torch.testing.assert_close(path[1:2], middle, rtol=1e-4, atol=1e-5)
    denoised = made.interpolate(x[0], x[1], 3, labels(0, 2), denoise=1.0)
    torch.testing.assert_close(denoised[[0, 2]], made.denoised(x, labels(0, 2)), rtol=1e-4, atol=1e-5)
    assert (denoised - path).abs().max() > 0.05


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_ends_of_seeds_are_their_samples(guidance):
    made = NormalizingFlow(network=tarflow(num_classes=3))
    path = made.interpolate(7, 9, 4, labels(1), guidance=guidance)
    ends = made.sample(labels(1, 1), seeds=[7, 9], guidance=guidance)
    torch.testing.assert_close(path[[0, 3]], ends, rtol=1e-4, atol=1e-4)


def test_data_and_seeds_meet_under_guidance_too():
    made, x = NormalizingFlow(network=tarflow(num_classes=3)), data(1, shape=(2, 4, 6))[0]
    path = made.interpolate(x, 9, 3, labels(1), guidance=2.0)
    torch.testing.assert_close(path[0], x, rtol=1e-3, atol=1e-3)
    end = made.sample(labels(1), seeds=[9], guidance=2.0, denoise=0.0)[0]
    torch.testing.assert_close(path[2], end, rtol=1e-4, atol=1e-4)
    assert (made.interpolate(x, 9, 3, labels(1))[1] - path[1]).abs().max() > 1e-3


def test_the_noise_of_a_sample_is_keyed_as_at_sampling():
    made = flow()
    z = SampleNoise([3, 4]).normal("source", torch.empty(2, 1, 2, 3))
    torch.testing.assert_close(made.interpolate(3, 4, 2), made.network.draw(z).x, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- errors

TEXTS = {"text_length": 3, "text_size": 5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: flow().classify(data()), "compares conditions, but LinearFlow reads none"),
        (lambda m: m.classify(data(), candidates=[0, 3]), r"different classes in \[0, 3\), got \[0, 3\]"),
        (lambda m: m.classify(data(), candidates=[1, 1]), "different classes"),
        (lambda m: m.classify(data(), candidates=[]), "different classes"),
        (lambda m: m.classify(data(), candidates=["a"]), "different classes"),
        (lambda m: m.classify(data(), prior=[1.0]), "prior must be 3 numbers"),
        (lambda m: m.classify(data(), prior=[1.0, -1.0, 1.0]), "prior must be 3 numbers"),
        (lambda m: m.classify(data(), prior=[0.0, 0.0, 0.0]), "prior must be 3 numbers"),
        (lambda m: m.classify(data(), candidates=[0, 1], prior=PRIOR), "prior must be 2 numbers"),
        (lambda m: m.classify(data(), batch_size=0), "batch_size must be at least 1"),
        (lambda m: m.classify(data(), seeds=[1]), "number of samples disagrees"),
        (lambda m: NormalizingFlow(network=starflow(**TEXTS)).classify(data()), "candidates must be captions"),
        (lambda m: NormalizingFlow(network=starflow(**TEXTS)).classify(data(), candidates=["a"]), "no text encoder"),
        (lambda m: m.anomaly_score(data(), method="odd"), "method must be one of"),
        (lambda m: m.anomaly_score(data(), method="typicality"), "reference .* goes with method='typicality'"),
        (lambda m: m.anomaly_score(data(), reference=1.0), "reference .* goes with method='typicality'"),
        (lambda m: m.anomaly_score(data(), method="typicality", reference=[]), "must be finite"),
        (lambda m: m.anomaly_score(data(), marginal="all"), "marginal must be one of"),
        (lambda m: m.anomaly_score(data(1), labels(0), marginal="null"), "there is one"),
        (lambda m: flow().anomaly_score(data(), marginal="classes"), "needs a network that reads labels"),
        (lambda m: m.anomaly_score(data(), prior=PRIOR, marginal="null"), "prior is that of classes"),
        (lambda m: m.anomaly_score(data(), labels(0)), "number of samples disagrees"),
        (lambda m: flow().anomaly_score(data(1), labels(0)), "'label', but LinearFlow reads no condition"),
        (lambda m: m.interpolate(1, 2, 1), "n must be at least 2"),
        (lambda m: m.interpolate(1, 2, 3, labels(0, 1, 2)), "batch size 1 .* or 2 .* got 3"),
        (lambda m: flow().interpolate(1, 2, 3, labels(0)), "'label', but LinearFlow reads no condition"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(flow(LinearFlow(3)))
