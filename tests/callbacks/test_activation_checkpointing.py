"""Recomputed activations change the memory of a training, and nothing else."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_flows.callbacks import ActivationCheckpointing
from tests.callbacks.short_fit import STEPS, assert_untouched, build, short_fit
from tests.callbacks.toy import Toy, data, trainer
from tests.modules.test_resume import STATE, differences


class Calls(Callback):
    """How often the attention of each block computed in the training steps."""

    def __init__(self):
        self.counts = []

    def on_train_start(self, trainer, module):
        self.counts = [0] * len(module.network.blocks)
        for i, block in enumerate(module.network.blocks):
            block.attn.register_forward_hook(lambda *_, i=i: self._count(i))

    def _count(self, i):
        self.counts[i] += 1


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return short_fit(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2]), (2, [2, 1])])
def test_loss_weights_and_checkpoint_are_the_same_bit_for_bit(tmp_path, usual, every, calls):
    counted = Calls()
    losses, module, saved = short_fit(tmp_path, ActivationCheckpointing(every), counted)
    assert counted.counts == [STEPS * n for n in calls]
    assert losses == usual[0]
    for part in STATE:
        assert differences(saved[part], usual[2][part], part) == []
    inside = load_file(tmp_path / "inside" / "model.safetensors")
    assert inside.keys() == module.state_dict().keys()
    for part in module.network.blocks:
        part.attn._forward_hooks.clear()
    assert_untouched(module)


def test_a_run_goes_on_with_and_without_it(tmp_path, usual):
    first = short_fit(tmp_path / "first", ActivationCheckpointing(), steps=2)
    rest = short_fit(tmp_path / "rest", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert first[0] + rest[0] == usual[0]
    again = short_fit(tmp_path / "again", ActivationCheckpointing(2), ckpt_path=tmp_path / "first" / "last.ckpt")
    for part in STATE:
        assert differences(rest[2][part], usual[2][part], part) == []
        assert differences(again[2][part], usual[2][part], part) == []


class Broken(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("broken")


def test_an_exception_leaves_the_network_as_it_was(tmp_path):
    module = build()
    with pytest.raises(RuntimeError, match="broken"):
        short_fit(tmp_path, ActivationCheckpointing(), Broken(), module=module)
    assert_untouched(module)


def test_only_a_fit_is_changed(tmp_path):
    module = build()
    callback = ActivationCheckpointing()
    callback.setup(trainer(tmp_path), module, "test")
    assert_untouched(module)


def test_what_it_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ActivationCheckpointing(0)
    with pytest.raises(ValueError, match="ActivationCheckpointing needs a module with a network; Toy has none"):
        trainer(tmp_path, ActivationCheckpointing(), max_steps=1).fit(Toy(), data())
    module = build()
    module.network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no blocks"):
        trainer(tmp_path, ActivationCheckpointing(), max_steps=1).fit(module, data())
