"""AutoencoderKL over an autoencoder that was trained with this package: a folder, a zoo id, a name on the Hub."""

import json
import shutil

import pytest
import torch

from lightning_flows.codecs import AutoencoderKL, KLNetwork
from lightning_flows.flow.noise import SampleNoise
from lightning_flows.store import config_of, save_folder

OPTIONS = {
    "latent_channels": 2,
    "channels": (4, 4),
    "layers": 1,
    "norm_groups": 2,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return KLNetwork(**OPTIONS).eval()


def save(folder, network, class_path="lightning_flows.modules.KLAutoencoder"):
    config = {"class_path": class_path, "init_args": {"network": config_of(network), "other": 1.0}}
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    save_folder(folder, config, {**tensors, "discriminator.weight": torch.zeros(2)})
    return folder


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_folder_of_ours_encodes_and_decodes_with_the_trained_network(network, x, tmp_path):
    codec, noise = AutoencoderKL(str(save(tmp_path / "ours", network))), SampleNoise([1, 2])
    with torch.no_grad():
        mean, log_variance = network.encode_moments(x)
        drawn = mean + (0.5 * log_variance).exp() * noise.normal("posterior", like=mean)
        torch.testing.assert_close(codec.encode(x, noise), (drawn - 0.1) * 0.5)
        torch.testing.assert_close(codec.decode((mean - 0.1) * 0.5), network.decode(mean))
    assert not any(p.requires_grad or p.is_meta for p in codec.network().parameters())
    assert not codec.network().training


def test_settings_need_neither_weights_nor_random_numbers(network, x, tmp_path):
    folder = save(tmp_path / "ours", network)
    (folder / "model.safetensors").unlink()
    state = torch.get_rng_state()
    codec = AutoencoderKL(str(folder))
    assert (codec.scale, codec.shift, codec.latent_shape((3, 8, 8))) == (0.5, 0.1, (2, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        codec.encode(x)


def test_zoo_id_and_an_existing_folder_of_that_name_first(network, x, tmp_path, monkeypatch):
    save(tmp_path / "zoo" / "kl-tiny", network)
    monkeypatch.setenv("LIGHTNING_FLOWS_ZOO", str(tmp_path / "zoo"))
    codec = AutoencoderKL("kl-tiny")
    assert codec.decode(codec.encode(x)).shape == x.shape
    torch.manual_seed(5)
    other = save(tmp_path / "kl-tiny", KLNetwork(**OPTIONS))
    monkeypatch.chdir(other.parent)
    assert not torch.allclose(AutoencoderKL("kl-tiny").encode(x), codec.encode(x))
    with pytest.raises(ValueError, match="leads to no folder"):
        AutoencoderKL("kl-unknown").latent_shape((3, 8, 8))


def test_hub_name_is_ours_or_diffusers_by_its_config(network, x, tmp_path, monkeypatch):
    import diffusers
    import huggingface_hub

    ours = save(tmp_path / "ours", network)
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "load_config", lambda repo, **_: json.loads((ours / "config.json").read_text())
    )
    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: fetched.append(repo) or str(ours))
    codec = AutoencoderKL("org/name@abc")
    assert codec.latent_shape((3, 8, 8)) == (2, 4, 4)
    assert fetched == []
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(x), (network.encode_moments(x)[0] - 0.1) * 0.5)
    assert fetched == ["org/name"]


def test_models_that_are_no_autoencoder_and_foreign_classes_are_refused(network, x, tmp_path):
    folder = save(tmp_path / "ours", network)
    config = json.loads((folder / "config.json").read_text())
    for path in ("lightning_flows.networks.DiT", "os.system"):
        config["init_args"]["network"]["class_path"] = path
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is no KL autoencoder"):
            AutoencoderKL(str(folder)).encode(x)
    shutil.rmtree(folder)
    save(folder, KLNetwork(**{**OPTIONS, "layers": 2}))
    (folder / "config.json").write_text(json.dumps({"class_path": "x", "init_args": {"network": config_of(network)}}))
    with pytest.raises(ValueError, match="do not fit KLNetwork"):
        AutoencoderKL(str(folder)).encode(x)
