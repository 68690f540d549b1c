"""Fields whose flow, density and posterior means are known in closed form."""

import pytest
import torch

from lightning_flows.flow.paths import Linear


class GaussianField:
    """The exact velocity that carries N(0, I) to N(mean, scale^2 I) along a path, with its flow map."""

    def __init__(self, path=None, mean=2.0, scale=0.3):
        self.path, self.mean, self.scale, self.calls = path or Linear(), mean, scale, 0

    def __call__(self, x, t):
        self.calls += 1
        t = torch.as_tensor(t, dtype=x.dtype)
        t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())) if t.dim() else t
        a, s, da, ds = self.path.alpha(t), self.path.sigma(t), self.path.d_alpha(t), self.path.d_sigma(t)
        slope = (da * a * self.scale**2 + ds * s) / (a**2 * self.scale**2 + s**2)
        return da * self.mean + slope * (x - a * self.mean)

    def std(self, t):
        """Standard deviation of x_t."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt((self.path.alpha(t) * self.scale) ** 2 + self.path.sigma(t) ** 2)

    def flow(self, x, start=0.0, end=1.0):
        """Where x goes from time start to time end."""
        a, b = (self.path.alpha(torch.tensor(t, dtype=torch.float64)) for t in (start, end))
        return b * self.mean + self.std(end) / self.std(start) * (x - a * self.mean)

    def log_prob(self, x1):
        return torch.distributions.Normal(self.mean, self.scale).log_prob(x1).flatten(1).sum(1)


class Counted:
    """A field that counts its calls and keeps their times."""

    def __init__(self, field, path=None):
        self.field, self.path, self.times = field, path, []

    def __call__(self, x, t):
        self.times.append(float(t))
        return self.field(x, t)

    @property
    def calls(self):
        return len(self.times)


@pytest.fixture(scope="session")
def gaussian_field():
    return GaussianField


@pytest.fixture(scope="session")
def counted():
    return Counted
