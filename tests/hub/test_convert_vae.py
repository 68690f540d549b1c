"""Autoencoders of diffusers in and out."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from lightning_flows import from_pretrained
from lightning_flows.cli import dispatch
from lightning_flows.codecs import KLNetwork
from lightning_flows.hub.convert import convert
from lightning_flows.modules import KLAutoencoder


@pytest.fixture
def ours(tmp_path):
    network = KLNetwork(in_channels=1, latent_channels=2, channels=(4, 8), layers=1, norm_groups=2)
    return KLAutoencoder(network=network).save_pretrained(tmp_path / "ours")


def test_out_and_back(tmp_path, ours):
    x = torch.rand(2, 1, 8, 8)
    folder = convert("to-diffusers-vae", ours, tmp_path / "out", scaling_factor=0.5)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae").eval()
    assert folder.name == "vae"
    assert theirs.config.scaling_factor == 0.5
    model = from_pretrained(ours)
    assert torch.allclose(theirs.encode(x).latent_dist.mean, model.encode(x), atol=1e-6)
    for name in ("out", "out/vae", "out/vae/diffusion_pytorch_model.safetensors"):
        back = convert("diffusers-vae", tmp_path / name, tmp_path / "back")
        assert torch.equal(from_pretrained(back).reconstruct(x), model.reconstruct(x))
    card = (tmp_path / "back/README.md").read_text()
    assert "licence is that of the original weights" in card
    assert "tags: [autoencoder, diffusers-vae]" in card
    assert "model.encode(images)" in card
    assert "model.sample" not in card


def test_both_folders_may_be_one(tmp_path, ours):
    before = json.loads((ours / "config.json").read_text())
    convert("to-diffusers-vae", ours, ours)
    assert json.loads((ours / "config.json").read_text()) == before
    assert json.loads((ours / "vae/config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", "model.safetensors", "vae"]


def test_from_the_command_line(tmp_path, ours, capsys):
    dispatch(["convert", "to-diffusers-vae", str(ours), str(tmp_path / "out"), "--scaling_factor=2.0"])
    assert AutoencoderKL.from_pretrained(tmp_path / "out/vae").config.scaling_factor == 2.0
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format", "options", "word"),
    [
        ("diffusers-vae", {}, r"it needs config\.json"),
        ("to-diffusers-vae", {"scaling_factor": -1.0}, "scaling_factor must be positive"),
        ("diffusers-vae", {"num_heads": 2}, "num_heads"),
    ],
)
def test_mistakes_are_named(tmp_path, format, options, word):
    with pytest.raises(ValueError, match=word):
        convert(format, tmp_path, tmp_path / "out", **options)


def test_a_flow_is_no_autoencoder(tmp_path):
    with pytest.raises(ValueError, match="KLAutoencoder"):
        convert("to-diffusers-vae", "lfm-digits", tmp_path / "out")
