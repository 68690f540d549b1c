"""Laws of velocities and fields."""

import pytest
import torch

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.fields import Field, Velocity, score_noise
from lightning_flows.flow.guidance import ClassifierFree, ZeroStar
from lightning_flows.flow.paths import QUANTITIES, Linear, Trigonometric


class Oracle:
    """The exact prediction of one quantity for N(0, I) -> N(mean, scale^2 I)."""

    streams = ()

    def __init__(self, field, prediction):
        self.field, self.prediction = field, prediction

    def __call__(self, x, t, condition=None):
        velocity = self.field(x, t)
        return self.field.path.convert(velocity, x, t, given="velocity", to=self.prediction)

    def null(self, condition, batch_size):
        return condition


class Labelled:
    streams = ("label",)

    def __call__(self, x, t, condition=None):
        shown = condition.presence("label")
        return torch.where(shown, condition.label.to(x), -1.0)[:, None] * x

    def null(self, condition, batch_size):
        return condition.absent()


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_whatever_a_network_predicts_its_velocity_is_the_same(path, prediction, gaussian_field):
    exact = gaussian_field(path)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = Velocity(Oracle(exact, prediction), path, prediction)
    for t in (torch.tensor(0.3).double(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        torch.testing.assert_close(velocity(x, t), exact(x, t))
    assert velocity(x.float(), torch.tensor(0.5)).dtype == torch.float32


@pytest.mark.parametrize("prediction", QUANTITIES)
def test_the_velocity_is_finite_at_both_ends(prediction):
    class Rough:
        def __call__(self, x, t, condition=None):
            return torch.ones_like(x)

    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 1.0):
        assert bool(Velocity(Rough(), Linear(), prediction)(x, torch.tensor(t)).isfinite().all())


def test_the_default_path_is_linear_and_the_streams_are_the_networks():
    assert Velocity(Labelled()).path == Linear()
    assert Velocity(Labelled()).streams == ("label",)


def test_a_field_binds_its_condition_and_its_guidance():
    x, t, condition = torch.ones(2, 3), torch.tensor(0.5), Condition(label=torch.tensor([2, 3]))
    velocity = Velocity(Labelled())
    plain = Field(velocity, condition)
    torch.testing.assert_close(plain(x, t), torch.tensor([[2.0] * 3, [3.0] * 3]))
    guided = Field(velocity, condition, ClassifierFree(2.0))
    torch.testing.assert_close(guided(x, t), torch.tensor([[5.0] * 3, [7.0] * 3]))  # -1 + 2 (c + 1)
    assert plain.path == guided.path == Linear()
    assert not plain.stateful
    assert not guided.stateful
    assert Field(velocity, condition, ZeroStar(2.0)).stateful


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=repr)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_score_noise_is_minus_sigma_times_the_score_and_finite_at_the_ends(path, t, gaussian_field):
    field, time = gaussian_field(path), torch.tensor(t, dtype=torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = -(x - path.alpha(time) * field.mean) / field.std(t) ** 2
    torch.testing.assert_close(score_noise(path, field(x, time), x, time), -path.sigma(time) * score)
