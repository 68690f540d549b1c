"""Precision, recall, density, coverage against loops over the definitions."""

import pytest
import torch

from lightning_flows.metrics import PRDC, neighbour_radius, prdc, prdc_scores


def _brute(real, samples, k):
    def dist(a, b):
        return ((a - b) ** 2).sum().sqrt().item()

    def radii(rows):
        return [sorted(dist(a, b) for j, b in enumerate(rows) if j != i)[k - 1] for i, a in enumerate(rows)]

    r, s = radii(real), radii(samples)
    inside = [[dist(x, y) <= r[i] for i, x in enumerate(real)] for y in samples]
    recalled = [any(dist(x, y) <= s[j] for j, y in enumerate(samples)) for x in real]
    return {
        "precision": sum(any(row) for row in inside) / len(samples),
        "recall": sum(recalled) / len(real),
        "density": sum(map(sum, inside)) / (k * len(samples)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 3), (25, 40, 5), (12, 7, 1)])
def test_equals_loops_over_the_definitions(n, m, k):
    generator = torch.Generator().manual_seed(n)
    real = torch.randn(n, 2, 2, 1, generator=generator, dtype=torch.float64)
    samples = torch.randn(m, 2, 2, 1, generator=generator, dtype=torch.float64) + 0.7
    metric = PRDC(nearest=k)
    for batch in real.split(8):
        metric.update(batch, real=True)
    for batch in samples.split(8):
        metric.update(batch, real=False)
    expected = _brute(real.flatten(1), samples.flatten(1), k)
    assert {key: value.item() for key, value in metric.compute().items()} == pytest.approx(expected)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = torch.randn(2, 33, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = prdc_scores(x, y, 3)
    monkeypatch.setattr(prdc, "_ROWS", 7)
    assert prdc_scores(x, y, 3) == whole


def test_disjoint_sets_score_zero_and_equal_sets_one():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert set(v.item() for v in prdc_scores(x, x + 100, 3).values()) == {0.0}
    equal = prdc_scores(x, x, 3)
    assert equal["precision"] == equal["recall"] == equal["coverage"] == 1
    assert equal["density"] > 1  # each point lies in its own ball and in about k others


def test_collapse_costs_recall_and_coverage_not_precision():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    collapsed = prdc_scores(x, x[:1] + 1e-3 * x, 5)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.1
    assert collapsed["coverage"] < 0.2


def test_the_radius_leaves_the_item_itself_out_also_with_duplicates():
    x = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    assert neighbour_radius(x, 1).tolist() == [0.0, 0.0, 1.0]


def test_a_set_no_larger_than_the_neighbourhood_is_an_error():
    metric = PRDC(nearest=5)
    metric.update(torch.randn(9, 2), real=True)
    metric.update(torch.randn(5, 2), real=False)
    with pytest.raises(ValueError, match="samples has 5 items, at least 6"):
        metric.compute()
    with pytest.raises(ValueError, match="nearest must be at least 1"):
        PRDC(nearest=0)
