"""Data to the noise from which the guided flow draws them, with the density of that flow."""

import pytest
import torch

from lightning_flows.flow import Condition, GaussianProduct, LogLinear
from lightning_flows.networks.guided_encoding import encode_guided
from tests.networks.tiny_flows import normal, starflow, tarflow

LABEL = Condition(label=torch.arange(3))
FLOWS = {
    "tarflow": lambda: tarflow(num_classes=3).double(),
    "volume preserving": lambda: tarflow(volume_preserving=True, num_classes=3).double(),
    "identity block": lambda: tarflow(depth=(1, 0, 1), num_classes=3).double(),
    "starflow": lambda: starflow(num_classes=3),
    "all blocks see the class": lambda: starflow(num_classes=3, deep_condition_only=False),
    "copied first token": lambda: starflow(num_classes=3, start_token=False),
}
RULES = [
    GaussianProduct(2.5),
    GaussianProduct(2.0, deep_only=True),
    LogLinear(1.5, annealed=True),
    LogLinear(1.5, temperature=1.3),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_it_undoes_the_guided_draw(name, rule):
    network = FLOWS[name]()
    z = normal(3, 2, 4, 6, dtype=next(network.parameters()).dtype)
    drawn = network.draw(z, LABEL, guidance=rule)
    found = encode_guided(network, drawn.x, LABEL, rule)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.z, z, **close)
    torch.testing.assert_close(found.log_det, -drawn.log_det, **close)
    assert (network(drawn.x, LABEL)[0] - z).abs().max() > 1e-3  # the flow without guidance is another one


def test_log_det_is_that_of_the_jacobian():
    network, rule, one = tarflow(num_classes=3).double(), GaussianProduct(2.5), LABEL[:1]
    x = normal(1, 2, 4, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: encode_guided(network, v, one, rule).z, x)
    expected = torch.linalg.slogdet(jacobian.reshape(48, 48)).logabsdet
    torch.testing.assert_close(encode_guided(network, x, one, rule).log_det, expected[None])


def test_without_a_condition_a_temperature_makes_the_other_branch():
    network, rule = tarflow().double(), LogLinear(1.5, temperature=1.3)
    z = normal(2, 2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(encode_guided(network, network.inverse(z, guidance=rule), None, rule).z, z)
    with pytest.raises(ValueError, match="needs a network with a condition, or a temperature"):
        encode_guided(network, z, None, LogLinear(1.5))
