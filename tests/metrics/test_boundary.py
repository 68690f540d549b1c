"""Boundary scores against distances counted pixel by pixel."""

import math

import pytest
import torch

from lightning_flows.codecs import IGNORE
from lightning_flows.metrics import BoundaryFScore, boundary_scores


def edge_by_hand(ids, wanted, known):
    """Coordinates of the boundary pixels of a class."""
    height, width = ids.shape
    found = []
    for y in range(height):
        for x in range(width):
            if not known[y, x] or ids[y, x] != wanted:
                continue
            beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(v, u) for v, u in beside if 0 <= v < height and 0 <= u < width and known[v, u]]
            if any(ids[v, u] != wanted for v, u in inside):
                found.append((y, x))
    return found


def near(own, other, tolerance):
    return sum(any(math.dist(a, b) <= tolerance for b in other) for a in own)


def score_by_hand(guess, truth, tolerance):
    known, scores = truth != IGNORE, []
    for wanted in sorted({*guess[known].tolist(), *truth[known].tolist()} - {IGNORE}):
        called, true = edge_by_hand(guess, wanted, known), edge_by_hand(truth, wanted, known)
        if not called and not true:
            scores.append(float((guess[known] == wanted).any() and (truth[known] == wanted).any()))
            continue
        precision = near(called, true, tolerance) / len(called) if called else 0
        recall = near(true, called, tolerance) / len(true) if true else 0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    return scores


def blobs(seed, classes=4, size=(17, 14)):
    """Masks of large regions, a shifted and disturbed copy of them, some unlabelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, classes, 4, 4, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size, mode="bilinear").argmax(1)[0]
    guess = truth.roll((1, -2), (0, 1))
    guess[torch.rand(size, generator=generator) < 0.05] = 2
    guess[torch.rand(size, generator=generator) < 0.03] = IGNORE
    truth[torch.rand(size, generator=generator) < 0.06] = IGNORE
    return guess, truth


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_what_distances_pixel_by_pixel_say(tolerance, seed):
    guess, truth = blobs(seed)
    metric = BoundaryFScore(4, tolerance)
    metric.update(guess[None], truth[None])
    expected = score_by_hand(guess, truth, tolerance)
    assert len(expected) > 2
    assert metric.compute().item() == pytest.approx(sum(expected) / len(expected), abs=1e-9)
    no_class = guess.masked_fill(guess == IGNORE, 4)
    assert boundary_scores(no_class, truth, 4, tolerance).tolist() == pytest.approx(expected, abs=1e-9)


def test_images_count_equally_however_many_classes_they_have():
    metric, pairs = BoundaryFScore(4, 1), [blobs(seed) for seed in range(3)]
    for guess, truth in pairs:
        metric.update(guess[None], truth[None])
    whole = BoundaryFScore(4, 1)
    whole.update(*(torch.stack(each) for each in zip(*pairs, strict=True)))
    means = [sum(scores) / len(scores) for scores in (score_by_hand(*pair, 1) for pair in pairs)]
    assert metric.compute().item() == pytest.approx(sum(means) / 3, abs=1e-9)
    assert whole.compute().item() == pytest.approx(metric.compute().item(), abs=1e-12)


def test_a_border_moved_by_two_pixels_counts_from_a_tolerance_of_two():
    truth, guess = torch.zeros(2, 1, 12, 12, dtype=torch.int64)
    truth[..., 6:], guess[..., 8:] = 1, 1
    values = []
    for tolerance in (0, 1, 2, 3):
        metric = BoundaryFScore(2, tolerance)
        metric.update(guess, truth)
        values.append(metric.compute().item())
    assert values == [0, 0, 1, 1]


def test_perfect_masks_give_one_and_empty_predictions_zero():
    _, truth = blobs(3)
    for guess, expected in ((truth, 1), (torch.full_like(truth, IGNORE), 0)):
        metric = BoundaryFScore(4)
        metric.update(guess[None], truth[None])
        assert metric.compute() == expected


@pytest.mark.parametrize(("filled", "expected"), [(0, 1), (1, 0)])
def test_a_class_that_fills_the_image_has_no_border(filled, expected):
    metric = BoundaryFScore(2)
    metric.update(torch.full((1, 5, 5), filled), torch.zeros(1, 5, 5, dtype=torch.int64))
    assert metric.compute() == expected


def test_the_tolerance_is_a_share_of_the_diagonal():
    metric = BoundaryFScore(2)
    assert [metric.radius(side, side) for side in (32, 256, 512)] == [1, 3, 6]
    assert BoundaryFScore(2, 4).radius(32, 32) == 4
    assert metric.settings() == {"num_classes": 2, "tolerance": "ceil(0.0075 diagonal)"}


def test_images_without_a_label_are_not_counted():
    metric, (guess, truth) = BoundaryFScore(4), blobs(0)
    metric.update(guess[None], torch.full_like(truth, IGNORE)[None])
    with pytest.raises(ValueError, match="no labelled pixel"):
        metric.compute()
    metric.update(truth[None], truth[None])
    assert metric.compute() == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="tolerance must be pixels"):
        BoundaryFScore(3, -1)
    with pytest.raises(ValueError, match="num_classes must lie"):
        BoundaryFScore(0)
    with pytest.raises(ValueError, match="one shape"):
        BoundaryFScore(3).update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long())
