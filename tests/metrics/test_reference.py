"""Statistics in a file stand for real items, and are refused where they do not fit."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_flows.metrics import (
    PRDC,
    Features,
    Frechet,
    InceptionScore,
    KernelDistance,
    Pixels,
    SlicedWasserstein,
    collect,
    save_references,
    standard,
)

METRICS = {
    Frechet: {},
    KernelDistance: {"subsets": 3, "subset_size": 20},
    PRDC: {"nearest": 3},
    SlicedWasserstein: {"directions": 8},
}


class Maps(Features):
    """A small network with feature maps and logits."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)), "maps")

    def companion(self, kind):
        return Features(self.module[0], "maps:spatial", channels=2) if kind == "spatial" else self


@pytest.fixture
def images():
    return torch.randn(2, 40, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path, images):
    parts = collect(images[0].split(16), Pixels(), features=True)
    about = {"split": "train", "data": '{"class_path": "a.Own"}'}
    return str(save_references(tmp_path / "new" / "s.safetensors", parts, **about))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_a_metric_with_a_reference_gives_the_value_of_one_that_saw_the_items(metric, images, file):
    live, stored = metric(**METRICS[metric]), metric(**METRICS[metric], reference=file)
    for part in images[0].split(16):
        live.update(part, real=True)
    stored.update(torch.full((9, 3, 4, 4), 3.0), real=True)  # ignored
    for part in images[1].split(16):
        live.update(part, real=False)
        stored.update(part, real=False)
    one, other = live.compute(), stored.compute()
    for key in one if isinstance(one, dict) else [...]:
        assert torch.equal(one[key], other[key])
    assert not stored.needs_real
    assert live.needs_real
    about = stored.settings()["reference"]
    assert about == {"file": "s.safetensors", "count": 40, "split": "train", "data": "Own"}
    assert "reference" not in live.settings()


def test_only_the_whole_file_is_left(file, tmp_path):
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.safetensors"]
    with safe_open(file, framework="pt") as stored:
        assert stored.get_tensor("mean").dtype == stored.get_tensor("covariance").dtype == torch.float64
        assert stored.get_tensor("features").dtype == torch.float32  # loses nothing of float32 images
        assert stored.metadata()["count"] == "40"


def test_float64_features_that_float32_would_round_are_kept(tmp_path, images):
    file = save_references(tmp_path / "s", collect([images[0].double() * (1 + 1e-12)], Pixels(), features=True))
    with safe_open(file, framework="pt") as stored:
        assert stored.get_tensor("features").dtype == torch.float64


def test_items_of_another_shape_are_refused(file):
    with pytest.raises(ValueError, match=r"is of items \(3, 4, 4\), the samples are \(1, 6, 8\)"):
        Frechet(reference=file).update(torch.zeros(2, 1, 6, 8), real=False)  # as many values


def test_another_extractor_or_other_weights_are_refused(tmp_path, images, file):
    with pytest.raises(ValueError, match="is of 'pixels', not of 'pixels-2'"):
        Frechet(Pixels(size=2), reference=file)
    one, other = (Features(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "net") for _ in range(2))
    saved = save_references(tmp_path / "net", collect([images[0]], one))
    assert Frechet(one, str(saved)).reference.count == 40
    with pytest.raises(ValueError, match="computed with other weights of 'net'"):
        Frechet(other, str(saved))


def test_metrics_of_all_features_need_them_in_the_file(tmp_path, images):
    saved = str(save_references(tmp_path / "s", collect([images[0]], Pixels())))
    with pytest.raises(ValueError, match="holds no features, which prdc needs"):
        PRDC(reference=saved)
    assert [metric.name for metric in standard(reference=saved)] == ["frechet[pixels]"]


def test_two_extractors_for_one_place_are_refused(tmp_path, images):
    parts = [*collect([images[0]], Pixels()), *collect([images[0]], Pixels(size=2))]
    with pytest.raises(ValueError, match="'pixels-2' does not fit"):
        save_references(tmp_path / "s", parts)
    assert not list(tmp_path.iterdir())


def test_the_standard_set_of_a_network_with_maps_and_classes(tmp_path, images):
    metrics = standard(Maps())
    names = ["frechet[maps]", "spatial_frechet[maps:spatial]", "kernel[maps]", "prdc[maps]", "inception_score[maps]"]
    assert [metric.name for metric in metrics] == names
    file = str(save_references(tmp_path / "s", collect(images[0].split(16), Maps(), features=True)))
    again = standard(Maps(), reference=file)
    assert [metric.name for metric in again] == names
    for live, stored in zip(metrics[:2], again[:2], strict=True):
        live.update(images[0], real=True)
        for metric in (live, stored):
            metric.update(images[1], real=False)
        assert torch.allclose(live.compute(), stored.compute(), rtol=1e-9)
    assert not any(metric.needs_real for metric in again)


def test_the_standard_set_of_inception_has_the_standard_names():
    from lightning_flows.metrics import Inception

    metrics = standard(Inception(), nearest=3)
    assert [metric.name for metric in metrics] == ["fid", "sfid", "kid", "prdc[inception]", "is"]
    assert metrics[3].nearest == 3


def test_what_is_needed_says_when_a_value_is_no_measurement(images):
    frechet = Frechet()
    frechet.update(images[0], real=False)
    assert frechet.needed == 49
    assert KernelDistance(subset_size=7).needed == 7
    assert PRDC(nearest=3).needed == 60
    assert "60 of each are needed" in PRDC(nearest=3).caution(59, 80)
    assert InceptionScore().needed == 5000
