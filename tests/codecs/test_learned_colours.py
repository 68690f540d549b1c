"""Learned colours: far apart at the start, trained by the cross entropy alone, and never on one heap."""

import math

import pytest
import torch
from torch import nn

from lightning_flows.codecs import LearnedColours
from lightning_flows.codecs.learned_colours import spread_points
from lightning_flows.flow.noise import generator_of


@pytest.mark.parametrize(
    ("count", "dims", "least"),
    [
        (7, 2, 0.999 * 2 * math.sin(math.pi / 7)),  # a regular heptagon
        (20, 32, 0.999 * math.sqrt(2 * 20 / 19)),  # a simplex
        (19, 3, 0.9 * 0.8087),  # the best arrangement that is known has 0.8087
        (255, 3, 0.19),
    ],
)
def test_anchors_start_far_from_each_other_and_the_same_everywhere(count, dims, least):
    points = spread_points(count, dims)
    torch.testing.assert_close(points.norm(dim=1), torch.full((count,), math.sqrt(dims)))
    assert torch.pdist(points).min() / math.sqrt(dims) >= least
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(spread_points(count, dims), points)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_norm_is_fixed_whatever_the_optimizer_does():
    codec = LearnedColours(5, channels=4)
    with torch.no_grad():
        codec.anchors.mul_(torch.linspace(0.01, 50, 5)[:, None])
    torch.testing.assert_close(codec.table().norm(dim=1), torch.full((5,), 2.0))


def test_the_code_hides_the_anchors_and_the_extra_loss_shows_them():
    codec, mask = LearnedColours(5), torch.arange(16).reshape(1, 4, 4) % 5
    y = codec.encode({"mask": mask}, (4, 4))
    assert not y.requires_grad
    estimate = (0.5 * y).requires_grad_()
    codec.extra_loss(estimate, {"mask": mask}).sum().backward()
    assert estimate.grad.abs().max() > 0
    assert codec.anchors.grad.abs().max() > 0


def test_the_extra_loss_is_the_cross_entropy_of_labelled_pixels():
    codec = LearnedColours(5, weight=0.3)
    y = torch.randn(3, 3, 4, 4, generator=generator_of("y"))
    mask = torch.randint(0, 5, (3, 4, 4), generator=generator_of("mask"))
    mask[0, :2], mask[2] = 255, 255
    loss = codec.extra_loss(y, {"mask": mask})
    scores = codec.decode(y)["mask"].scores
    wanted = nn.functional.nll_loss(scores.log(), mask, ignore_index=255, reduction="none")
    torch.testing.assert_close(loss[:2], 0.3 * torch.stack([wanted[0].sum() / 8, wanted[1].mean()]))
    assert loss[2] == 0  # nobody labelled anything
    assert loss.shape == (3,)


def test_of_averaged_planes_the_target_is_the_share_of_each_class():
    codec = LearnedColours(4, weight=1.0)
    mask = torch.tensor([[[0, 0], [1, 255]]])
    y = torch.randn(1, 3, 1, 1, generator=generator_of("y"))
    scores = codec.decode(y)["mask"].scores[0, :, 0, 0]
    wanted = -(2 * scores[0].log() + scores[1].log()) / 3
    torch.testing.assert_close(codec.extra_loss(y, {"mask": mask}), wanted[None])


def test_of_labels_the_mean_is_read():
    codec, label = LearnedColours(4, per="image", channels=2, weight=1.0), torch.tensor([0, 3])
    y = torch.randn(2, 2, 5, 5, generator=generator_of("y"))
    wanted = nn.functional.nll_loss(codec.decode(y)["label"].scores.log(), label, reduction="none")
    torch.testing.assert_close(codec.extra_loss(y, {"label": label}), wanted)


def toy(steps, codec, hidden):
    """Trains a regression from features of classes to their code, with some features of the wrong class."""
    optimizer = torch.optim.Adam([*codec.parameters(), *hidden.parameters()], lr=0.02)
    for step in range(steps):
        generator = generator_of("toy", step)
        label = torch.randint(0, 6, (128,), generator=generator)
        seen = torch.where(torch.rand(128, generator=generator) < 0.2, label ^ 1, label)  # taken for its neighbour
        x = nn.functional.one_hot(seen, 6).float() + 0.1 * torch.randn(128, 6, generator=generator)
        estimate = hidden(x)[:, :, None, None]
        squared = (estimate - codec.encode({"label": label}, (1, 1))).square().mean((1, 2, 3))
        (squared + codec.extra_loss(estimate, {"label": label})).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    answers = codec.decode(hidden(torch.eye(6))[:, :, None, None])["label"].labels
    return answers.tolist(), torch.pdist(codec.table().detach()).min().item(), squared.mean().item()


def network():
    return nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 3))


def test_colours_are_learned_and_stay_apart():
    codec = LearnedColours(6, per="image", weight=0.2)
    start = codec.table().detach().clone()
    apart = torch.pdist(start).min().item()
    answers, least, _ = toy(200, codec, network())
    assert answers == [0, 1, 2, 3, 4, 5]
    assert least > 0.45 * apart  # half, for classes that are taken for each other
    assert (codec.table() - start).norm(dim=1).max() > 0.05  # they moved


@pytest.mark.parametrize("rate", [0.5, 0.3, 0.1])
def test_classes_that_are_confused_keep_the_distance_that_tells_how_often(rate):
    """The network's best estimate of two classes at the rates 1 - p and p is the mean of their codes."""
    codec = LearnedColours(2, per="image", channels=2, weight=1.0, temperature=0.4)
    start = 0.9 if rate < 0.5 else 1.2  # radians between the anchors
    with torch.no_grad():
        codec.anchors.copy_(torch.tensor([[1.0, 0.0], [math.cos(start), math.sin(start)]]))
    optimizer = torch.optim.SGD(codec.parameters(), lr=0.05)
    rates = torch.tensor([1 - rate, rate, rate, 1 - rate])
    for _ in range(500):
        a, b = codec.table().detach()
        estimate = torch.stack([(1 - rate) * a + rate * b] * 2 + [rate * a + (1 - rate) * b] * 2)[:, :, None, None]
        loss = codec.extra_loss(estimate, {"label": torch.tensor([0, 1, 0, 1])})
        (rates * loss).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    squared = torch.pdist(codec.table().detach()).item() ** 2
    calibrated = 0.4 * math.log((1 - rate) / rate) / (1 - 2 * rate) if rate < 0.5 else None
    wanted = calibrated or 8 * math.sin(start / 2) ** 2  # at 1/2 there is no force: nothing tells the two apart
    assert squared == pytest.approx(wanted, rel=0.02)


def test_colours_on_a_heap_are_driven_apart():
    codec = LearnedColours(6, per="image", weight=1.0)
    with torch.no_grad():
        codec.anchors.mul_(0.05).add_(torch.tensor([1.0, 1.0, 1.0]))
    before = torch.pdist(codec.table().detach()).min().item()
    answers, least, _ = toy(300, codec, network())
    assert answers == [0, 1, 2, 3, 4, 5]
    assert least > 3 * before


def test_anchors_travel_with_the_state_dict():
    codec, other = LearnedColours(6), LearnedColours(6)
    with torch.no_grad():
        codec.anchors.add_(0.3)
    assert set(codec.state_dict()) == {"anchors"}
    other.load_state_dict(codec.state_dict())
    assert torch.equal(other.table(), codec.table())
    other.reset_parameters()
    assert torch.equal(other.table(), LearnedColours(6).table())
    assert [name for name, _ in codec.named_parameters()] == ["anchors"]
