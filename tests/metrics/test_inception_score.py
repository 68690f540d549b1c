"""Inception score with a known classifier."""

import pytest
import torch
from torchmetrics.image import InceptionScore as Oracle

from lightning_flows.metrics import Features, InceptionScore


def _score(logits, **options):
    metric = InceptionScore(Features(torch.nn.Identity(), "logits"), **options)
    metric.update(logits, real=False)
    metric.update(torch.zeros(5, 3), real=True)  # ignored
    return metric


def test_sure_and_even_predictions_score_the_number_of_classes():
    logits = torch.eye(4).repeat(5, 1) * 1e4
    value = _score(logits, splits=1).compute()
    assert value["mean"].item() == pytest.approx(4.0)
    assert _score(torch.zeros(20, 4), splits=1).compute()["mean"].item() == pytest.approx(1.0)


def test_equals_torchmetrics_on_one_split():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    oracle = Oracle(feature=torch.nn.Identity(), splits=1)
    oracle.update(logits)
    assert _score(logits, splits=1).compute()["mean"].item() == pytest.approx(oracle.compute()[0].item())


def test_splits_come_from_the_seed():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    first, again, other = (_score(logits, splits=4, seed=s).compute()["mean"] for s in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="40 samples are fewer than splits = 50"):
        _score(logits, splits=50).compute()
    with pytest.raises(ValueError, match="splits must be at least 1"):
        _score(logits, splits=0)
