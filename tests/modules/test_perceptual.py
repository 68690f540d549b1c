"""The perceptual distance: its formula on a network known by heart, and timm's networks."""

import copy

import pytest
import torch
from torch import nn

from lightning_flows.modules import Perceptual, TimmFeatures
from lightning_flows.store import Recorded, build, check, config_of
from tests.modules.tiny import Maps


class Two(Recorded, nn.Module):
    """Two maps of known values."""

    def forward(self, x):
        return [torch.cat([x, 2 * x + 1], 1), torch.cat([x[..., ::2, ::2], torch.ones_like(x[..., ::2, ::2])], 1)]


def test_the_distance_is_that_of_unit_vectors():
    x, y = torch.randn(2, 3, 1, 4, 4).unbind(0)
    total = 0
    for a, b in zip(Two()(x), Two()(y), strict=True):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        total = total + (a - b).square().sum(1).mean((1, 2))
    distance = Perceptual(Two())
    assert torch.allclose(distance(x, y), total / 2, atol=1e-5)
    assert torch.allclose(distance(x, x), torch.zeros(3))


def test_gradients_reach_the_images_and_not_the_network():
    distance, x = Perceptual(Maps()), torch.randn(2, 1, 8, 8, requires_grad=True)
    distance(x, torch.zeros(2, 1, 8, 8)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.network().parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_any_timm_network_will_do(channels):
    features = TimmFeatures("resnet18", layers=[0, 1], pretrained=False)
    distance, x = Perceptual(features), torch.randn(2, channels, 32, 32)
    values = distance(x, x.flip(-1))
    assert values.shape == (2,)
    assert (values > 0).all()
    assert len(distance.network()(x)) == 2


def test_the_same_timm_network_from_a_file(tmp_path):
    import timm

    torch.manual_seed(3)
    source = timm.create_model("resnet18", features_only=True, out_indices=(0,))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    first = TimmFeatures("resnet18", layers=[0], checkpoint=str(tmp_path / "weights.pth")).build()
    second = TimmFeatures("resnet18", layers=[0], checkpoint=str(tmp_path / "weights.pth")).build()
    a, b = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not torch.equal(a["network.conv1.weight"], source.state_dict()["conv1.weight"])


def test_a_copy_shares_the_network():
    distance = Perceptual(Maps())
    assert copy.deepcopy(distance).network() is distance.network()


def test_config_and_errors(tmp_path):
    config = config_of(Perceptual(TimmFeatures("vgg16", layers=[0, 1], pretrained=False), weight=0.5))
    check(config)
    assert config_of(build(config)) == config
    with pytest.raises(ValueError, match="weight must not be negative"):
        Perceptual(Maps(), weight=-1)
    with pytest.raises(ValueError, match=r"none\.pth does not exist"):
        TimmFeatures("vgg16", checkpoint=str(tmp_path / "none.pth"))
