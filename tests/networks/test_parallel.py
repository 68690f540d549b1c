"""Blocks of a network: found, recomputed, compiled, sharded on one process; names, values and gradients stay."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_flows import Condition
from lightning_flows.networks import (
    ADMUNet,
    DiT,
    EDMUNet,
    ReversedTime,
    blocks_of,
    checkpoint_blocks,
    compile_blocks,
    compile_network,
    restore_blocks,
    shard_blocks,
)
from lightning_flows.networks.dit import DiTBlock
from lightning_flows.networks.parallel import is_sharded, sharded_like, whole
from tests.modules.tiny import awake, dit

SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 32, "channel_mult": (1, 2), "num_blocks": 1}


def networks():
    return {
        "dit": dit(depth=3),
        "adm": awake(ADMUNet(**SMALL, attention_factors=(2,), num_heads=2)),
        "edm": awake(EDMUNet(**SMALL, attention_sizes=(4,), head_channels=16)),
        "reversed": ReversedTime(dit(depth=2)),
    }


def gradients(network):
    """Loss and gradients by name of one fixed batch."""
    x, t = torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])
    condition = Condition(label=torch.tensor([0, 1])) if network.streams else None
    network.zero_grad()
    loss = network(x, t, condition).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in network.named_parameters()}}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert torch.equal(found[name], value), name


# ------------------------------------------------------------------ blocks


def test_blocks_are_found_by_their_class_or_in_lists():
    assert list(blocks_of(dit(depth=2))) == ["blocks.0", "blocks.1"]
    assert list(blocks_of(ReversedTime(dit(depth=2)))) == ["network.blocks.0", "network.blocks.1"]
    found = networks()
    expected = [f"{place}.0" for place in ("encoder.0.blocks", "encoder.1.blocks", "middle")]
    assert [name for name in blocks_of(found["adm"]) if name.endswith(".0")][:3] == expected
    for network in found.values():
        blocks = blocks_of(network)
        inside = sum(p.numel() for block in blocks.values() for p in block.parameters())
        assert inside > 0.5 * sum(p.numel() for p in network.parameters())
        assert len({id(p) for block in blocks.values() for p in block.parameters()}) == sum(
            len(list(block.parameters())) for block in blocks.values()
        )  # no block lies within another


def test_a_class_may_say_what_its_blocks_are():
    class Mine(nn.Module):
        block_classes = (nn.Linear,)

        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.SiLU())

    assert list(blocks_of(Mine())) == ["first", "rest.0"]


def test_a_network_without_blocks_says_how_to_name_them():
    with pytest.raises(ValueError, match="Linear has no blocks: give its class an attribute block_classes"):
        blocks_of(nn.Linear(2, 2))


# ------------------------------------------------------------------ recomputed, compiled


@pytest.mark.parametrize("name", networks())
def test_recomputed_activations_give_the_same_gradients(name):
    network = networks()[name]
    expected, keys = gradients(network), list(network.state_dict())
    assert checkpoint_blocks(network) == list(blocks_of(network))
    assert_same(gradients(network), expected)
    assert list(network.state_dict()) == keys
    restore_blocks(network)
    assert all("forward" not in vars(part) for part in network.modules())


def test_recomputed_blocks_keep_their_inputs_alone():
    kept, network = {}, DiT(8, in_channels=1, hidden_size=16, depth=4, num_heads=2)
    x = torch.randn(2, 1, 8, 8)
    for every in (None, 2, 1):
        restore_blocks(network)
        if every is not None:
            assert checkpoint_blocks(network, every) == [f"blocks.{i}" for i in range(0, 4, every)]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, s=sizes: s.append(v.numel()) or v, lambda v: v):
            network(x, torch.rand(2))
        kept[every] = sum(sizes)
    assert kept[1] < kept[2] < kept[None]
    assert kept[1] < 0.4 * kept[None]


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        checkpoint_blocks(dit(), 0)


@pytest.mark.parametrize("first", ["checkpoint", "compile"])
def test_blocks_share_one_compilation_and_recompute_inside_of_it(first):
    network, counter = dit(depth=3), CompileCounter()
    expected, keys = gradients(network), list(network.state_dict())
    calls = [checkpoint_blocks, lambda n: compile_blocks(n, backend=counter)]
    for call in calls if first == "checkpoint" else calls[::-1]:
        call(network)
    torch._dynamo.reset()
    assert_same(gradients(network), expected)
    assert_same(gradients(network), expected)
    assert counter.frame_count == 1
    assert list(network.state_dict()) == keys
    run = vars(network.blocks[0])["forward"]
    assert run.recompute
    assert run.compiler == {"backend": counter}


def test_a_whole_network_is_one_compilation():
    network, counter = dit(depth=2), CompileCounter()
    expected = gradients(network)
    compile_network(network, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    assert_same(gradients(network), expected)
    assert counter.frame_count == 1
    restore_blocks(network)
    assert "forward" not in vars(network)


def test_inductor_gives_the_same_gradients():
    network = dit()
    expected = gradients(network)
    compile_blocks(network)
    assert_same(gradients(network), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_copy_computes_with_its_own_weights(copied):
    network = dit(depth=2)
    expected = gradients(network)
    checkpoint_blocks(network)
    compile_blocks(network, backend="eager")
    gradients(network)  # compiled functions exist
    other = copied(network)
    assert_same(gradients(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert gradients(other)["loss"] == 0
    assert_same(gradients(network), expected)


# ------------------------------------------------------------------ sharded (two processes: tests/strategies)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", networks())
def test_a_sharded_network_computes_the_same(name, mesh):
    network = networks()[name]
    expected, keys = gradients(network), list(network.state_dict())
    assert not is_sharded(network)
    assert shard_blocks(network, mesh) == list(blocks_of(network)) == shard_blocks(network, mesh)
    assert is_sharded(network)
    assert list(network.state_dict()) == keys
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert_same({name: whole(value) for name, value in gradients(network).items()}, expected, rtol=1e-5, atol=1e-6)


def test_weights_replaced_between_two_forward_passes_are_seen(mesh):
    network = dit(depth=2)
    shard_blocks(network, mesh)
    x, condition = torch.randn(2, 1, 4, 4), Condition(label=torch.tensor([0, 1]))
    with torch.no_grad():
        network(x, torch.rand(2), condition)
        for parameter in network.parameters():
            parameter.zero_()
        assert not network(x, torch.rand(2), condition).any()


def test_whole_and_sharded_are_inverse(mesh):
    network = dit()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shard_blocks(network, mesh)
    state = whole({"state": dict(network.state_dict()), "more": [1, (2.0, "x")]})
    assert state["more"] == [1, (2.0, "x")]
    assert_same(state["state"], before)
    for name, value in network.state_dict().items():
        again = sharded_like(before[name], value)
        assert isinstance(again, DTensor)
        assert torch.equal(again.to_local(), value.to_local())
    assert sharded_like(before[name], before[name]) is before[name]


def test_a_sharded_network_is_compiled_by_blocks_only(mesh):
    network = dit(depth=2)
    expected = gradients(network)
    compile_blocks(network, backend="aot_eager")
    shard_blocks(network, mesh)
    torch._dynamo.reset()
    found = {name: whole(value) for name, value in gradients(network).items()}
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a sharded network is compiled block by block"):
        compile_network(network)


def test_a_mesh_of_two_axes_is_refused(mesh):
    two = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"mesh must have one axis, got 2: \('a', 'b'\)"):
        shard_blocks(dit(), two)


def test_the_class_of_a_block_is_what_it_was():
    network = dit(depth=1)
    checkpoint_blocks(network)
    assert type(network.blocks[0]) is DiTBlock


LEAVES = """
import atexit, sys
import torch.distributed as dist
from lightning_flows.networks.parallel import leave_group_at_exit

atexit.register(lambda: print("in a group:", dist.is_initialized(), flush=True))  # runs last
leave_group_at_exit()
leave_group_at_exit()
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
dist.all_gather_object([None], {"an": "object"})
if len(sys.argv) > 2:
    raise RuntimeError(sys.argv[2])
"""


@pytest.mark.parametrize(("error", "inside"), [([], False), (["it broke"], True)])
def test_a_process_leaves_its_group_before_the_interpreter_ends_unless_it_failed(tmp_path, error, inside):
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "group"), *error]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == (1 if error else 0), result.stderr  # not -6: gloo has not aborted it while it ended
    assert all(word in result.stderr for word in error)
    assert result.stdout.strip() == f"in a group: {inside}"
