"""Every example runs in a process of its own, at a reduced size, and what it prints makes sense."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import lightning_flows as lf
from lightning_flows.data import Digits
from lightning_flows.flow import SampleNoise, bits_per_dim, dequantize, seeds_from
from lightning_flows.networks import DiT, load_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    """Output of an example."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The first number after a pattern."""
    found = re.search(pattern + r" (-?[\d.]+)", text)
    assert found, text
    return float(found[1])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of an untrained model of digits: its velocity is exactly 0, so its density is the Gaussian."""
    torch.manual_seed(0)
    network = DiT(8, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10, label_dropout=0.1)
    return lf.LatentFlowMatching(network=network, steps=4).save_pretrained(tmp_path / "untrained")


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_finetuning_moves_samples_to_the_new_data_and_saves(model, tmp_path):
    out = run("finetune.py", str(model), "--steps", "40", "--out", str(tmp_path / "finetuned"))
    before, after, data = (number(word, out) for word in ("before", "after", "new data"))
    assert abs(after - data) < 0.7 * abs(before - data)
    changed = lf.from_pretrained(tmp_path / "finetuned")
    fresh = lf.from_pretrained(model)
    assert not torch.equal(changed.sample(n=1, seed=0), fresh.sample(n=1, seed=0))


def test_likelihood_of_an_untrained_model_is_that_of_the_gaussian(model):
    out = run("likelihood.py", str(model), "--n", "3", "--steps", "1")
    x = next(iter(Digits(batch_size=3).test_dataloader()))["image"]
    x = dequantize(x, 17, SampleNoise(seeds_from(0, 3))).flatten(1)
    nats = -0.5 * (x.square().sum(1) + 64 * math.log(2 * math.pi))
    expected = float(bits_per_dim(nats, 64, 17).mean())
    values = [float(value) for value in re.findall(r"([\d.]+) bits/dim", out)]
    assert values == pytest.approx([expected] * 3, abs=2e-4)


def test_checkerboard_samples_come_closer_to_the_data_than_noise():
    out = run("checkerboard.py", "--steps", "200")
    noise, samples, floor = (number(f"{name}:", out) for name in ("noise", "samples", "other data"))
    assert floor < samples < 0.7 * noise
    assert number("calls:", out) == 40


def test_own_network_is_refused_without_consent_and_comes_back_with_it():
    out = run("own_network.py", "--steps", "3")
    assert "refused: config.network: 'own_network.ConvNet' is not a class of lightning_flows" in out
    assert "same samples: True" in out


def test_inversion_loses_less_with_more_steps_and_changes_more_with_more_strength():
    out = run("inversion.py", "--n", "4", "--steps", "6")
    errors = [float(value) for value in re.findall(r"latent error ([\d.]+)", out)]
    changes = [float(value) for value in re.findall(r"changed by ([\d.]+)", out)]
    assert len(errors) == len(changes) == 3
    assert 0.1 > errors[0] > errors[1] > errors[2]
    assert changes[0] < changes[1] < changes[2]
    assert number("deviation", out) == pytest.approx(1, abs=0.15)
    assert number("off by", out) < 0.1


def test_lora_moves_samples_to_the_new_data_and_its_folder_gives_them_again(tmp_path):
    out = run("finetune_lora.py", "--steps", "25", "--rank", "4", "--out", str(tmp_path / "adapter"))
    samples, data = number("samples", out), number("new data", out)
    assert data > 0.3  # negatives; digits themselves lie near -0.4
    assert samples > 0
    assert "same samples: True" in out
    assert number("trained", out) < 0.06 * number("of", out)
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 200_000


def test_lora_on_pictures_of_ones_own_gets_a_table_for_their_classes(tmp_path):
    for i in range(6):
        file = tmp_path / "own" / ("light" if i % 2 else "dark") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 + 150 * (i % 2),) * 3).save(file)
    arguments = ("--data", str(tmp_path / "own"), "--steps", "2", "--out", str(tmp_path / "adapter"))
    assert "same samples: True" in run("finetune_lora.py", *arguments)
    model = lf.from_pretrained("lfm-digits", num_classes=2, reinit=["network.y_embedder.*"])
    load_adapter(model, tmp_path / "adapter")
    assert model.sample(lf.Condition(label=torch.tensor([0, 1])), seed=0).shape == (2, 1, 8, 8)


def test_a_new_class_is_learnt_beside_the_old_ones(tmp_path):
    out = run("new_class.py", "--steps", "40", "--replay", "8", "--out", str(tmp_path / "eleven"))
    after, before = number("off by", out), number("before the training by", out)
    assert after < 0.7 * before
    assert number("moved by", out) < before
    assert lf.from_pretrained(tmp_path / "eleven").network.y_embedder.num_classes == 11


def test_one_model_draws_segments_classifies_votes_and_edits(tmp_path):
    out = run("draw_and_read.py", str(tmp_path), "--steps", "150", "--n", "6")
    assert number("segmented:", out) > 0.9  # a sixth by chance, four fifths are background
    assert number("of five steps:", out) > 0.85
    assert number("of wrong ones", out) > number("of right pixels", out)
    assert number("edited:", out) > 0.4  # by chance a sixth
    assert number("back: off by", out) < 0.15
    for name, rows in (("drawn", 3), ("read", 4), ("edited", 3)):
        assert Image.open(tmp_path / f"{name}.png").size == (6 * 66 + 2, rows * 66 + 2)


def test_a_likelihood_tells_digits_apart_and_keeps_what_is_known(tmp_path):
    out = run("likelihood_uses.py", "--epochs", "4", "--n", "4", "--steps", "6", "--out", str(tmp_path / "uses.png"))
    assert number("classified", out) > 0.35  # by chance a tenth
    assert number("digits:", out) < number("upside down:", out) < number("negatives:", out)
    assert number("is changed by", out) == 0
    assert number("interpolation are off by", out) < 0.01
    assert len(re.findall(r"filled: accepted 0?[.\d]+", out)) == 3
    assert Image.open(tmp_path / "uses.png").size == (4 * 34 + 2, 6 * 34 + 2)
