"""A run with an adapter: it resumes exactly, and everything downstream of its checkpoints sees a plain model."""

import copy
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_flows as lf
from lightning_flows.callbacks import EMA, LoRA
from lightning_flows.modules import init_from
from lightning_flows.modules.pretrained import read_checkpoint
from lightning_flows.networks import adapters_of
from lightning_flows.store import load_tensors
from tests.callbacks.lora_ranks import fit_on
from tests.callbacks.toy import trainer
from tests.modules import test_resume as resumed
from tests.modules.tiny import batch, dit, model

CPU = {"max_steps": 3, "gradient_clip_val": 1.0}
TRAIN = ["y_embedder.*"]


def output(module):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 1, 4, 4, generator=g), torch.rand(3, generator=g)
    with torch.no_grad():
        return module.eval().network(x.to(module.dtype), t, lf.Condition(label=torch.arange(3)))


def close(a, b):
    return torch.allclose(a, b, rtol=2e-6, atol=2e-6 * b.abs().max().item())


def data():
    return torch.utils.data.DataLoader([batch()], batch_size=None)


def base(lr=0.05):
    return model(optimizer=functools.partial(torch.optim.AdamW, lr=lr))


def fitted(folder, *callbacks, module=None, lora=None, **options):
    module = module or base()
    saves = ModelCheckpoint(folder, filename="{step}", save_last=True)
    lora = lora or LoRA(4, train=TRAIN)
    run = trainer(folder, *callbacks, lora, saves, **{**CPU, **options})
    run.fit(module, data())
    return module, run


def test_only_the_adapter_moves_and_it_is_saved_by_itself(tmp_path):
    module, _ = fitted(tmp_path)
    start, end = base().state_dict(), module.state_dict()
    moved = {name for name, value in end.items() if name in start and not torch.equal(value, start[name])}
    assert moved == {"network.y_embedder.embedding_table.weight"}
    frozen = [name for name in end if ".base_layer." in name]
    assert len(frozen) == 2 * 5
    assert all(torch.equal(end[name], start[name.replace(".base_layer.", ".")]) for name in frozen)
    other = base()
    assert not close(output(other), output(module))
    assert torch.equal(output(lf.load_adapter(other, tmp_path / "adapter")), output(module))
    sizes = [
        path.stat().st_size for path in (tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "last.ckpt")
    ]
    assert sizes[0] < sizes[1] / 5


@pytest.mark.parametrize("order", ["none", "before", "after"])
def test_checkpoints_are_read_as_plain_models(tmp_path, order):
    lora, average = LoRA(4, train=TRAIN), EMA(0.5)
    callbacks = {"none": [lora], "before": [average, lora], "after": [lora, average]}[order]
    module, run = fitted(tmp_path, *callbacks, lora=Callback())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    wanted = output(module)  # after a fit with an average: of the average
    for name in ("last.ckpt", "weights.ckpt"):
        read = lf.from_pretrained(tmp_path / name)
        assert list(read.state_dict()) == list(base().state_dict())
        assert close(output(read), wanted)
        other = base()
        assert init_from(other, tmp_path / name) == []
        assert close(output(other), wanted)
    assert torch.equal(output(lf.load_adapter(base(), tmp_path / "adapter")), wanted)


def test_the_average_is_one_of_the_adapter(tmp_path):
    _, _ = fitted(tmp_path, EMA(0.5))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average, raw = content["state_dict"], content["current_model_state"]
    differ = {name for name in raw if not torch.equal(average[name], raw[name])}
    assert differ == {name for name in raw if ".lora_" in name or "y_embedder" in name}


def test_merged_weights_of_a_16_bit_run_keep_what_training_added(tmp_path):
    module, _ = fitted(tmp_path, precision="bf16-true")
    assert module.network.blocks[0].mlp.fc1.base_layer.weight.dtype == torch.bfloat16
    _, tensors = read_checkpoint(tmp_path / "last.ckpt")
    layer, name = module.network.blocks[0].mlp.fc1, "network.blocks.0.mlp.fc1.weight"
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert tensors[name].dtype == torch.float32
    assert torch.allclose(tensors[name].double(), layer.base_layer.weight.double() + b @ a, atol=1e-7)


def test_mixed_precision_keeps_the_adapter_in_float32(tmp_path):
    module, _ = fitted(tmp_path, precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert close(output(lf.from_pretrained(tmp_path / "last.ckpt")), output(module))


def test_a_second_fit_goes_on_with_the_same_adapter(tmp_path):
    lora = LoRA(4)
    module, _ = fitted(tmp_path / "one", lora=lora)
    before = copy.deepcopy(module.state_dict())
    fitted(tmp_path / "two", lora=lora, module=module)
    assert adapters_of(module) == {"default": 1.0}
    assert not torch.equal(module.state_dict()[A], before[A])


A = "network.blocks.0.mlp.fc1.lora_A.default.weight"


def test_other_stages_and_no_folder(tmp_path):
    module, run = base(), trainer(tmp_path, LoRA(), limit_val_batches=1)
    run.validate(module, data(), verbose=False)
    assert adapters_of(module) == {}
    fitted(tmp_path, lora=LoRA(save_to=None))
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("stop", [2, resumed.STEPS[1]])
def test_k_steps_and_k_more_are_2k_steps(tmp_path, stop):
    def part(name, steps, ckpt=None):
        lora = LoRA(2, train=TRAIN)
        return resumed.run(tmp_path / name, steps, callbacks=[lora], ckpt_path=ckpt)

    whole = part("whole", 2 * stop)
    first = part("first", stop)
    rest = part("rest", 2 * stop, resumed.step(tmp_path / "first", stop))
    assert any(".lora_A." in name for name in whole[1]["state_dict"])
    resumed.assert_same_end(whole, first, rest)


def test_a_run_resumed_from_merged_weights_finds_its_base_again(tmp_path):
    """As the command line does: the model is first given the weights of the checkpoint."""
    start = base()
    start.origin = "org/base@abc"
    plain = output(start)
    fitted(tmp_path / "first", module=start)
    module = lf.from_pretrained(tmp_path / "first" / "last.ckpt")
    run = trainer(tmp_path / "rest", LoRA(4, train=TRAIN), **{**CPU, "max_steps": 5})
    run.fit(module, data(), ckpt_path=tmp_path / "first" / "last.ckpt")
    assert module.origin == "org/base@abc"
    assert '"revision": "abc"' in (tmp_path / "rest" / "adapter" / "adapter_config.json").read_text()
    assert torch.equal(output(lf.remove_adapters(module)), plain)


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    fitted(tmp_path / "with")
    run = trainer(tmp_path, **{**CPU, "max_steps": 5})
    with pytest.raises(
        ValueError, match=r"with the adapters \['default'\] and the model has \[\]: resume with the callback"
    ):
        run.fit(base(), data(), ckpt_path=tmp_path / "with" / "last.ckpt")
    plain = trainer(tmp_path / "without", ModelCheckpoint(tmp_path / "without", save_last=True), **CPU)
    plain.fit(base(), data())
    run = trainer(tmp_path, LoRA(), **{**CPU, "max_steps": 5})
    with pytest.raises(ValueError, match=r"with the adapters \[\] and the model has \['default'\]"):
        run.fit(base(), data(), ckpt_path=tmp_path / "without" / "last.ckpt")


def test_three_lines_of_python_without_the_callback(tmp_path):
    module = base()
    lf.add_lora(module, rank=4)
    saves = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, saves, **CPU).fit(module, data())
    lf.save_adapter(module, tmp_path / "out")
    assert len(load_tensors(tmp_path / "out" / "adapter_model.safetensors")) == 10
    assert close(output(lf.from_pretrained(tmp_path / "last.ckpt")), output(module))
    again = base()
    lf.add_lora(again, rank=4)
    trainer(tmp_path, **{**CPU, "max_steps": 4}).fit(again, data(), ckpt_path=tmp_path / "last.ckpt")


def test_wrong_settings_are_said_when_the_fit_starts(tmp_path):
    with pytest.raises(ValueError, match=r"targets=\['nonsense'\] hits nothing"):
        fitted(tmp_path, lora=LoRA(targets=["nonsense"]))


def test_another_network_with_the_same_callback(tmp_path):
    module, _ = fitted(tmp_path, module=model(dit(depth=2, qk_norm=True)), lora=LoRA(2, targets=["blocks.*.mlp.*"]))
    assert sum(".lora_A." in name for name in module.state_dict()) == 4


# ------------------------------------------------------------------ two processes


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.callbacks.lora_ranks", str(tmp_path / "two"), "2"]
    ranks = [env | {"LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [subprocess.Popen(command, cwd=Path(__file__).parents[2], env=rank) for rank in ranks]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    fit_on(tmp_path / "one", 1)
    two, one = (load_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name
        assert value.abs().max() > 0, name
    merged = [read_checkpoint(tmp_path / name / "resumed.ckpt")[1] for name in ("two", "one")]
    assert all(torch.allclose(merged[0][name], value, rtol=1e-4, atol=1e-6) for name, value in merged[1].items())
