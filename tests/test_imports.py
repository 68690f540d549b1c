"""Light rooms stay light: names come when they are used, and readers of the code still see them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "pytorch_lightning", "torchmetrics", "torchvision", "transformers", "diffusers", "timm", "peft")


def fresh(code):
    """What a new interpreter prints as JSON."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def loaded():
    """Top-level packages that are loaded after each import, one after the other in one process."""
    code = """
import importlib, json, sys
found = {}
for name in ("", ".flow", ".networks", ".store"):
    importlib.import_module("lightning_flows" + name)
    found[name] = sorted({module.partition(".")[0] for module in sys.modules})
print(json.dumps(found))
"""
    return fresh(code)


@pytest.mark.parametrize("room", ["", ".flow", ".networks", ".store"])
def test_the_lower_floors_load_nothing_heavy(loaded, room):
    assert set(loaded[room]).isdisjoint(HEAVY)


def test_the_package_itself_loads_not_even_torch(loaded):
    assert "torch" not in loaded[""]
    assert "torch" in loaded[".flow"]  # the list would show it


def test_the_rooms_of_lightning_need_neither_diffusers_nor_transformers():
    """Lightning may load transformers for itself; after it, whoever asks for one of them fails."""
    code = """
import lightning, lightning.pytorch.cli, json, sys
before = {module.partition(".")[0] for module in sys.modules}
blocked = ("diffusers", "transformers", "timm", "trimesh", "av", "peft", "torch_fidelity", "sklearn")
sys.modules.update(dict.fromkeys(blocked))
import lightning_flows.codecs, lightning_flows.data, lightning_flows.callbacks, lightning_flows.modules
import lightning_flows.metrics
print(json.dumps(sorted({module.partition(".")[0] for module in sys.modules} - before)))
"""
    assert "lightning_flows" in fresh(code)


def test_public_names_are_listed_and_found():
    import lightning_flows as lf

    names = [name for name in lf.__all__ if not name.startswith("__")]
    assert [getattr(lf, name).__name__ for name in names] == names
    assert lf.from_pretrained is lf.modules.from_pretrained
    assert lf.data.__name__ == "lightning_flows.data"
    assert {*lf.__all__, "flow", "networks", "store", "modules", "data"} <= set(dir(lf))
    assert lf.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    import lightning_flows

    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = lightning_flows.nonsense
    assert "nonsense" not in dir(lightning_flows)


def test_type_checkers_see_the_names(tmp_path):
    """Mypy without site-packages, so that it reads the package alone: foreign classes are Any to it."""
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text("import lightning_flows as lf\nreveal_type(lf.Condition().batch_size)\nlf.from_pretrained(ref=3)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-site-packages",
        "--ignore-missing-imports",
        "--follow-imports=silent",
    ]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    options = ["--cache-dir", str(tmp_path), "--config-file", os.devnull, str(file)]
    result = subprocess.run([*command, *options], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert 'Revealed type is "int | None"' in result.stdout.replace("Union[int, None]", "int | None"), result.stdout
    assert 'Argument "ref" to "from_pretrained" has incompatible type "int"' in result.stdout
