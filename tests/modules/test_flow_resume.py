"""Normalizing flows go on where they stopped, bit for bit; recomputed and compiled layers change nothing."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lightning_flows.callbacks import ActivationCheckpointing, Compile
from lightning_flows.codecs import WordEncoder
from lightning_flows.modules import WarmupCosine
from tests.callbacks.short_fit import assert_untouched, short_fit
from tests.modules import test_resume as resume
from tests.modules.tiny_flow import flow, star, tar, texts

NAMES = [f"digit {i} of ten" for i in range(10)]


def made(network, **options):
    return flow(
        network,
        std=0.2,
        penalty=1e-3,
        standardize=1,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=12, warmup_steps=3),
        **options,
    )


class Named(resume.Digits):
    """Digits with captions."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "caption": [NAMES[i] for i in batch["label"].tolist()]}


def written():
    torch.manual_seed(1)
    return made(texts(input_size=8), text=WordEncoder(6, length=5, buckets=64))


FLOWS = {
    "tarflow": lambda: made(tar(input_size=8, num_classes=10)),
    "volume preserving": lambda: made(tar(input_size=8, num_classes=10, volume_preserving=True)),
    "starflow": lambda: made(star(input_size=8, num_classes=10)),
    "captions": written,
}


@pytest.fixture(autouse=True)
def _restore_random_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize(("name", "accumulate"), [(name, 1) for name in FLOWS] + [("starflow", 2)])
def test_k_steps_and_k_more_are_2k_steps(tmp_path, monkeypatch, name, accumulate):
    monkeypatch.setattr(resume, "build", FLOWS[name])
    if name == "captions":
        monkeypatch.setattr(resume, "Digits", Named)
    k = 2
    whole = resume.run(tmp_path / "whole", 2 * k, accumulate=accumulate)
    first = resume.run(tmp_path / "first", k, accumulate=accumulate)
    saved = resume.step(tmp_path / "first", k)
    rest = resume.run(tmp_path / "rest", 2 * k, accumulate=accumulate, ckpt_path=saved)
    resume.assert_same_end(whole, first, rest)
    end, start = whole[1]["current_model_state"], FLOWS[name]().state_dict()
    assert end.keys() == start.keys()
    still = [key for key, value in end.items() if torch.equal(value, start[key])]
    assert still == []  # every weight and every statistic has moved


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_recomputed_and_compiled_layers_learn_the_same(tmp_path):
    usual, _, saved = short_fit(tmp_path / "usual", module=FLOWS["starflow"]())
    counter = CompileCounter()  # compiles to what was written: the same numbers
    for name, callback in (
        ("recomputed", ActivationCheckpointing()),
        ("compiled", Compile("blocks", backend=counter, fullgraph=True)),
    ):
        losses, module, end = short_fit(tmp_path / name, callback, module=FLOWS["starflow"]())
        assert losses == (usual if name == "recomputed" else pytest.approx(usual, rel=1e-5)), name
        assert end["state_dict"].keys() == saved["state_dict"].keys()
        for key, value in saved["state_dict"].items():
            torch.testing.assert_close(end["state_dict"][key], value, rtol=1e-4, atol=1e-5)
        assert_untouched(module)
    assert 1 <= counter.frame_count <= 2  # layers with and without a prefix
