"""Laws of the likelihood of a flow."""

import math

import pytest
import torch

from lightning_flows.flow.condition import Condition
from lightning_flows.flow.fields import Field, Velocity
from lightning_flows.flow.guidance import ClassifierFree
from lightning_flows.flow.likelihood import Exact, Hutchinson, bits_per_dim, dequantize, log_prob
from lightning_flows.flow.noise import SampleNoise, StepNoise
from lightning_flows.flow.solvers import RK4, DormandPrince, Euler, EulerMaruyama, Heun
from lightning_flows.flow.times import time_grid


def grid(n):
    return time_grid(n, dtype=torch.float64)


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(matrix):
    return lambda x, t: (x.flatten(1) @ matrix.T).reshape(x.shape)


def divergence_of(field, x, divergence, noise=None):
    x = x.requires_grad_()
    return divergence(field(x, torch.tensor(0.5)), x, divergence.prepare(x, noise)).detach()


def test_exact_divergence_of_a_linear_field_is_the_trace():
    a = points(8, 8, seed=1)
    torch.testing.assert_close(divergence_of(linear(a), points(5, 8), Exact()), a.trace().expand(5))


def test_exact_divergence_is_the_trace_of_the_autograd_jacobian():
    a, x = points(6, 6, seed=1), points(4, 2, 3)

    def field(x, t):
        return torch.tanh(linear(a)(x, t)) * x.flatten(1).sum(1).reshape(-1, 1, 1)

    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: field(y[None], None)[0].flatten()))(x).reshape(4, 6, 6)
    expected = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence_of(field, x.clone(), Exact()), expected)


@pytest.mark.parametrize("probes", [1, 3])
def test_signs_are_exact_for_a_diagonal_jacobian(probes):
    x = points(5, 2, 3)
    estimate = divergence_of(lambda x, t: torch.sin(x), x.clone(), Hutchinson(probes), StepNoise(0))
    torch.testing.assert_close(estimate, torch.cos(x).flatten(1).sum(1))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_more_probes_vary_less(law):
    a, n = points(8, 8, seed=1), 4000
    one, four = (divergence_of(linear(a), points(n, 8), Hutchinson(probes, law), StepNoise(0)) for probes in (1, 4))
    symmetric = (a + a.T) / 2
    off = symmetric if law == "gaussian" else symmetric - symmetric.diagonal().diag()
    variance = 2 * off.square().sum().item()
    assert one.mean().item() == pytest.approx(a.trace().item(), abs=5 * math.sqrt(variance / n))
    assert one.var().item() == pytest.approx(variance, rel=0.15)
    assert four.var().item() == pytest.approx(variance / 4, rel=0.15)


@pytest.mark.parametrize(
    ("solver", "n", "bound"),
    [(RK4(rule="3/8"), 12, 1e-3), (Heun(), 200, 1e-2), (DormandPrince(1e-8, 1e-8), 1, 1e-5)],
    ids=repr,
)
def test_density_of_a_known_gaussian(solver, n, bound, gaussian_field):
    field = gaussian_field()
    x1 = field.mean + field.scale * points(64, 8)
    density = log_prob(field, x1, solver=solver, grid=grid(n))
    assert (density.log_prob - field.log_prob(x1)).abs().max() < bound
    torch.testing.assert_close(density.x0, (x1 - field.mean) / field.scale, atol=bound, rtol=bound)


def test_density_of_a_linear_flow():
    a, x1 = points(4, 4, seed=1), points(6, 4)
    back = x1 @ torch.linalg.matrix_exp(-a).T
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(back).sum(1) - a.trace()
    density = log_prob(linear(a), x1, solver=RK4(), grid=grid(60))
    torch.testing.assert_close(density.log_prob, expected, atol=1e-4, rtol=1e-5)


def test_density_of_a_one_dimensional_flow_integrates_to_one():
    def field(x, t):
        return torch.sin(2 * x) + torch.cos(3 * t)

    x1 = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    density = log_prob(field, x1, solver=RK4(), grid=grid(30)).log_prob.exp()
    assert torch.trapezoid(density, x1[:, 0]).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=repr)
def test_images_have_the_density_of_their_flat_copies(divergence):
    a, x1 = points(12, 12, seed=1) / 3, points(4, 3, 2, 2)
    noise = SampleNoise([1, 2, 3, 4])
    image, flat = (
        log_prob(linear(a), x, solver=RK4(), grid=grid(10), divergence=divergence, noise=noise)
        for x in (x1, x1.flatten(1))
    )
    assert image.log_prob.shape == (4,)
    assert image.x0.shape == x1.shape
    torch.testing.assert_close(image.log_prob, flat.log_prob)
    torch.testing.assert_close(image.x0.flatten(1), flat.x0)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2, "gaussian")], ids=repr)
def test_density_is_differentiable_in_the_data_and_in_the_parameters(divergence):
    a, x1 = points(3, 3, seed=1), points(2, 3)

    def density(a, x1):
        field = lambda x, t: torch.tanh(x @ a.T) * (1 + t)  # noqa: E731
        noise = SampleNoise([1, 2])
        return log_prob(field, x1, solver=Heun(), grid=grid(3), divergence=divergence, noise=noise).log_prob

    assert torch.autograd.gradcheck(density, (a.requires_grad_(), x1.requires_grad_()))
    assert torch.autograd.gradcheck(lambda a: density(a, x1.detach()), (a,))


def test_without_gradients_nothing_is_kept():
    a = points(3, 3, seed=1).requires_grad_()
    with torch.no_grad():
        density = log_prob(linear(a), points(2, 3), solver=Euler(), grid=grid(3))
    assert not density.log_prob.requires_grad
    assert not density.x0.requires_grad
    enabled = log_prob(linear(a), points(2, 3), solver=Euler(), grid=grid(3))
    torch.testing.assert_close(enabled.log_prob.detach(), density.log_prob)


def test_a_field_without_x_moves_points_and_keeps_volumes():
    x1 = points(3, 2)
    density = log_prob(lambda x, t: torch.ones_like(x), x1, solver=Euler(), grid=grid(1))
    torch.testing.assert_close(density.x0, x1 - 1)
    torch.testing.assert_close(density.log_prob, torch.distributions.Normal(0.0, 1.0).log_prob(x1 - 1).sum(1))


def test_what_has_no_density_is_refused():
    class Labelled:
        streams = ("label",)

        def __call__(self, x, t, condition=None):
            return x

        def null(self, condition, batch_size):
            return condition.absent()

    x1 = points(2, 3)
    guided = Field(Velocity(Labelled()), Condition(label=torch.arange(2)), ClassifierFree(2.0))
    with pytest.raises(ValueError, match="guidance"):
        log_prob(guided, x1, solver=Euler(), grid=grid(2))
    with pytest.raises(ValueError, match="solver"):
        log_prob(lambda x, t: x, x1, solver=EulerMaruyama(), grid=grid(2))
    with pytest.raises(ValueError, match="noise"):
        log_prob(lambda x, t: x, x1, solver=Euler(), grid=grid(2), divergence=Hutchinson())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        log_prob(lambda x, t: x, x1, solver=Euler(), grid=grid(2))
    with pytest.raises(ValueError, match="probes"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="law"):
        Hutchinson(law="uniform")


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bits_of_uniform_pixels_are_those_of_their_levels(levels):
    dimensions = 12
    uniform = torch.full((3,), -dimensions * math.log(2.0), dtype=torch.float64)  # density 1/2 on [-1, 1]
    expected = torch.full((3,), math.log2(levels), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(uniform, dimensions, levels), expected)


@pytest.mark.parametrize("levels", [2, 256])
def test_dequantised_levels_fill_their_own_bin(levels):
    level = torch.arange(levels).repeat(4).reshape(4, levels)
    x = dequantize(level * (2 / (levels - 1)) - 1, levels, StepNoise(0))
    assert x.min() >= -1
    assert x.max() < 1
    assert torch.equal(((x + 1) / 2 * levels).floor().long(), level)
    assert torch.equal(x, dequantize(level * (2 / (levels - 1)) - 1, levels, StepNoise(0)))


def test_dequantisation_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        dequantize(torch.tensor([[2.0]]), 256, StepNoise(0))
    with pytest.raises(ValueError, match="levels"):
        dequantize(torch.zeros(1, 1), 1, StepNoise(0))
