"""Networks of timm as extractors, with random weights from a file."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_flows.metrics import Frechet, InceptionScore, Timm

timm = pytest.importorskip("timm")
MODEL = "test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in timm.create_model(MODEL).state_dict().items()}, file)
    return str(file)


def test_layers_are_those_of_timm_and_one_pass_gives_them_all(weights):
    pooled = Timm(MODEL, weights=weights)
    extractors = [pooled, pooled.companion("spatial"), pooled.companion("logits")]
    for extractor in extractors:
        extractor.prepare()
    network, calls = pooled.network.network, []
    network.conv1.register_forward_hook(lambda *_: calls.append(1))
    settings = network.pretrained_cfg
    side = settings["input_size"][-1]
    x = torch.rand(2, 3, side, side).mul(255).round() / 127.5 - 1  # 8-bit values at the network's size
    features = [extractor(x) for extractor in extractors]
    assert len(calls) == 1
    mean, std = (torch.tensor(settings[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    hidden = network.forward_features(((x + 1) / 2 - mean) / std)
    assert torch.allclose(features[0], network.forward_head(hidden, pre_logits=True).double(), atol=1e-5)
    assert torch.allclose(features[2], network.forward_head(hidden).double(), atol=1e-5)
    assert features[2].shape == (2, 1000)
    maps = network.layer3(network.layer2(network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(
        ((x + 1) / 2 - mean) / std
    )))))))  # fmt: skip
    assert torch.allclose(features[1], maps[:, :7].flatten(1).double(), atol=1e-5)


def test_names_carry_the_weights_and_values_are_not_called_standard(weights):
    extractor = Timm(MODEL, weights=weights)
    assert extractor.name.startswith(f"{MODEL}-")
    assert Frechet(extractor).name == f"frechet[{extractor.name}]"
    assert Frechet(extractor.companion("spatial")).name == f"spatial_frechet[{extractor.name}:spatial]"
    assert InceptionScore(extractor.companion("logits")).name == f"inception_score[{extractor.name}:logits]"


def test_grey_images_of_any_size_go_in(weights):
    extractor = Timm(MODEL, weights=weights)
    grey = torch.rand(2, 1, 20, 20) * 2 - 1
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1).contiguous()))
    with pytest.raises(ValueError, match=r"x must be images \(B, 1 or 3"):
        extractor(torch.zeros(2, 2, 8, 8))


def test_loading_leaves_the_random_state_alone(weights):
    before = torch.random.get_rng_state()
    Timm(MODEL, weights=weights, channels=3).prepare()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_cannot_be_fetched_name_the_way_out(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*--extractor\.weights FILE"):
        Timm(MODEL).prepare()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": "resnet1000"}, r"model must be a name of timm"),
        ({"model": MODEL, "layer": "mixed"}, "layer must be one of"),
        ({"model": MODEL, "weights": "none"}, "weights must be a file"),
        ({"model": MODEL, "channels": 0}, "channels must be at least 1"),
        ({"model": "vit_small_patch14_dinov2.lvd142m", "layer": "logits"}, "has no classes"),
    ],
)
def test_wrong_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Timm(**options)


def test_a_network_without_classes_has_no_logits():
    assert Timm("vit_small_patch14_dinov2.lvd142m").companion("logits") is None
