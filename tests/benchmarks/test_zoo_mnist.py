"""Scores of the zoo's models of MNIST, on made-up digits, an untrained judge and flows of a few numbers."""

import json
import math

import pytest
import torch

from benchmarks import mnist_bits, zoo_flows, zoo_mnist
from benchmarks.judges import mnist_cnn
from lightning_flows.flow import Dequantization, GaussianNoise, MaximumLikelihood
from lightning_flows.hub import figures
from lightning_flows.modules import LatentFlowMatching, NormalizingFlow
from lightning_flows.networks import DiT
from tests.benchmarks.tiny import SIZES, flow, images

TEST = mnist_cnn.Real(*images(30, seed=1))


@pytest.fixture
def judge(monkeypatch):
    """An untrained network in the judge's place."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = mnist_cnn.Judge(mnist_cnn.Network().eval(), 0.99, "digest")
    monkeypatch.setattr(mnist_cnn, "trained", lambda: found)
    return found


# ------------------------------------------------------------------ both ways


@pytest.mark.parametrize("noise", [GaussianNoise(0.1), Dequantization()])
def test_a_flow_is_inverted_below_the_bars(noise, monkeypatch):
    found = zoo_flows.invertibility(flow(noise), *TEST)
    assert 0 < found["inverse_error"]["value"] < 1e-4
    assert 0 <= found["log_det_error"]["value"] < 1e-6
    assert zoo_flows.missed(found) == []
    monkeypatch.setattr(zoo_flows, "_ROWS", 7)
    again = zoo_flows.invertibility(flow(noise), *TEST)
    assert again["inverse_error"]["value"] == pytest.approx(found["inverse_error"]["value"], rel=2)


def test_an_inverse_that_is_wrong_misses_its_bars(monkeypatch):
    right = NormalizingFlow.draw

    def wrong(self, *args, **options):
        drawn = right(self, *args, **options)
        return drawn._replace(x=drawn.x + 0.01, log_det=drawn.log_det + 7.84)

    monkeypatch.setattr(NormalizingFlow, "draw", wrong)
    found = zoo_flows.invertibility(flow(), *TEST)
    assert found["inverse_error"]["value"] == pytest.approx(0.01, rel=1e-2)
    assert found["log_det_error"]["value"] == pytest.approx(0.01, rel=1e-2)  # nats per dimension
    assert len(zoo_flows.missed(found)) == 2
    assert zoo_flows.missed({"x": {"value": math.nan, "bar": 1.0}}) == ["x is nan, at most 1 is allowed"]


def test_noise_is_that_of_the_training_and_of_the_place_of_an_image():
    model = flow(GaussianNoise(0.5))
    found = zoo_flows.noisy(model, TEST.images, "purpose")
    assert (found - TEST.images).std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(found[3:], zoo_flows.noisy(model, TEST.images[3:], "purpose", first=3))
    assert not torch.equal(found, zoo_flows.noisy(model, TEST.images, "other"))


# ------------------------------------------------------------------ densities


def test_classes_are_those_of_the_largest_density():
    model = flow()
    rows = [model.log_prob(TEST.images, mnist_cnn_label(y)) for y in range(10)]
    likeliest = torch.stack(rows, 1).argmax(1)
    found = zoo_flows.classification(model, TEST.images, likeliest)
    assert found["likelihood_accuracy"]["value"] == 1
    assert found["likelihood_accuracy"]["real"] == 30
    wrong = zoo_flows.classification(model, TEST.images, (likeliest + 1) % 10)
    assert wrong["likelihood_accuracy"]["value"] == 0


def mnist_cnn_label(label):
    return flow().condition_of({"label": torch.full((30,), label)})


def test_bits_are_those_of_the_benchmark_and_the_first_figure_of_the_entry():
    model = flow(Dequantization(), num_classes=None)
    blocks = zoo_mnist.blocks_of(model, images(60)[0], TEST, {}, per_class=2)
    assert list(blocks) == ["likelihood", "invertibility"]
    wanted = mnist_bits.score(model.log_prob, TEST.images)
    entry = blocks["likelihood"]["bits_per_dim"]
    assert (entry["value"], entry["standard_error"]) == (wanted.bits_per_dim, wanted.standard_error)
    assert (entry["real"], entry["levels"], entry["data"]) == (30, 256, "MNIST")
    assert blocks["likelihood"]["finite_samples"]["value"] == 1
    first = figures({name: {"values": values} for name, values in blocks.items()})[0]
    assert (first.name, first.value) == ("bits_per_dim", wanted.bits_per_dim)


def test_samples_that_run_away_are_counted(monkeypatch):
    model = flow(Dequantization(), num_classes=None)
    drawn = torch.zeros(8, 1, 28, 28)
    drawn[0, 0, 3, 3], drawn[5, 0, 0, 0] = math.nan, math.inf
    monkeypatch.setattr(NormalizingFlow, "sample", lambda self, **options: drawn)
    assert zoo_flows.finite_samples(model, 8, 0)["finite_samples"]["value"] == 0.75


def test_bits_of_other_levels_are_refused():
    with pytest.raises(ValueError, match="those of 256 levels"):
        zoo_mnist.bits(flow(Dequantization(16)), TEST.images)


# ------------------------------------------------------------------ all blocks


def test_a_conditional_flow_gets_every_block_that_applies(judge):
    blocks = zoo_mnist.blocks_of(flow(), images(60)[0], TEST, {"guidance": 2.0}, per_class=2)
    assert list(blocks) == ["mnist", "mnist_unguided", "mnist_noisy", "classification", "invertibility"]
    whole, noisy = blocks["mnist"], blocks["mnist_noisy"]["cnn_accuracy"]
    assert list(whole)[1:3] == ["frechet_ratio[mnist-cnn]", "prdc[mnist-cnn]"]
    assert (whole["cnn_accuracy"]["denoise"], whole["cnn_accuracy"]["nfe"]) == (1, 2)
    assert (noisy["denoise"], noisy["nfe"], noisy["guidance_scale"], noisy["samples"]) == (0, 1, 2, 20)
    assert "mnist_noisy" not in zoo_mnist.blocks_of(flow(), images(60)[0], TEST, {"denoise": 0.0}, per_class=2)


def test_a_flow_matching_model_is_judged_alone(judge):
    model = LatentFlowMatching(network=DiT(**SIZES, num_classes=10), steps=1)
    assert list(zoo_mnist.blocks_of(model, images(60)[0], TEST, {}, per_class=2)) == ["mnist"]


def test_the_command_writes_the_blocks_and_ends_with_status_1_where_a_bar_is_missed(
    judge, monkeypatch, tmp_path, capsys
):
    splits = {"train": mnist_cnn.Real(*images(60)), "test": TEST}
    monkeypatch.setattr(mnist_cnn, "digits", splits.__getitem__)
    objective = MaximumLikelihood(Dequantization())
    model = NormalizingFlow(network=flow(num_classes=None).network, objective=objective)
    folder, file = model.save_pretrained(tmp_path / "flow"), tmp_path / "metrics.json"
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["zoo_mnist", str(folder), "--metrics", str(file), "--threads", threads])
    zoo_mnist.main()
    assert list(json.loads(file.read_text())) == ["likelihood", "invertibility"]
    assert "| bits_per_dim |" in capsys.readouterr().out
    monkeypatch.setattr(zoo_flows, "MOST_ERROR", 0.0)
    with pytest.raises(SystemExit):
        zoo_mnist.main()
    assert "MISSED: inverse_error is" in capsys.readouterr().out
