"""Nearest training neighbours."""

import pytest
import torch

from lightning_flows.metrics import NearestNeighbour, nearest_distance


def test_nearest_distance_is_the_minimum_of_all():
    x, y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    brute = torch.stack([(row - y).norm(dim=1).min() for row in x])
    assert torch.allclose(nearest_distance(x, y), brute)


def test_copies_stand_out_against_held_out_items():
    generator = torch.Generator().manual_seed(1)
    train, held_out = torch.randn(2, 100, 1, 2, 2, generator=generator)
    metric = NearestNeighbour(train[:50])
    metric.remember(train[50:])
    metric.update(held_out, real=True)
    metric.update(train[:40] + 1e-4, real=False)
    value = metric.compute()
    assert value["samples"].item() == pytest.approx(2e-4, rel=1e-2)
    assert value["ratio"] < 0.01
    assert value["held_out"].item() == pytest.approx(
        nearest_distance(held_out.flatten(1).double(), train.flatten(1).double()).mean().item()
    )


def test_fresh_samples_have_ratio_one():
    generator = torch.Generator().manual_seed(2)
    train, held_out, fresh = torch.randn(3, 400, 3, generator=generator)
    metric = NearestNeighbour(train)
    metric.update(held_out, real=True)
    metric.update(fresh, real=False)
    assert metric.compute()["ratio"].item() == pytest.approx(1.0, abs=0.15)


def test_training_items_survive_a_reset_and_a_cast():
    metric = NearestNeighbour(torch.zeros(3, 2))
    metric.reset()
    metric.float()
    metric.update(torch.ones(1, 2), real=True)
    metric.update(torch.ones(1, 2) * 2, real=False)
    assert metric.compute()["ratio"].item() == pytest.approx(2.0)


def test_without_training_items_it_says_so():
    with pytest.raises(ValueError, match="train is empty"):
        NearestNeighbour().update(torch.zeros(1, 2), real=True)
