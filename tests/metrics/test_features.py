"""Extractors: names, types, and the absent extra."""

import pickle
import sys

import pytest
import torch
from torch import nn

from lightning_flows.metrics import Features, Frechet, Inception, InceptionScore, KernelDistance, Pixels


def test_pixels_are_the_values_themselves_in_float64():
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(Pixels()(x), x.flatten(1).double())


def test_a_wrapped_module_is_frozen_and_stays_in_evaluation_mode():
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Dropout(0.9))
    features = Features(net, "small")
    features.train()
    x = torch.randn(5, 2, 2, 2)
    assert torch.equal(features(x), features(x))
    assert not any(p.requires_grad for p in features.parameters())
    assert features(x).dtype == torch.float64


def test_a_function_may_be_the_extractor_and_feature_maps_are_flattened():
    features = Features(lambda x: x.mean(1, keepdim=True), "grey")
    assert features(torch.randn(3, 3, 4, 4)).shape == (3, 16)


def test_float64_data_reach_a_float32_network():
    assert Features(nn.Linear(4, 2), "linear")(torch.randn(3, 4, dtype=torch.float64)).shape == (3, 2)


def test_autocast_does_not_reach_the_extractor():
    net, x = nn.Linear(64, 8), torch.randn(4, 64)
    features = Features(net, "linear")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = features(x)
    assert torch.equal(inside, features(x))


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(4)])
def test_a_batch_needs_two_dimensions(x):
    with pytest.raises(ValueError, match="x must be a batch"):
        Pixels()(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_refused_with_the_extractor_named(bad):
    with pytest.raises(ValueError, match=r"x gives NaN or infinite pixels features"):
        Pixels()(torch.full((2, 3), bad))


@pytest.mark.parametrize(("module", "name"), [(3, "three"), (nn.Identity(), ""), (nn.Identity(), "inception")])
def test_features_refuses_what_cannot_be_an_extractor(module, name):
    with pytest.raises(ValueError, match="must be"):
        Features(module, name)


def test_standard_names_are_kept_for_the_standard_network():
    assert Frechet(Inception()).name == "fid"
    assert KernelDistance(Inception()).name == "kid"
    assert InceptionScore().name == "is"
    assert Frechet(Inception("spatial")).name == "sfid"
    assert KernelDistance(Inception("spatial")).name == "spatial_kernel[inception:spatial]"
    assert Frechet(Inception("logits_unbiased")).name == "frechet[inception:logits_unbiased]"
    assert InceptionScore(Inception("2048")).name == "inception_score[inception]"
    assert Frechet().name == "frechet[pixels]"
    assert KernelDistance(Features(nn.Identity(), "dinov2-s")).name == "kernel[dinov2-s]"


def test_without_torch_fidelity_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"lightning-flows\[metrics\]"):
        Frechet(Inception()).update(torch.zeros(2, 3, 8, 8), real=True)


@pytest.mark.parametrize("layer", ["1024", "pool"])
def test_an_unknown_layer_is_refused(layer):
    with pytest.raises(ValueError, match="layer must be one of"):
        Inception(layer)


def test_a_missing_weight_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights must be a file"):
        Inception(weights=str(tmp_path / "none.pth"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights of the right shapes: nothing is downloaded."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        blank = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(blank.state_dict(), file)
    return str(file)


def test_inception_runs_from_a_weight_file_and_another_checksum_changes_the_name(weights):
    extractor = Inception(weights=weights)
    grey = torch.rand(2, 1, 16, 16) * 2 - 1
    features = extractor(grey)
    assert features.shape == (2, 2048)
    assert features.dtype == torch.float64
    assert torch.equal(features, extractor(grey.expand(-1, 3, -1, -1)))
    assert extractor.name.startswith("inception-")
    assert Frechet(extractor).name.startswith("frechet[inception-")


def test_the_spatial_layer_is_the_beginning_of_mixed_6d_and_one_pass_gives_all_layers(weights):
    pooled, x = Inception(weights=weights), torch.rand(2, 3, 16, 16) * 2 - 1
    spatial, logits = pooled.companion("spatial"), pooled.companion("logits")
    for extractor in (pooled, spatial, logits):
        extractor.prepare()
    assert pooled.network is spatial.network is logits.network
    network, passes = pooled.network.network, []
    network.Mixed_6d.register_forward_hook(lambda module, args, output: passes.append(output))
    assert pooled(x).shape == (2, 2048)
    assert logits(x).shape == (2, 1008)
    assert torch.equal(spatial(x), passes[0][:, :7].flatten(1).double())  # of the whole block: its first branch
    assert spatial(x).shape == (2, 7 * 17 * 17)
    assert len(passes) == 1
    assert torch.allclose(Inception(weights=weights)(x.clone()), pooled(x), rtol=1e-5)
    assert Frechet(spatial).name == f"spatial_frechet[{spatial.name}]"
    alone = Inception("spatial", weights)
    alone.network = alone.load()
    assert torch.allclose(alone(x), spatial(x), rtol=1e-5)


def test_a_pickle_with_code_is_no_weight_file(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        Inception(weights=str(tmp_path / "module.pth"))(torch.zeros(1, 3, 8, 8))


def test_a_download_that_fails_names_the_ways_out(monkeypatch):
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(source, "load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError, match=r"--extractor\.weights FILE.*--extractor Pixels"):
        Inception("64").load()


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2


def test_metrics_of_one_extractor_share_its_work_until_the_tensor_changes():
    features = Features(Counted(), "twice")
    metrics = [Frechet(features), KernelDistance(features), InceptionScore(features)]
    x = torch.randn(6, 3)
    for metric in metrics:
        metric.update(x, real=False)
    assert features.module.calls == 1
    assert torch.equal(features(x), 2 * x.double())
    x.add_(1)
    assert torch.equal(features(x), 2 * x.double())
    y = torch.randn(6, 3)
    assert torch.equal(features(y), 2 * y.double())
    assert features.module.calls == 3
    with torch.inference_mode():  # such tensors do not tell that they changed
        z = torch.randn(6, 3)
        assert torch.equal(features(z), 2 * z.double())
        z.add_(1)
        assert torch.equal(features(z), 2 * z.double())
    assert torch.equal(pickle.loads(pickle.dumps(features))(y), features(y))


def test_small_pixels_are_means_of_cells():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Pixels(size=2)(x).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert Pixels(size=2).name == "pixels-2"
    with pytest.raises(ValueError, match="size must be at least 1"):
        Pixels(size=0)
    with pytest.raises(ValueError, match=r"x must be images \(B, C, H, W\)"):
        Pixels(size=2)(torch.zeros(2, 4))


def test_features_of_the_first_channels_keep_their_places():
    features = Features(nn.Identity(), "maps", channels=2)
    x = torch.randn(3, 5, 4, 4)
    assert torch.equal(features(x), x[:, :2].flatten(1).double())
    assert Frechet(features).name == "spatial_frechet[maps]"
    with pytest.raises(ValueError, match="channels=2 needs maps"):
        features(torch.randn(3, 1, 4, 4))
    with pytest.raises(ValueError, match="channels must be at least 1"):
        Features(nn.Identity(), "maps", channels=0)


def test_a_fingerprint_tells_weights_apart():
    one, other = Features(nn.Linear(2, 2), "net"), Features(nn.Linear(2, 2), "net")
    assert one.fingerprint() != other.fingerprint()
    other.module.load_state_dict(one.module.state_dict())
    assert one.fingerprint() == other.fingerprint()
    assert Pixels().fingerprint() == ""
