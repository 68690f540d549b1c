"""STARFlow's helpers: strings, sizes and curves of `starflow/helpers.json`, every entry that is there."""

import json

import pytest
import torch

from lightning_flows.codecs import PromptTemplate
from lightning_flows.modules import WarmupCosine
from tests.parity.parity_cases import parameters


def every_entry(name):
    """Parametrizes a test with ``entry`` for every entry of one list of the helpers."""

    def found(folder):
        file = folder / "starflow/helpers.json"
        entries = json.loads(file.read_text())[name] if file.is_file() else []
        return [(f"{name}/{i}", (entry,)) for i, entry in enumerate(entries)]

    return parameters(name, ("entry",), found)


@every_entry("prompt_building")
def test_prompts_are_the_official_strings(entry):
    names = {"frames_per_second": "fps", "noise_std": "noise_std", "aspect_ratio": "aspect", "chat_template": "chat"}
    facts = {names.get(key, key): value for key, value in entry.items() if key not in ("captions", "result")}
    assert PromptTemplate(**facts).build(entry["captions"]) == entry["result"]
    chat = facts.pop("chat")
    assert PromptTemplate(chat=chat).build(entry["captions"], **facts) == entry["result"]


@every_entry("learning_rate_schedules")
def test_learning_rates_are_the_official_ones(entry):
    known = {"family", "warmup_steps", "total_steps", "min_lr", "max_lr", "lr_after_step_0_to_n"}
    assert set(entry) == known
    least, most, wanted = entry["min_lr"], entry["max_lr"], entry["lr_after_step_0_to_n"]
    begin = {"tarflow": least, "starflow": min(least, 1e-6)}[entry["family"]]
    options = {"start": begin / most, "first": least / most, "final": least / most}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=most)
    steps = {name: entry[name] for name in ("warmup_steps", "total_steps")}
    schedule, seen = WarmupCosine(optimizer, **steps, **options), []
    for _ in wanted:
        seen += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(wanted, rel=1e-9)
