"""Laws of symmetrical matching: both paths against their formulas, the parts of the loss, what is hidden."""

import pytest
import torch
from torch import nn

from lightning_flows.flow import Linear, StepNoise, Stratified, SymmetricMatching, Trigonometric
from lightning_flows.flow.symmetric import clean_code

B, C, S = 6, 2, 3
SIGMAS = [0.0, 1e-4, 0.1]
every_sigma = pytest.mark.parametrize("sigma", SIGMAS)


def pair(dtype=torch.float32, n=B):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, C, 4, 4, generator=generator).to(dtype)
    return image, torch.randn(n, S, 4, 4, generator=generator).to(dtype)


class Times:
    """Given times in the place of random ones."""

    def __init__(self, t):
        self.t = t

    def __call__(self, n, generator):
        return self.t if self.t.dim() else self.t.expand(n)


class Net(nn.Module):
    """A velocity for each channel, and what it was asked."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(C + S))

    def forward(self, x, t, condition=None):
        self.x, self.t = x, t
        return self.bias.view(-1, 1, 1).expand(x.shape) + 0 * x


def at(t, sigma=1e-4, network=None, hidden=None, **options):
    """What the objective makes of the pair at a time."""
    made = SymmetricMatching(path=Linear(sigma), times=Times(torch.as_tensor(t)), **options)
    return made(network or Net(), *pair(), StepNoise(3), hidden)


def noises():
    noise, (image, code) = StepNoise(3), pair()
    return noise.normal("source", image), noise.normal("semantic", code)


# ------------------------------------------------------------------ paths


@every_sigma
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_both_paths_and_their_velocities_are_those_of_the_paper(sigma, t):
    (x, y), (e_x, e_y) = pair(), noises()
    found = at(t, sigma)
    rest = 1 - (1 - sigma) * t
    torch.testing.assert_close(found.point.x_t, torch.cat([rest * e_x + t * x, rest * y + t * e_y], 1))
    torch.testing.assert_close(found.point.velocity, torch.cat([x - (1 - sigma) * e_x, e_y - (1 - sigma) * y], 1))


def test_ends_are_noise_and_clean_code_then_clean_image_and_noise():
    (x, y), (e_x, e_y) = pair(), noises()
    assert torch.equal(at(0.0, 0.0).point.x_t, torch.cat([e_x, y], 1))
    assert torch.equal(at(1.0, 0.0).point.x_t, torch.cat([x, e_y], 1))


@every_sigma
def test_the_target_is_the_derivative_of_the_path(sigma):
    h = 1e-2  # the path is linear: only rounding is left
    slope = (at(0.5 + h, sigma).point.x_t - at(0.5 - h, sigma).point.x_t) / (2 * h)
    torch.testing.assert_close(slope, at(0.5, sigma).point.velocity, rtol=1e-4, atol=1e-4)


@every_sigma
def test_the_clean_code_is_exact_for_the_true_velocity_at_any_time(sigma):
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.99, 1.0])
    point = at(t, sigma).point
    torch.testing.assert_close(clean_code(point.x_t, point.velocity, t, C), pair()[1], rtol=1e-5, atol=1e-5)


def test_the_estimate_of_the_code_is_that_of_the_networks_velocity():
    network, t = Net(), 0.25
    network.bias.data = torch.arange(5.0)
    found = at(t, network=network)
    expected = found.point.x_t[:, C:] - t * torch.arange(2.0, 5.0).view(-1, 1, 1)
    torch.testing.assert_close(found.code, expected)
    assert found.code.requires_grad


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_the_loss_is_the_weighted_sum_of_two_means(weight):
    found = at(torch.linspace(0, 1, B), image_weight=weight)
    target = found.point.velocity
    of_image, of_code = target[:, :C].square().mean((1, 2, 3)), target[:, C:].square().mean((1, 2, 3))
    torch.testing.assert_close(found.losses.logs["loss_image"], of_image)
    torch.testing.assert_close(found.losses.logs["loss_semantic"], of_code)
    torch.testing.assert_close(found.losses.loss, weight * of_image + (1 - weight) * of_code)
    assert found.losses.loss.shape == (B,)
    assert torch.equal(found.losses.logs["t"], torch.linspace(0, 1, B))
    assert not any(value.requires_grad for value in found.losses.logs.values())


def test_16_bit_inputs_give_float32_losses():
    image, code = pair(torch.bfloat16)
    network = Net()
    found = SymmetricMatching()(network, image, code, StepNoise(0))
    same = SymmetricMatching()(network, image.float(), code.float(), StepNoise(0))
    assert found.losses.loss.dtype == found.code.dtype == found.point.x_t.dtype == torch.float32
    assert torch.equal(found.losses.loss, same.losses.loss)


def test_a_16_bit_network_is_compared_in_float32():
    class Half(Net):
        def forward(self, x, t, condition=None):
            return super().forward(x, t).bfloat16()

    found = at(0.5, network=Half())
    assert found.velocity.dtype == found.losses.loss.dtype == torch.float32


def test_every_draw_is_keyed():
    loss = [SymmetricMatching()(Net(), *pair(), StepNoise(*where)).losses.loss for where in ((1, 2), (1, 2), (1, 3))]
    assert torch.equal(loss[0], loss[1])
    assert not torch.equal(loss[0], loss[2])


def test_the_two_noises_share_no_numbers():
    image = torch.zeros(2, 3, 4, 4)
    point = SymmetricMatching(path=Linear(), times=Times(torch.tensor(0.5)))(
        lambda x, t, condition: x, image, image, StepNoise(0)
    ).point
    assert not torch.isclose(point.x_t[:, :3], point.x_t[:, 3:]).any()


# ------------------------------------------------------------------ times


def test_images_are_not_regressed_where_codes_are_read():
    image, code = torch.randn(64, 3, 4, 4), torch.randn(64, 2, 4, 4)
    losses = SymmetricMatching(read_rate=0.5)(
        lambda x, t, condition: torch.zeros_like(x), image, code, StepNoise(0)
    ).losses
    reading = losses.logs["t"] == 1
    assert 10 < reading.sum() < 54
    assert not losses.logs["loss_image"][reading].any()
    assert losses.logs["loss_image"][~reading].all()
    assert losses.logs["loss_semantic"].all()


def test_the_read_rate_puts_samples_at_exactly_one():
    made = SymmetricMatching(read_rate=0.3, times=Stratified())
    t = made.time(20_000, StepNoise(0))
    assert t.dtype == torch.float32
    assert (t == 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    rest, plain = t[t < 1], SymmetricMatching(times=Stratified()).time(20_000, StepNoise(0))
    assert torch.equal(rest, plain[t < 1])  # the others stay where they were
    assert rest.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not (plain == 1).any()


# ------------------------------------------------------------------ hidden codes


def test_parts_are_hidden_at_the_drop_rate_each_by_itself():
    hidden = SymmetricMatching(drop_rate=0.2).hidden(20_000, 2, StepNoise(0))
    assert hidden.shape == (20_000, 2)
    assert hidden.float().mean(0).tolist() == pytest.approx([0.2, 0.2], abs=0.01)
    assert hidden.all(1).float().mean().item() == pytest.approx(0.04, abs=0.005)
    assert not SymmetricMatching().hidden(100, 2, StepNoise(0)).any()


def hidden_channels():
    """Of sample 0 nothing is hidden, of sample 1 everything, of the others channel 0."""
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1], hidden[2:, 0] = True, True
    return hidden


def test_noise_stands_in_the_place_of_what_is_hidden_on_the_whole_path():
    hidden, t = hidden_channels(), 0.25
    plain, found = at(t, 0.0), at(t, 0.0, hidden=hidden)
    noise = StepNoise(3).normal("hidden", pair()[1])
    code = torch.where(hidden[:, :, None, None], (1 - t) * noise + t * noises()[1], plain.point.x_t[:, C:])
    torch.testing.assert_close(found.point.x_t[:, C:], code)
    assert torch.equal(found.point.x_t[:, :C], plain.point.x_t[:, :C])
    assert torch.equal(found.losses.logs["loss_image"], plain.losses.logs["loss_image"])


def test_what_is_hidden_is_not_regressed():
    network, hidden = Net(), hidden_channels()
    found = at(0.25, network=network, hidden=hidden)
    loss = found.losses.logs["loss_semantic"]
    assert loss[1] == 0
    assert (loss[2:] > 0).all()
    (gradient,) = torch.autograd.grad(found.losses.loss[1], network.bias)
    assert torch.equal(gradient[C:], torch.zeros(S))
    assert (gradient[:C] != 0).all()
    found = at(0.25, network=network, hidden=hidden)
    (gradient,) = torch.autograd.grad(found.losses.loss[2:].sum(), network.bias)
    assert (gradient != 0).tolist() == [True, True, False, True, True]


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_weight": 1.1}, r"image_weight must lie in \[0, 1\], got 1.1"),
        ({"image_weight": -0.1}, "image_weight"),
        ({"read_rate": 1.0}, r"read_rate must lie in \[0, 1\), got 1.0"),
        ({"drop_rate": -0.5}, "drop_rate"),
        ({"path": Trigonometric()}, "path must be Linear"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SymmetricMatching(**options)


@pytest.mark.parametrize("code", [torch.zeros(B, S, 2, 2), torch.zeros(B - 1, S, 4, 4)])
def test_image_and_code_have_one_size(code):
    with pytest.raises(ValueError, match=r"image and code must agree in B, h, w, got \(6, 2, 4, 4\)"):
        SymmetricMatching()(Net(), pair()[0], code, StepNoise(0))
