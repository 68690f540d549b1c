"""The autoencoder's network: it is diffusers', with the contract of a trainable one."""

import pytest
import torch
from diffusers import AutoencoderKL

from lightning_flows.codecs import KLNetwork
from lightning_flows.store import build, check, config_of

SMALL = {"in_channels": 1, "latent_channels": 2, "channels": (4, 8), "layers": 1, "norm_groups": 2}


def small(**changed):
    return KLNetwork(**(SMALL | changed))


def test_it_computes_what_diffusers_computes(tmp_path):
    network, x = small(scaling_factor=0.5).eval(), torch.randn(2, 1, 8, 8)
    network.save_diffusers(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    mean, log_variance = network.encode_moments(x)
    posterior = theirs.encode(x).latent_dist
    assert torch.allclose(mean, posterior.mean, atol=1e-6)
    assert torch.allclose(log_variance, posterior.logvar, atol=1e-6)
    assert torch.allclose(network.decode(mean), theirs.decode(mean).sample, atol=1e-6)
    assert theirs.config.scaling_factor == 0.5


@pytest.mark.parametrize("quant_conv", [True, False])
def test_diffusers_and_back_changes_nothing(tmp_path, quant_conv):
    network = small(quant_conv=quant_conv, attention=not quant_conv)
    network.save_diffusers(tmp_path, scaling_factor=0.25)
    again = KLNetwork.from_diffusers(tmp_path)
    assert again.settings == network.settings | {"scaling_factor": 0.25}
    state = network.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_latent_shape_is_that_of_the_latent():
    network = small()
    mean, _ = network.encode_moments(torch.randn(3, 1, 12, 8))
    assert mean.shape[1:] == network.latent_shape((1, 12, 8)) == (2, 6, 4)


def test_log_variance_is_clamped():
    network = small()
    torch.nn.init.constant_(network.kl.quant_conv.bias, 1e3)
    assert network.encode_moments(torch.zeros(1, 1, 8, 8))[1].max() == 20


def test_config_builds_the_same_network():
    config = config_of(small())
    check(config)
    assert config_of(build(config)) == config


def test_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = KLNetwork(in_channels=3)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"channels": (4, 7)}, "norm_groups=2"),
        ({"channels": ()}, "channels"),
        ({"layers": 0}, "layers"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
    ],
)
def test_bad_arguments_are_named(changed, word):
    with pytest.raises(ValueError, match=word):
        small(**changed)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match=r"multiples of 2, got \(1, 9, 8\)"):
        small().encode_moments(torch.zeros(1, 1, 9, 8))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("act_fn", "relu"), ("down_block_types", ["AttnDownEncoderBlock2D"]), ("out_channels", 5)],
)
def test_other_architectures_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        KLNetwork.from_settings(small().settings | {setting: value})


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        KLNetwork.from_diffusers(tmp_path)
