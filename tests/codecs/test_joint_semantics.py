"""Semantic codecs made of others."""

import pytest
import torch
from torch import nn

from lightning_flows.codecs import (
    AutoencoderKL,
    ClassPlane,
    Identity,
    JointSemantics,
    KLNetwork,
    LearnedColours,
    OneHot,
    RGBPalette,
    SemanticCodec,
    ThroughAutoencoder,
)
from lightning_flows.codecs.base import Codec, Posterior
from lightning_flows.flow.noise import SampleNoise
from lightning_flows.store import build, config_of, save_folder

MASK = (torch.arange(2 * 8 * 8) % 19).reshape(2, 8, 8)
LABEL = torch.tensor([3, 9])


class Blocks(Codec):
    """An autoencoder without loss: 2 x 2 pixels become channels."""

    def posterior(self, x):
        mean = nn.functional.pixel_unshuffle(x, 2)
        return Posterior(mean, torch.ones_like(mean))

    def decode(self, z):
        return nn.functional.pixel_shuffle(z, 2)

    def latent_shape(self, shape):
        return (shape[0] * 4, shape[1] // 2, shape[2] // 2)


def joint():
    return JointSemantics([RGBPalette("celebamask-hq", beta=10.0), ClassPlane(10)])


def test_parts_lie_behind_each_other_and_are_read_apart():
    codec, noise = joint(), SampleNoise([1, 2])
    fields = {"mask": MASK, "label": LABEL, "image": torch.zeros(2, 3, 8, 8)}
    y = codec.encode(fields, (8, 8), noise)
    assert (codec.keys, codec.channels, codec.num_classes) == (("mask", "label"), 4, {"mask": 19, "label": 10})
    assert torch.equal(y, torch.cat([part.encode(fields, (8, 8), noise) for part in codec.parts], 1))
    read = codec.decode(y)
    assert torch.equal(read["mask"].labels, MASK)
    assert torch.equal(read["label"].labels, LABEL)
    assert codec.decode(y, (16, 16))["mask"].labels.shape == (2, 16, 16)


def test_extra_losses_are_added():
    y, fields = torch.randn(2, 6, 8, 8), {"mask": MASK, "label": LABEL}
    parts = [LearnedColours(19), LearnedColours(10, per="image")]
    both = JointSemantics(parts)
    wanted = parts[0].extra_loss(y[:, :3], fields) + parts[1].extra_loss(y[:, 3:], fields)
    torch.testing.assert_close(both.extra_loss(y, fields), wanted)
    assert joint().extra_loss(torch.zeros(2, 4, 8, 8), fields) is None
    one = JointSemantics([parts[0], ClassPlane(10)])
    torch.testing.assert_close(one.extra_loss(y[:, :4], fields), parts[0].extra_loss(y[:, :3], fields))


def test_a_joint_codec_trains_and_saves_its_parts():
    codec = JointSemantics([LearnedColours(19), ClassPlane(10)])
    assert list(codec.state_dict()) == ["parts.0.anchors"]
    assert config_of(build(config_of(codec), SemanticCodec)) == config_of(codec)


def test_the_wrong_number_of_planes_is_named():
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\), got .*\(2, 3, 8, 8\)"):
        joint().decode(torch.zeros(2, 3, 8, 8))


# ---- through an autoencoder


def test_a_mask_goes_through_the_autoencoder_as_a_picture():
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), Blocks())
    noise = SampleNoise([1, 2])
    y = codec.encode({"mask": MASK}, (4, 4), noise)
    picture = codec.semantic.encode({"mask": MASK}, (8, 8), noise)  # dequantised before, and no draw of the posterior
    assert torch.equal(y, nn.functional.pixel_unshuffle(picture, 2))
    assert (codec.channels, codec.keys, codec.num_classes) == (12, ("mask",), {"mask": 19})
    read = codec.decode(y)["mask"]
    assert torch.equal(read.labels, MASK)
    assert codec.decode(y, (16, 16))["mask"].labels.shape == (2, 16, 16)


class Nowhere(Blocks):
    """An autoencoder that cannot be asked yet."""

    def latent_shape(self, shape):
        raise OSError("offline")


def test_given_channels_spare_a_look_at_the_autoencoder():
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), Nowhere(), channels=12)
    assert codec.channels == 12
    assert codec.layout == {"mask": slice(0, 12)}
    with pytest.raises(OSError, match="offline"):
        ThroughAutoencoder(RGBPalette("celebamask-hq"), Nowhere()).channels  # noqa: B018


@pytest.mark.parametrize(
    "use", [lambda c: c.encode({"mask": MASK}, (4, 4)), lambda c: c.decode(torch.zeros(1, 4, 4, 4))]
)
def test_given_channels_are_checked_when_the_autoencoder_is_used(use):
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), Blocks(), channels=4)
    with pytest.raises(ValueError, match="channels must be 12, those of the autoencoder's latent, got 4"):
        use(codec)
    with pytest.raises(ValueError, match="channels must be at least 1 or None, got 0"):
        ThroughAutoencoder(RGBPalette("celebamask-hq"), Blocks(), channels=0)


def test_given_channels_are_part_of_the_config():
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), AutoencoderKL("somebody/autoencoder"), channels=4)
    again = build(config_of(codec), SemanticCodec)
    assert (again.channels, config_of(again)["init_args"]["channels"]) == (4, 4)


def test_the_size_must_be_that_of_the_latent():
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), Blocks())
    with pytest.raises(ValueError, match=r"size must be \(4, 4\), the latent of masks of size \(8, 8\), got \(8, 8\)"):
        codec.encode({"mask": MASK}, (8, 8))
    with pytest.raises(ValueError, match="allowed are 0 to 18"):
        codec.encode({"mask": MASK + 1}, (4, 4))
    with pytest.raises(ValueError, match=r"\(B, 12, h, w\)"):
        codec.decode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("semantic", [ClassPlane(10), LearnedColours(5)], ids=["label", "trained"])
def test_only_fixed_codes_of_masks_are_pictures(semantic):
    with pytest.raises(ValueError, match="semantic must be a fixed code of masks, got"):
        ThroughAutoencoder(semantic, Identity())


def test_the_frozen_autoencoder_is_no_part_of_the_model(tmp_path):
    torch.manual_seed(0)
    network = KLNetwork(latent_channels=2, channels=(4, 4), layers=1, norm_groups=2, scaling_factor=0.5)
    config = {"class_path": "lightning_flows.modules.KLAutoencoder", "init_args": {"network": config_of(network)}}
    save_folder(tmp_path / "ae", config, {f"network.{name}": value for name, value in network.state_dict().items()})
    codec = ThroughAutoencoder(RGBPalette("celebamask-hq"), AutoencoderKL(str(tmp_path / "ae")))
    y = codec.encode({"mask": MASK}, (4, 4), SampleNoise([1, 2]))
    assert y.shape == (2, codec.channels, 4, 4)
    with torch.no_grad():
        wanted = (
            0.5 * network.eval().encode_moments(codec.semantic.encode({"mask": MASK}, (8, 8), SampleNoise([1, 2])))[0]
        )
    torch.testing.assert_close(y, wanted)  # the mode, though the codec draws for images
    assert codec.decode(y)["mask"].labels.shape == (2, 8, 8)
    assert not codec.state_dict()
    assert not list(codec.parameters())
    again = build(config_of(codec), SemanticCodec)
    assert config_of(again) == config_of(codec)
    assert torch.equal(again.encode({"mask": MASK}, (4, 4), SampleNoise([1, 2])), y)


def test_one_hot_planes_need_an_autoencoder_of_as_many_channels():
    codec = ThroughAutoencoder(OneHot(3), Blocks())
    mask = MASK % 3
    assert torch.equal(codec.decode(codec.encode({"mask": mask}, (4, 4)))["mask"].labels, mask)
