"""Losses per slice of time."""

import pytest
import torch

from lightning_flows.metrics import LossPerTimeBin


def test_means_and_counts_are_those_of_a_loop_over_the_bins():
    generator = torch.Generator().manual_seed(0)
    loss, t = torch.rand(2, 500, generator=generator)
    metric = LossPerTimeBin(bins=7)
    for a, b in zip(loss.split(64), t.split(64), strict=True):
        metric.update(a, b)
    value = metric.compute()
    for k in range(7):
        inside = (t >= k / 7) & (t < (k + 1) / 7)
        assert value["count"][k] == inside.sum()
        assert value["mean"][k].item() == pytest.approx(loss[inside].double().mean().item(), rel=1e-9)


def test_both_ends_belong_to_a_bin_and_empty_bins_have_no_mean():
    metric = LossPerTimeBin(bins=4)
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    value = metric.compute()
    assert value["count"].tolist() == [1, 0, 0, 1]
    assert value["mean"][[0, 3]].tolist() == [1.0, 3.0]
    assert value["mean"][1:3].isnan().all()


def test_it_takes_no_part_in_the_graph():
    metric = LossPerTimeBin(2)
    metric.update(torch.ones(3, requires_grad=True), torch.zeros(3))
    assert not metric.total.requires_grad


@pytest.mark.parametrize(
    ("loss", "t", "word"),
    [(torch.ones(2), torch.ones(3), "loss and t"), (torch.ones(1), torch.tensor([1.5]), "t must lie"),
     (torch.ones(1), torch.tensor([float("nan")]), "t must lie")],
)  # fmt: skip
def test_wrong_input_is_named(loss, t, word):
    with pytest.raises(ValueError, match=word):
        LossPerTimeBin().update(loss, t)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        LossPerTimeBin(0)
