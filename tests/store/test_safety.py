"""What a stranger's config may name: walked, never trusted for its prefix, and refused before any import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_flows.store import build, check

LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
FOREIGN = [
    "os.system",
    "torch.nn.parallel.distributed.os.system",
    "torch.nn.modules.module.OrderedDict",
    "torch.optim.lr_scheduler.Counter",
    "torch.nn.functional.linear",
    "torch.nn.modules.activation.Linear",
    "torch.nnx.Linear",
    "torch.nn",
    "torch.nn.",
    "torch.nn..Linear",
    "torch.nn.Linear.__init__",
    "torch.nn.__builtins__.eval",
    "torch.nn.Absent",
    "torch.save",
    "torch.utils.data.Dataset",
    "builtins.eval",
    "subprocess.Popen",
    "lightning_flows.store.recording.Mapping",
    "lightning_flows.store.resolve.Path",
    "lightning_flows.store.build",
    "lightning_flows.__main__.main",
    "lightning_flowsx.Thing",
    "",
    "system",
]


def nested(path):
    bad = {"class_path": path, "init_args": {"command": "true"}}

    def linear(value):
        return {"class_path": "torch.nn.Linear", "init_args": {"in_features": value, "out_features": 3}}

    return {
        "top": bad,
        "argument": linear(bad),
        "list": linear([1, [bad]]),
        "dict": linear({"a": {"b": bad}}),
        "deep": {
            "class_path": "torch.nn.Sequential",
            "init_args": {"x": {"class_path": "torch.nn.Linear", "init_args": {"y": [{"z": bad}]}}},
        },
    }


@pytest.mark.parametrize("place", sorted(nested("")))
@pytest.mark.parametrize("path", FOREIGN)
def test_a_foreign_class_path_is_refused_wherever_it_stands(path, place, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a command was run"))
    with pytest.raises(ValueError, match=r"class_path|not a class|config") as caught:
        build(nested(path)[place])
    assert repr(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("path", ["torch.nn.Linear", "torch.nn.modules.linear.Linear"])
def test_a_class_is_accepted_under_its_own_path_and_its_alias(path):
    assert isinstance(build({**LINEAR, "class_path": path}), torch.nn.Linear)


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        "torch.nn.Linear",
        {},
        {"init_args": {}},
        {"class_path": 3},
        {"class_path": ["os.system"]},
        {"class_path": "torch.nn.Linear", "init_args": []},
        {"class_path": "torch.nn.Linear", "init_args": {}, "dict_kwargs": {"x": 1}},
    ],
)
def test_what_is_not_an_entry_is_refused(config):
    with pytest.raises(ValueError, match="config"):
        check(config)


def test_the_outermost_class_must_be_what_is_asked_for():
    check(LINEAR, torch.nn.Module)
    with pytest.raises(ValueError, match=r"not a subclass of torch.optim.Optimizer"):
        check(LINEAR, torch.optim.Optimizer)


def transformer(layer):
    return {
        "class_path": "torch.nn.TransformerEncoder",
        "init_args": {"encoder_layer": layer, "num_layers": 1},
    }


def test_an_argument_takes_only_subclasses_of_its_annotation():
    layer = {"class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"d_model": 4, "nhead": 1}}
    assert isinstance(build(transformer(layer)), torch.nn.TransformerEncoder)
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {}}
    with pytest.raises(ValueError, match=r"config.encoder_layer: 'torch.optim.AdamW' is not a subclass of"):
        build(transformer(adamw))


def test_wrong_arguments_are_one_clear_sentence():
    with pytest.raises(ValueError, match=r"torch.nn.Linear cannot be built from the arguments \['colour'\]"):
        build({"class_path": "torch.nn.Linear", "init_args": {"colour": 1}})


def test_overrides_by_name_by_place_and_never_by_guess():
    layer = {"class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"d_model": 4, "nhead": 1}}
    assert build(LINEAR, out_features=5).out_features == 5
    assert build(transformer(layer), nhead=2).layers[0].self_attn.num_heads == 2
    assert build(transformer(layer), **{"encoder_layer.nhead": 4}).layers[0].self_attn.num_heads == 4
    with pytest.raises(ValueError, match=r"'heads' is no argument of torch.nn.TransformerEncoder"):
        build(transformer(layer), heads=2)
    twice = {"class_path": "torch.nn.Sequential", "init_args": {"a": LINEAR, "b": LINEAR}}
    with pytest.raises(ValueError, match=r"say which of \['a.in_features', 'b.in_features'\]"):
        build(twice, in_features=1)
    assert LINEAR["init_args"]["out_features"] == 3


AUDIT = """
import sys
import lightning_flows.store as store
import torch.optim, torch.nn

CONFIGS = {configs}
for config in CONFIGS:
    before = set(sys.modules)
    events = []
    recording = [True]
    sys.addaudithook(lambda name, args: events.append((name, args)) if recording[0] else None)
    try:
        store.build(config)
    except ValueError as error:
        recording[0] = False
    else:
        raise SystemExit("accepted " + repr(config))
    foreign = [m for m in set(sys.modules) - before if m.split(".")[0] not in ("torch", "lightning_flows")]
    assert not foreign, foreign
    assert not [e for e in events if e[0] in ("os.system", "subprocess.Popen", "exec")], events
    assert not [e for e in events if e[0] == "import" and e[1][0].split(".")[0] == "evil"], events
assert "evil" not in sys.modules
print("refused", len(CONFIGS))
"""


def run_python(code, folder, **environment):
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def evil(tmp_path) -> Path:
    """A folder on the import path with a module that leaves a trace when it is imported."""
    (tmp_path / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\nclass Net:\n    pass\n"
    )
    return tmp_path


def test_nothing_foreign_is_imported_or_run_for_a_refused_config(evil):
    configs = [
        config
        for path in ("evil.Net", "os.system", "torch.nn.parallel.distributed.os.system")
        for config in nested(path).values()
    ]
    result = run_python(AUDIT.format(configs=configs), evil)
    assert result.stdout.strip() == f"refused {len(configs)}", result.stderr
    assert not (evil / "trace").exists()


def test_consent_lifts_the_check(evil):
    code = (
        "from lightning_flows.store import build\n"
        "print(type(build({'class_path': 'evil.Net', 'init_args': {}}, trust_remote_code=True)).__name__)"
    )
    result = run_python(code, evil)
    assert result.stdout.strip() == "Net", result.stderr
    assert (evil / "trace").exists()


def test_consent_still_asks_for_a_class():
    with pytest.raises(ValueError, match=r"no class is found at 'os.system'"):
        build({"class_path": "os.system", "init_args": {}}, trust_remote_code=True)


def test_the_store_is_light():
    heavy = "lightning torchmetrics torchvision diffusers transformers timm huggingface_hub jsonargparse"
    code = f"import sys, lightning_flows.store\nprint([m for m in '{heavy}'.split() if m in sys.modules])"
    assert run_python(code, "").stdout.strip() == "[]"
