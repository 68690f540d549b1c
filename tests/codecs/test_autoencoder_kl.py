"""The frozen autoencoder: diffusers' convention, never trained, never registered, never written."""

import copy
import pickle

import huggingface_hub
import pytest
import torch
from torch import nn

from lightning_flows.codecs import AutoencoderKL, Codec, Identity
from lightning_flows.flow.noise import SampleNoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import diffusers

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, latent_channels=2,
        norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vae")
    network.save_pretrained(path / "inner")
    return path


@pytest.fixture
def codec(folder):
    return AutoencoderKL(str(folder), subfolder="inner")


@pytest.fixture
def x():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_and_decode_follow_the_convention_of_diffusers(codec, folder, x):
    import diffusers

    network = diffusers.AutoencoderKL.from_pretrained(folder / "inner").eval()
    with torch.no_grad():
        posterior = network.encode(x).latent_dist
        z = (posterior.mean - 0.1) * 0.5
        torch.testing.assert_close(codec.encode(x), z)
        torch.testing.assert_close(codec.decode(z), network.decode(posterior.mean).sample)
        noise = SampleNoise([1, 2, 3])
        drawn = (posterior.mean + posterior.std * noise.normal("posterior", like=posterior.mean) - 0.1) * 0.5
        torch.testing.assert_close(codec.encode(x, noise), drawn)
        assert not torch.allclose(drawn, z)


def test_scale_shift_and_mode_can_be_given(folder, x):
    codec = AutoencoderKL(str(folder / "inner"), scale=2.0, shift=-1.0, posterior="mode")
    plain = AutoencoderKL(str(folder / "inner"), scale=1.0, shift=0.0)
    torch.testing.assert_close(codec.encode(x, SampleNoise([1, 2, 3])), (plain.encode(x) + 1) * 2)
    torch.testing.assert_close(codec.decode(codec.encode(x)), plain.decode(plain.encode(x)))


def test_draws_of_the_posterior_are_keyed_and_leave_the_global_stream_alone(codec, x):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    whole = codec.encode(x, SampleNoise([1, 2, 3]))
    torch.testing.assert_close(codec.encode(x[1:2], SampleNoise([2])), whole[1:2])
    a, b = (codec.encode(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, whole)
    assert torch.equal(torch.rand(2), expected)


def test_latent_shape_is_that_of_the_latent_and_needs_no_weights(codec, folder, x, tmp_path):
    assert codec.latent_shape((3, 16, 16)) == tuple(codec.encode(x).shape[1:]) == (2, 8, 8)
    (tmp_path / "config.json").write_text((folder / "inner" / "config.json").read_text())
    assert AutoencoderKL(str(tmp_path)).latent_shape((3, 16, 32)) == (2, 8, 16)


@pytest.mark.parametrize("shape", [(3, 15, 16), (1, 16, 16)])
def test_images_that_cannot_be_halved_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"shape must be \(3, H, W\) with H and W multiples of 2"):
        codec.latent_shape(shape)
    with pytest.raises(ValueError, match="shape must be"):
        codec.encode(torch.zeros(1, *shape))


def test_network_is_frozen_evaluated_and_no_submodule(codec, x):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.codec = codec
            self.layer = nn.Linear(1, 1)

    holder = Holder()
    codec.encode(x)
    holder.train()
    assert set(holder.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(holder.modules())) == 2
    assert not codec.network().training
    assert not any(p.requires_grad for p in codec.network().parameters())
    assert not isinstance(codec, nn.Module)


def test_decode_is_differentiable_in_z(codec, x):
    z = codec.encode(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(codec.decode(z).square().sum(), z)
    assert gradient.abs().min() > 0
    with torch.no_grad():
        assert not codec.decode(z).requires_grad
    assert not codec.encode(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_leave_float32_inside(codec, x, dtype):
    z = codec.encode(x)
    image = codec.decode(z)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(codec.encode(x), z)
        assert torch.equal(codec.decode(z), image)
    assert codec.encode(x.to(dtype)).dtype == codec.decode(z.to(dtype)).dtype == torch.float32


def test_weights_load_at_first_use_only(folder, monkeypatch, x):
    import diffusers

    calls = []
    load = diffusers.AutoencoderKL.from_pretrained
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", lambda *a, **k: calls.append(k) or load(*a, **k))
    codec = AutoencoderKL(str(folder), subfolder="inner")
    assert codec.scale == 0.5
    assert calls == []
    codec.encode(x)
    codec.decode(codec.encode(x))
    assert len(calls) == 1
    assert calls[0]["use_safetensors"] is True


@pytest.mark.parametrize("use", [lambda codec: codec.settings, lambda codec: codec.network()])
def test_an_autoencoder_that_is_nowhere_is_named_with_a_way_out(tmp_path, monkeypatch, use):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # its variable is read once, at import
    (tmp_path / "empty").mkdir()
    for repo in (str(tmp_path / "empty"), "nobody/nothing"):
        with pytest.raises(ValueError, match=r"autoencoder '.*' of the codec cannot be loaded.*--model\.init_args"):
            use(AutoencoderKL(repo))


def test_copies_share_the_network_and_pickles_leave_it_out(codec, x):
    z = codec.encode(x)
    assert copy.deepcopy(codec).network() is codec.network()
    assert copy.deepcopy({"a": codec})["a"].config == codec.config
    written = pickle.dumps(codec)
    assert len(written) < 5000
    again = pickle.loads(written)
    assert again.config == codec.config
    torch.testing.assert_close(again.encode(x), z)


def test_config_names_the_weights_and_nothing_else(codec, folder):
    codec.network()
    expected = {
        "repo": str(folder), "subfolder": "inner", "revision": None, "scale": None, "shift": None,
        "posterior": "sample",
    }  # fmt: skip
    assert codec.config == {"class_path": "lightning_flows.codecs.AutoencoderKL", "init_args": expected}


def test_revision_is_read_from_the_reference():
    assert (AutoencoderKL("org/name@abc").repo, AutoencoderKL("org/name@abc").revision) == ("org/name", "abc")
    assert AutoencoderKL("org/name", revision="abc").revision == "abc"
    with pytest.raises(ValueError, match="revision='x' contradicts repo='org/name@abc'"):
        AutoencoderKL("org/name@abc", revision="x")


@pytest.mark.parametrize("wrong", [{"posterior": "mean"}, {"scale": 0.0}, {"scale": -1.0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoencoderKL("org/name", **wrong)


def test_identity_is_the_identity(x):
    codec = Identity()
    assert isinstance(codec, Codec)
    assert codec.encode(x) is x
    assert codec.decode(x) is x
    assert codec.latent_shape((3, 16, 16)) == (3, 16, 16)
    assert codec.config == {"class_path": "lightning_flows.codecs.Identity", "init_args": {}}
    with pytest.raises(TypeError, match="abstract"):
        Codec()
