"""Laws of rotary positions on several axes."""

import pytest
import torch

from lightning_flows.networks.rotary import frequencies, grid_positions, rotation, text_positions
from tests.networks.tiny_flows import normal

HALVES = pytest.mark.parametrize("half_split", [False, True])


def pairs_of(x, half_split):
    """Channel pairs of (..., d) as complex numbers (..., d / 2)."""
    a, b = x.chunk(2, dim=-1) if half_split else (x[..., 0::2], x[..., 1::2])
    return torch.complex(a, b)


@HALVES
@pytest.mark.parametrize("axes", [2, 3])
def test_every_pair_is_turned_by_its_position_times_its_frequency(axes, half_split):
    head = 40
    places = normal(6, axes, seed=1).abs() * 5
    x = normal(2, 3, 6, head)
    found = rotation(places, head, theta=50.0, half_split=half_split)(x)
    counts = [6, 6, 8] if axes == 3 else [10, 10]
    rates = [50.0 ** -(torch.arange(n) / n) for n in counts]
    angle = torch.cat([places[:, i, None] * rate for i, rate in enumerate(rates)], dim=1)
    expected = pairs_of(x, half_split) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(pairs_of(found, half_split), expected)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


@HALVES
def test_products_depend_on_differences_of_positions_alone(half_split):
    q, k, places = normal(1, 1, 4, 40), normal(1, 1, 4, 40, seed=2), normal(4, 3, seed=3) * 4
    turned, moved = (rotation(p, 40, half_split=half_split) for p in (places, places + torch.tensor([3.0, -2.0, 7.0])))
    products = turned(q) @ turned(k).mT
    torch.testing.assert_close(moved(q) @ moved(k).mT, products, rtol=1e-4, atol=1e-4)
    assert (products - q @ k.mT).abs().max() > 0.1


def test_the_dtype_stays_and_the_angle_is_float32():
    turned = rotation(grid_positions(2, 3, 4.0), 8)
    assert turned.cos.dtype == torch.float32
    assert [turned(normal(1, 1, 6, 8).to(dtype)).dtype for dtype in (torch.bfloat16, torch.float64)] == [
        torch.bfloat16,
        torch.float64,
    ]


def test_a_part_is_that_of_its_positions():
    places, x = grid_positions(2, 3, 4.0), normal(1, 2, 6, 8)
    turned = rotation(places, 8, half_split=True)
    assert torch.equal(turned.between(2, 5)(x[:, :, 2:5]), turned(x)[:, :, 2:5])


def test_frequencies_fall_from_one_towards_one_over_theta():
    found = frequencies(4, 10000.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.001]))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (2, 8), (9, 4)])
def test_a_grid_of_any_shape_spans_one_area(rows, columns):
    places = grid_positions(rows, columns, 6.0).unflatten(0, (rows, columns))
    unit = 6.0 / (rows * columns) ** 0.5
    torch.testing.assert_close(places[..., 0], (torch.arange(rows) * unit)[:, None].expand(rows, columns))
    torch.testing.assert_close(places[..., 1], (torch.arange(columns) * unit).expand(rows, columns))
    assert rows * unit * columns * unit == pytest.approx(36.0)


def test_texts_lie_on_the_third_axis():
    assert text_positions(4, 8.0).tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 6]]


@pytest.mark.parametrize(("axes", "head_size"), [(2, 2), (2, 6), (2, 7), (3, 16), (3, 18), (3, 22), (3, 33)])
def test_a_head_that_cannot_be_shared_out_is_refused(axes, head_size):
    with pytest.raises(ValueError, match=f"head_size must be even.*got {head_size}"):
        rotation(torch.zeros(1, axes), head_size)
