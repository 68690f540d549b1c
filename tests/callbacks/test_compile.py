"""A compiled run learns what an uncompiled one learns, under the same names, and compiles a fixed number of times."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from lightning_flows.callbacks import ActivationCheckpointing, Compile
from lightning_flows.data import Requests
from lightning_flows.flow import ClassifierFree, Condition, ZeroStar
from lightning_flows.networks.parallel import compile_blocks
from tests.callbacks.short_fit import STEPS, assert_untouched, build, short_fit
from tests.callbacks.toy import Toy, data, trainer
from tests.modules.test_resume import STATE, differences

LABELS = torch.tensor([0, 3, 7, 1])


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return short_fit(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    ("callbacks", "graphs"),
    [
        (lambda counter: [Compile("blocks", backend=counter, fullgraph=True)], 1),
        (lambda counter: [Compile("network", backend=counter, fullgraph=True)], 1),
        (lambda counter: [Compile("blocks", backend=counter), ActivationCheckpointing()], 1),
        (lambda counter: [ActivationCheckpointing(2), Compile("blocks", backend=counter)], 2),
    ],
    ids=["blocks", "network", "blocks, recomputed", "half of them recomputed"],
)
def test_losses_weights_and_names_are_the_same(tmp_path, usual, callbacks, graphs):
    counter = CompileCounter()  # compiles to what was written: the same numbers
    losses, module, saved = short_fit(tmp_path, *callbacks(counter))
    assert counter.frame_count == graphs
    assert losses == pytest.approx(usual[0], rel=1e-6)
    for part in STATE:
        assert _names(saved[part]) == _names(usual[2][part])
    for name, value in usual[2]["state_dict"].items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    assert load_file(tmp_path / "inside" / "model.safetensors").keys() == module.state_dict().keys()
    assert_untouched(module)


def _names(value):
    return {k: _names(v) for k, v in value.items()} if isinstance(value, dict) else type(value)


def test_a_run_goes_on_with_and_without_it(tmp_path, usual):
    short_fit(tmp_path / "first", Compile(backend="eager"), steps=2)
    for name, callbacks in (("with", [Compile(backend="eager")]), ("without", [])):
        losses, _, _ = short_fit(tmp_path / name, *callbacks, ckpt_path=tmp_path / "first" / "last.ckpt")
        assert losses == pytest.approx(usual[0][2:], rel=1e-6)


class Step(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = torch.nn.Linear(2, width), torch.nn.Linear(width, 2)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def test_blocks_of_more_shapes_than_torch_expects_are_all_compiled():
    counter, shapes = CompileCounter(), 11  # torch gives up after 8 compilations of one function
    network = torch.nn.Sequential(torch.nn.ModuleList(Step(width) for width in range(2, 2 + shapes)))
    compile_blocks(network, backend=counter)
    x = torch.randn(3, 2)
    for block in network[0]:
        x = block(x)
    assert counter.frame_count == shapes


# ---------------------------------------------------------------------- sampling


def sampled(module, tmp_path, callback, samples):
    """What ``samples`` gives inside a prediction of the trainer with the callback."""
    found = []

    class Inside(Callback):
        def on_predict_start(self, trainer, module):
            found.append(samples(module))

    callbacks = [callback, Inside()] if callback is not None else [Inside()]
    requests = Requests(labels=LABELS.tolist(), seed=3, batch_size=4)
    trainer(tmp_path, *callbacks, inference_mode=False).predict(module, requests, return_predictions=False)
    return found[0]


def test_a_guided_evaluation_is_compiled_once_for_all_steps_and_batches(tmp_path):
    counter, module, graphs = CompileCounter(), build(), []

    def samples(model):
        made = []
        for steps, labels in ((4, LABELS), (4, LABELS.flip(0)), (7, LABELS)):
            made.append(model.sample(Condition(label=labels), seed=steps, steps=steps))
            graphs.append(counter.frame_count)
        return made

    expected = sampled(module, tmp_path, None, samples)
    assert graphs == [0, 0, 0]
    graphs.clear()
    found = sampled(module, tmp_path, Compile("sampling", backend=counter, fullgraph=True), samples)
    assert graphs == [1, 1, 1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert module.compiled_evaluate is None
    assert_untouched(module)


def test_guidance_in_an_interval_compiles_no_more_with_more_steps(tmp_path):
    guidance = ClassifierFree(2.0, (0.2, 0.6))
    counter, module, graphs = CompileCounter(), build(), []

    def samples(model):
        made = []
        for steps in (5, 9):
            made.append(model.sample(Condition(label=LABELS), seed=0, steps=steps, guidance=guidance))
            graphs.append(counter.frame_count)
        return made

    expected = sampled(module, tmp_path, None, samples)
    graphs.clear()
    found = sampled(module, tmp_path, Compile("sampling", backend=counter), samples)
    assert graphs[0] == graphs[-1] >= 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_guidance_that_remembers_is_not_compiled(tmp_path):
    counter = CompileCounter()

    def samples(model):
        made = model.sample(Condition(label=LABELS), seed=0, guidance=ZeroStar(2.0))
        return made, counter.frame_count

    expected, _ = sampled(build(), tmp_path, None, samples)
    found, graphs = sampled(build(), tmp_path, Compile("sampling", backend=counter), samples)
    assert graphs == 0
    assert torch.equal(found, expected)


def test_training_and_sampling_are_compiled_side_by_side(tmp_path):
    counter, module = CompileCounter(), build()

    class Samples(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.sample(Condition(label=LABELS), seed=0)

    both = [Compile("blocks", backend="eager"), Compile("sampling", backend=counter)]
    short_fit(tmp_path, *both, Samples(), module=module)
    assert counter.frame_count == 1
    assert module.compiled_evaluate is None
    assert_untouched(module)


# ---------------------------------------------------------------------- the real compiler, and what is refused


@pytest.mark.slow
def test_inductor_learns_the_same_to_1e4(tmp_path, usual):
    losses, module, saved = short_fit(tmp_path, Compile("blocks"), Compile("sampling"))
    assert len(losses) == STEPS
    assert losses == pytest.approx(usual[0], rel=1e-4)
    for name, value in usual[2]["current_model_state"].items():
        found = saved["current_model_state"][name]
        if name.endswith("qkv.bias"):  # attention does not depend on a key's bias: AdamW follows round-off there
            found, value = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (found, value))
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
    assert differences(saved["averaging_state"], usual[2]["averaging_state"]) == []
    assert_untouched(module)


class Broken(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("broken")


@pytest.mark.parametrize("part", ["blocks", "network", "sampling"])
def test_an_exception_leaves_the_module_as_it_was(tmp_path, part):
    module = build()
    with pytest.raises(RuntimeError, match="broken"):
        short_fit(tmp_path, Compile(part, backend="eager"), Broken(), module=module)
    assert module.compiled_evaluate is None
    assert_untouched(module)


def test_what_it_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match="part must be one of"):
        Compile("everything")
    with pytest.raises(ValueError, match="Compile needs a module with a network; Toy has none"):
        trainer(tmp_path, Compile(), max_steps=1).fit(Toy(), data())
    with pytest.raises(ValueError, match="part='sampling' is not known to Toy"):
        trainer(tmp_path, Compile("sampling"), max_steps=1).fit(Toy(), data())
    for part in ("network", "sampling"):
        sharded = trainer(tmp_path, strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
        with pytest.raises(ValueError, match=f"compiled by part='blocks', got part='{part}'"):
            Compile(part).setup(sharded, build(), "fit")
