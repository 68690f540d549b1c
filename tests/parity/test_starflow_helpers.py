"""STARFlow's helpers: strings, sizes and curves of `starflow/helpers.json`, every entry that is there."""

import json
import os
from pathlib import Path

import pytest

from lightning_flows.codecs import PromptTemplate
from tests.parity.parity_cases import NO_CASES, VARIABLE


def every_entry(name):
    """Parametrizes a test with ``entry`` for every entry of one list of the helpers."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        missing = pytest.mark.skip(reason=f"{VARIABLE} does not name the folder of reference numbers")
        return pytest.mark.parametrize("entry", [pytest.param(None, marks=missing, id=name)])
    file = Path(folder, "starflow", "helpers.json")
    entries = json.loads(file.read_text())[name] if file.is_file() else []
    values = [pytest.param(entry, id=f"{name}/{i}") for i, entry in enumerate(entries)]
    return pytest.mark.parametrize("entry", values or [pytest.param(None, id=NO_CASES)])


@every_entry("prompt_building")
def test_prompts_are_the_official_strings(entry):
    names = {"frames_per_second": "fps", "noise_std": "noise_std", "aspect_ratio": "aspect", "chat_template": "chat"}
    facts = {names.get(key, key): value for key, value in entry.items() if key not in ("captions", "result")}
    assert PromptTemplate(**facts).build(entry["captions"]) == entry["result"]
    chat = facts.pop("chat")
    assert PromptTemplate(chat=chat).build(entry["captions"], **facts) == entry["result"]
