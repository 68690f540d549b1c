"""The deep compression autoencoder: deterministic, and otherwise a frozen codec like the other."""

import pytest
import torch

from lightning_flows.codecs import AutoencoderDC, AutoencoderKL
from lightning_flows.flow.noise import SampleNoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import diffusers

    torch.manual_seed(0)
    network = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
        upsample_block_type="interpolate", downsample_block_type="conv",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dc")
    network.save_pretrained(path)
    return path


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_and_decode_follow_diffusers(folder, x):
    import diffusers

    codec, network = AutoencoderDC(str(folder)), diffusers.AutoencoderDC.from_pretrained(folder).eval()
    with torch.no_grad():
        latent = network.encode(x).latent
        torch.testing.assert_close(codec.encode(x), latent * 0.4)
        torch.testing.assert_close(codec.decode(latent * 0.4), network.decode(latent).sample)
    assert codec.latent_shape((3, 16, 8)) == tuple(codec.encode(x).shape[1:]) == (4, 4, 2)


def test_posterior_is_a_point(folder, x):
    codec = AutoencoderDC(str(folder), scale=2.0, shift=0.5)
    mean, std = codec.posterior(x)
    assert std is None
    assert torch.equal(codec.encode(x, SampleNoise([1, 2])), mean)
    torch.testing.assert_close(mean, (AutoencoderDC(str(folder), scale=1.0).encode(x) - 0.5) * 2)


def test_network_is_frozen_and_shared_by_name(folder, x):
    codec = AutoencoderDC(str(folder))
    codec.encode(x)
    assert not any(p.requires_grad for p in codec.network().parameters())
    assert not codec.network().training
    expected = {"repo": str(folder), "subfolder": None, "revision": None, "scale": None, "shift": None}
    assert codec.config == {"class_path": "lightning_flows.codecs.AutoencoderDC", "init_args": expected}
    with pytest.raises(ValueError, match="H and W multiples of 4"):
        codec.encode(x[..., :6])


def test_posterior_of_the_gaussian_autoencoder_is_what_encode_draws_from(x, tmp_path):
    import diffusers

    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path)  # fmt: skip
    codec, mode = AutoencoderKL(str(tmp_path)), AutoencoderKL(str(tmp_path), posterior="mode")
    noise = SampleNoise([3, 4])
    mean, std = codec.posterior(x)
    assert std.shape == mean.shape
    assert std.min() > 0
    torch.testing.assert_close(codec.encode(x, noise), mean + std * noise.normal("posterior", like=mean))
    assert torch.equal(codec.draw(codec.posterior(x), noise), codec.encode(x, noise))
    assert torch.equal(mode.draw(mode.posterior(x), noise), mode.encode(x, noise))
    torch.testing.assert_close(mode.encode(x, noise), mean)
