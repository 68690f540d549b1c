"""The fixed planes by their formulas, and what becomes of a mean of two codes."""

import itertools

import pytest
import torch

from lightning_flows.codecs import AnalogBits, ClassPlane, OneHot, RGBPalette


def label_of(codec, mean):
    return codec.decode(mean[None, :, None, None])["label"].labels.item()


def test_one_hot_is_one_plane_for_each_class():
    y = OneHot(3).encode({"mask": torch.tensor([[[0, 2]]])}, (1, 2))
    assert y[0, :, 0].T.tolist() == [[1, -1, -1], [-1, -1, 1]]


def test_bits_are_the_binary_digits():
    y = AnalogBits(6, per="image").encode({"label": torch.tensor([0, 4, 5, 3])}, (1, 1))
    assert y[:, :, 0, 0].tolist() == [[-1, -1, -1], [1, -1, -1], [1, -1, 1], [-1, 1, 1]]
    assert [AnalogBits(count, per="image").channels for count in (2, 3, 4, 5, 172, 256, 257)] == [1, 2, 2, 3, 8, 8, 9]


def test_bits_are_read_by_their_signs():
    codec = AnalogBits(8, per="image")
    for bits in itertools.product((-0.1, 0.7), repeat=3):
        assert label_of(codec, torch.tensor(bits)) == int("".join("1" if b > 0 else "0" for b in bits), 2)


def test_patterns_of_bits_without_a_class_are_never_read():
    codec = AnalogBits(5)  # 101, 110 and 111 are no classes
    y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2
    labels, scores = codec.decode(y)["mask"]
    assert scores.shape[1] == 5
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert label_of(AnalogBits(5, per="image"), torch.tensor([1.0, 0.5, 0.1])) == 4  # signs 111: 100 is nearest
    assert label_of(AnalogBits(5, per="image"), torch.tensor([0.1, 1.0, 1.0])) == 3


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_a_mean_of_two_one_hot_codes_is_never_a_third_class(weight):
    codec = OneHot(10, per="image")
    y = codec.encode({"label": torch.arange(10)}, (2, 2))
    for a, b in itertools.permutations(range(10), 2):
        labels, scores = codec.decode(weight * y[a : a + 1] + (1 - weight) * y[b : b + 1])["label"]
        assert labels.item() in (a, b)
        assert labels.item() == (a if weight > 0.5 else b) or weight == 0.5
        assert scores[0, [a, b]].sum() > 0.5


def test_the_ordinal_plane_reads_a_2_or_an_8_as_a_5():
    codec = ClassPlane(10)
    y = codec.encode({"label": torch.tensor([2, 8])}, (4, 4)).mean(0, keepdim=True)
    assert codec.decode(y)["label"].labels.tolist() == [5]
    assert codec.heights(y).item() == pytest.approx(5)


def test_colours_have_the_same_trap():
    codec = RGBPalette([(0, 0, 0), (100, 100, 100), (200, 200, 200)])
    mask = torch.tensor([[[0, 2], [2, 0]]])
    assert codec.decode(codec.encode({"mask": mask}, (1, 1)))["mask"].labels.item() == 1
    one_hot = OneHot(3)
    assert one_hot.decode(one_hot.encode({"mask": mask}, (1, 1)))["mask"].labels.item() in (0, 2)


def test_colours_are_clamped_before_they_are_read():
    codec = RGBPalette([(255, 100, 0), (128, 255, 0)])
    outside = torch.tensor([3.0, 1.0, -1.0])[None, :, None, None]  # nearer to the first; (1, 1, -1) is to the second
    assert codec.decode(outside)["mask"].labels.item() == 1


def test_the_class_plane_is_clamped_to_the_classes():
    codec = ClassPlane(10, beta=4.0)
    y = torch.tensor([-9.0, -2.2, -1.8, 1.7, 2.5, 1e30])[:, None, None, None]
    assert codec.decode(y)["label"].labels.tolist() == [0, 0, 0, 8, 9, 9]


def test_scores_of_one_hot_planes_are_the_rates_of_the_classes_in_a_mean():
    codec, rates = OneHot(4, per="image"), torch.tensor([[0.6, 0.3, 0.1, 0.0]])
    each = codec.encode({"label": torch.arange(4)}, (2, 2))  # (4, 4, 2, 2)
    mean = torch.einsum("bk,kshw->bshw", rates, each)
    read = codec.decode(mean)["label"]
    torch.testing.assert_close(read.scores, rates, atol=1e-5, rtol=0)
    assert read.labels.tolist() == [0]


def test_the_log_score_of_one_hot_planes_is_least_near_the_rates_of_the_classes():
    codec, rates = OneHot(3, per="image"), torch.tensor([0.7, 0.2, 0.1])
    score = torch.tensor([-0.5, -0.5, -0.5], requires_grad=True)  # planes of the estimate, all classes alike
    optimizer = torch.optim.Adam([score], lr=0.02)
    for _ in range(400):
        y = score[None, :, None, None].expand(3, 3, 2, 2)
        squared = (y - codec.encode({"label": torch.arange(3)}, (2, 2))).square().mean((1, 2, 3))  # (3,)
        loss = (rates * (squared + codec.extra_loss(y, {"label": torch.arange(3)}))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close((score.detach() + 1) / 2, rates, atol=0.05, rtol=0)


def test_the_log_score_has_a_slope_where_a_class_has_frequency_zero_and_can_be_left_out():
    y = torch.full((1, 3, 2, 2), -1.0).index_fill(1, torch.tensor([1]), 1.0).requires_grad_()
    fields = {"mask": torch.tensor([[[0, 0], [0, 255]]])}  # the estimate says class 1; one pixel is unlabelled
    codec = OneHot(3)
    (slope,) = torch.autograd.grad(codec.extra_loss(y, fields).sum(), y)
    assert (slope[0, 0].flatten()[:3] < 0).all()
    assert (slope[0, 1].flatten()[:3] > 0).all()
    assert not slope[..., 1, 1].any()
    twice = OneHot(3, weight=2.0).extra_loss(y, fields)
    assert torch.equal(twice, 2 * codec.extra_loss(y, fields))
    assert OneHot(3, weight=0.0).extra_loss(y, fields) is None
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        OneHot(3, weight=-1.0)
