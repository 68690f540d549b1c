"""Bits per dimension of known densities, the budget of CPU time, and the baselines on small made-up images."""

import json
import math
import time
from itertools import islice

import numpy as np
import pytest
import torch

from benchmarks import baseline_flows, mnist_bits
from benchmarks.judges import cnn
from lightning_flows.flow import SampleNoise, dequantize, key
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import DiT
from tests.benchmarks.tiny import pictures

SMALL = baseline_flows.Settings("MAF", 2, (16, 16), {}, lr=1e-2, batch_size=16)


def levels_of(count, seed=0, side=4):
    """Grey stripes of a few widths with a little noise, (N, 1, side, side) in [-1, 1], of 256 values."""
    pixels, _ = pictures(count, seed)
    return pixels[..., :: 28 // side, :: 28 // side].float() / 127.5 - 1


def bits_of(images):
    return lambda log_prob: mnist_bits.score(log_prob, images).bits_per_dim


@pytest.fixture
def small():
    return mnist_bits.Images(levels_of(64), levels_of(20, seed=1), levels_of(30, seed=2))


# ------------------------------------------------------------------ the figure


def test_a_uniform_density_takes_eight_bits():
    found = mnist_bits.score(lambda x: torch.full((len(x),), -16 * math.log(2)), levels_of(10))
    assert found.bits_per_dim == pytest.approx(8, abs=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("level", [0, 100, 255])
def test_a_standard_normal_takes_what_the_formula_says(level):
    x = torch.full((200, 1, 4, 4), level / 127.5 - 1)
    found = mnist_bits.score(lambda x: torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3)), x)
    bin_, middle = 2 / 256, (level + 0.5) * 2 / 256 - 1
    nats = (middle**2 + bin_**2 / 12 + math.log(2 * math.pi)) / 2 - math.log(bin_)
    assert found.bits_per_dim == pytest.approx(nats / math.log(2), abs=1e-4)
    assert found.standard_error < 1e-4


def test_the_figure_depends_on_the_place_of_an_image_alone_and_on_no_batch(monkeypatch):
    x, seen = levels_of(7), []
    noise = SampleNoise([key("evaluation", i) for i in range(7)])
    for rows in (500, 3):
        monkeypatch.setattr(mnist_bits, "_ROWS", rows)
        mnist_bits.score(lambda x: seen.append(x) or x.sum((1, 2, 3)), x)
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert torch.equal(seen[0], dequantize(x, 256, noise))


def test_the_standard_error_is_that_of_the_mean():
    nats = torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = mnist_bits.score(lambda x: nats, levels_of(4))
    assert found.standard_error == pytest.approx(nats.std().item() / 2 / 16 / math.log(2))


# ------------------------------------------------------------------ the baselines


def test_the_affine_map_is_counted_in_the_density():
    class Normal(torch.nn.Module):
        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(16), torch.ones(16)), 1)

    generator = torch.Generator().manual_seed(0)
    shift, unit = torch.randn(16, generator=generator), 0.1 + torch.rand(16, generator=generator)
    x = torch.randn(5, 1, 4, 4, generator=generator)
    wanted = torch.distributions.Normal(shift, unit).log_prob(x.flatten(1)).sum(1)
    torch.testing.assert_close(baseline_flows.Standardized(Normal(), shift, unit).log_prob(x), wanted)


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_a_baseline_is_a_normalised_density_of_images(name):
    settings = baseline_flows.Settings(name, 2, (16,), {}, lr=1e-3)
    images = levels_of(40, side=2)[:, :, :1, 1:]  # one pixel, (40, 1, 1, 1)
    images = torch.cat([images, levels_of(40, side=2)[:, :, :1, :1]], -1)  # two pixels
    flow = baseline_flows.build(settings, images, 0)
    side = torch.linspace(-10, 10, 401)
    grid = torch.cartesian_prod(side, side) * flow.unit + flow.shift
    cell = (side[1] - side[0]) ** 2 * flow.unit.prod()
    with torch.no_grad():
        whole = flow.log_prob(grid.view(-1, 1, 1, 2)).double().exp().sum() * cell
    assert whole.item() == pytest.approx(1, abs=5e-3)


def test_units_are_those_of_the_pixels_or_of_the_image():
    x = torch.cat([torch.zeros(50, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(50, 1, 1, 1)])
    image = baseline_flows.build(SMALL._replace(units="image"), x, 0)
    assert torch.equal(image.unit, x.std().expand(2))
    assert torch.equal(image.shift, x.mean().expand(2))
    pixel = baseline_flows.build(SMALL._replace(units="pixel", least=0.2), x, 0)
    torch.testing.assert_close(pixel.unit, torch.tensor([0.2, x[..., 1].std().item()]))
    torch.testing.assert_close(pixel.shift, torch.tensor([0.0, 0.5]))


def test_weights_come_from_the_seed_and_global_numbers_stay():
    x, state = levels_of(40), torch.get_rng_state()
    first, again, other = (baseline_flows.build(SMALL, x, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(("width", "sees_all"), [(16, True), (12, False)])
def test_the_last_pixel_sees_all_others_where_no_layer_is_narrower_than_the_image(width, sees_all):
    flow = baseline_flows.build(SMALL._replace(transforms=1, hidden=(width, width)), levels_of(40), 0)
    x = torch.randn(200, 16, requires_grad=True)
    flow.flow.transform.transforms[0]()(x)[:, 15].sum().backward()
    assert bool((x.grad.abs().sum(0) > 0).all()) == sees_all


def test_the_published_baselines_are_wide_enough():
    assert all(min(settings.hidden) >= 784 for settings in baseline_flows.SETTINGS.values())


# ------------------------------------------------------------------ training


def test_time_that_is_stopped_does_not_count():
    clock = baseline_flows.Clock(100.0)
    with clock.stopped():
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    assert clock.used < 0.1
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert clock.used >= 0.1
    assert clock.share == pytest.approx(clock.used / 100, rel=0.1)


def test_an_epoch_has_each_image_once_and_the_next_another_order():
    rows = list(islice(baseline_flows.batches(10, 3, seed=0), 6))
    epochs = torch.cat(rows[:3]), torch.cat(rows[3:])
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(rows[4], list(islice(baseline_flows.batches(10, 3, seed=0), 6))[4])
    with pytest.raises(ValueError, match="batch_size=11 is more than the 10 training images"):
        next(baseline_flows.batches(10, 11, seed=0))


def test_the_rate_rises_to_its_height_and_falls_to_nothing():
    settings = SMALL._replace(lr=1.0, warmup=0.1)
    rates = [baseline_flows.rate(share / 100, settings) for share in range(101)]
    assert 0 < rates[0] < 0.05
    assert max(rates) == pytest.approx(1)
    assert rates.index(max(rates)) == 10
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert baseline_flows.rate(1.2, settings) == pytest.approx(0)


@pytest.mark.parametrize(("flow", "options"), [("MAF", {}), ("NSF", {"bins": 4})])
def test_a_baseline_learns_within_its_budget_and_holds_its_best_weights(small, flow, options):
    settings = SMALL._replace(flow=flow, options=options)
    model = baseline_flows.build(settings, small.train, 0)
    before = mnist_bits.score(model.log_prob, small.held_out).bits_per_dim
    found = baseline_flows.fit(model, small.train, bits_of(small.held_out), settings, 1.5, 0)
    after = mnist_bits.score(model.log_prob, small.held_out).bits_per_dim
    assert after == pytest.approx(found["held_out_bits_per_dim"], rel=1e-6)
    assert after == pytest.approx(min(bits for _, bits in found["looks"]), rel=1e-6)
    assert after < before - 0.3
    assert 1.5 <= found["cpu_seconds"] < 3
    assert found["epochs"] == found["steps"] * 16 / 64
    assert found["skipped_steps"] == 0


def test_the_best_of_all_looks_is_kept():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nats = torch.nn.Parameter(torch.zeros(()))

        def log_prob(self, x):
            return self.nats.expand(len(x))

    model, best = Fixed(), baseline_flows.Best(bits_of(levels_of(4)))
    for nats in (1.0, 3.0, math.nan, 2.0):
        torch.nn.init.constant_(model.nats, nats)
        best.look(model, 0.5)
    assert best.state["nats"].item() == 3
    assert [bits is None for _, bits in best.looks] == [False, False, True, False]
    assert best.bits == best.looks[1][1]


def test_a_step_without_a_finite_gradient_is_left_out(small):
    model = baseline_flows.build(SMALL, small.train, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not baseline_flows.step(model, optimizer, torch.full((2, 1, 4, 4), torch.inf), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert baseline_flows.step(model, optimizer, small.train, 1.0)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_training_without_a_finite_figure_is_an_error(small):
    model = baseline_flows.build(SMALL, small.train, 0)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(RuntimeError, match="no finite bits/dim"):
        baseline_flows.fit(model, small.train, bits_of(small.held_out), SMALL, 0.05, 0)


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch, small, tmp_path):
    """Runs the command on small images and gives the file it writes."""
    monkeypatch.setattr(mnist_bits, "mnist", lambda: small)
    monkeypatch.setitem(baseline_flows.SETTINGS, "maf", SMALL)
    threads = str(torch.get_num_threads())

    def run(*args):
        file = tmp_path / "figures.json"
        monkeypatch.setattr("sys.argv", ["mnist_bits", *args, "--threads", threads, "--out", str(file)])
        mnist_bits.main()
        return json.loads(file.read_text())

    return run


def test_the_command_writes_what_a_figure_needs(command, capsys):
    found = command("maf", "--cpu-seconds", "0.5", "--seed", "3", "--lr", "2e-2", "--transforms", "3")
    assert f"{found['test']['bits_per_dim']:.4f} bits/dim of 30 test images" in capsys.readouterr().out
    assert (found["model"], found["seed"], found["settings"]["lr"]) == ("maf", 3, 2e-2)
    assert found["versions"].keys() == {"lightning-flows", "torch", "zuko"}
    assert found["parameters"] == 3 * (16 * 16 + 16 + 16 * 16 + 16 + 16 * 32 + 32)
    assert found["training"]["steps"] >= 1
    assert found["training"]["images_per_cpu_second"] > 0


def test_a_model_of_ours_is_scored_by_the_same_function(command, small, tmp_path):
    network = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2)
    folder = LatentFlowMatching(network=network, steps=1).save_pretrained(tmp_path / "flow")
    found = command("tarflow", "--weights", str(folder))
    model = LatentFlowMatching.from_pretrained(folder)
    assert found["test"]["bits_per_dim"] == mnist_bits.score(model.log_prob, small.test).bits_per_dim
    assert found["weights"] == "flow"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_weights_go_with_ours_and_only_with_ours(command, capsys):
    for args in (("tarflow",), ("maf", "--weights", "somewhere")):
        with pytest.raises(SystemExit):
            command(*args)
        assert "--weights goes with tarflow" in capsys.readouterr().err


def test_a_density_that_is_not_finite_gives_no_figure(small):
    model = baseline_flows.build(SMALL, small.train, 0)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(RuntimeError, match="bits/dim of the 30 test images is nan"):
        mnist_bits.figures(model, small.test, ("torch",))


def test_the_splits_are_apart_and_the_test_is_the_whole_file(monkeypatch, tmp_path):
    (tmp_path / "mnist").mkdir()
    for name, start, count in (("train-00", 0, 70), ("train-01", 70, 50), ("test", 120, 8)):
        each = np.arange(start, start + count, dtype=np.uint8)  # every image has a grey level of its own
        images = np.broadcast_to(each[:, None, None], (count, 28, 28))
        np.savez(tmp_path / f"mnist/{name}.npz", images=images, labels=each % 10)
    monkeypatch.setenv(cnn.DATA, str(tmp_path))
    found = mnist_bits.mnist()
    assert [tuple(part.shape) for part in found] == [(118, 1, 28, 28), (2, 1, 28, 28), (8, 1, 28, 28)]
    seen = [((part[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for part in found]
    assert sorted(seen[0] + seen[1]) == list(range(120))
    assert seen[2] == list(range(120, 128))
