"""A method for each block, found on data."""

import json

import pytest
import torch

from lightning_flows.flow import Condition
from lightning_flows.networks import Jacobi, PerBlock, Sequential, STARFlow, calibrate
from lightning_flows.store import build, config_of
from tests.networks.tiny_flows import starflow, tarflow

LABELS = Condition(label=torch.tensor([0, 2, 1]))


def flows():
    return {
        "tarflow": tarflow(input_size=8, in_channels=1, num_classes=3),
        "starflow": starflow(input_size=6, in_channels=2, num_classes=3),
    }


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_the_methods_give_back_data_to_the_accuracy_that_was_asked_for(name):
    network = flows()[name].eval()
    x = torch.randn(3, *network.shape)
    methods = calibrate(network, x, LABELS, threshold=1e-8, overhead=1e3)
    assert len(methods.methods) == len(network.blocks)
    with torch.no_grad():
        found = network.inverse(network(x, LABELS)[0], LABELS, method=methods)
    assert (found - x).square().mean() < 1e-5 * x.square().mean()


def test_passes_that_cost_their_tokens_alone_are_never_worth_it():
    network = flows()["starflow"]
    methods = calibrate(network, torch.randn(2, *network.shape), overhead=0.0)
    assert methods.methods == [Sequential()] * len(network.blocks)


def test_a_block_that_does_not_look_at_other_tokens_is_inverted_at_once():
    network = STARFlow(6, in_channels=2, hidden_size=32, depth=(1, 0, 1), head_size=32)  # fresh: no output depends on x
    network.train()
    methods = calibrate(network, torch.randn(2, *network.shape)).methods
    assert [type(method) for method in methods] == [Jacobi, Sequential, Jacobi]
    assert methods[0].segment == 36
    assert network.training


def test_a_method_that_misses_the_accuracy_is_not_taken():
    network = flows()["tarflow"]
    x = torch.randn(3, *network.shape)
    loose = calibrate(network, x, LABELS, threshold=1.0, overhead=1e3, accuracy=1e9)
    strict = calibrate(network, x, LABELS, threshold=1.0, overhead=1e3, accuracy=1e-12)
    assert any(isinstance(method, Jacobi) for method in loose.methods)
    assert all(isinstance(method, Sequential) for method in strict.methods)


def test_what_is_found_is_a_config():
    network = flows()["tarflow"]
    methods = calibrate(network, torch.randn(2, *network.shape), overhead=1e3)
    config = json.loads(json.dumps(config_of(methods)))
    assert build(config, PerBlock) == methods


@pytest.mark.parametrize("options", [{"segments": ()}, {"segments": (0, 2)}, {"overhead": -1.0}])
def test_what_means_nothing_is_refused(options):
    network = flows()["tarflow"]
    with pytest.raises(ValueError, match=next(iter(options))):
        calibrate(network, torch.randn(2, *network.shape), **options)
