"""The harness itself: what it does not know fails, and other cases can be dropped in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_flows.networks import DiT
from tests.parity.parity_cases import VARIABLE, Case, answer

HYPER = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "hidden_size": 40,
    "depth": 1,
    "num_heads": 5,
    "mlp_ratio": 3.3,
    "num_classes": 6,
    "label_dropout": 0.0,
    "learn_sigma": False,
    "frequency_embedding_size": 64,
    "max_period": 500,
    "has_null_class_row": False,
}


def write_case(folder, hyper=HYPER, outputs=None, **facts):
    """A case of another size and with other options, computed by our own network."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = DiT(
        8, patch_size=4, in_channels=3, hidden_size=40, depth=1, num_heads=5, mlp_ratio=3.3, num_classes=6,
        frequency_size=64, max_period=500.0,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    with torch.no_grad():
        null = network(x, t, type("Labels", (), {"label": torch.tensor([5, 5]), "present": {}}))
    tensors = {
        "input.x": x,
        "input.t": t,
        "input.y": y,
        "output.velocity_null_class": null,
        **(outputs or {}),
    }
    save_file(tensors, folder / "odd.io.safetensors")
    weights = {**network.state_dict(), "pos_embed": network.pos_embed.clone()}
    save_file(weights, folder / "odd.weights.safetensors")
    files = {"weights": ["odd.weights.safetensors"], "io": "odd.io.safetensors"}
    content = {"hyper_parameters": hyper, "calls": {}, "files": files, **facts}
    (folder / "odd.json").write_text(json.dumps(content))
    return Case(folder / "odd.json")


def run(folder, *arguments):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here), *arguments]
    environment = {**os.environ, VARIABLE: str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent.parent)


def test_another_case_runs_alone_and_what_no_rule_covers_fails(tmp_path):
    write_case(tmp_path / "lfm_dit", outputs={"output.something_new": torch.zeros(2)})
    (tmp_path / "family_to_come").mkdir()
    done = run(tmp_path, "-k", "lfm_dit or sit")
    assert "2 passed" in done.stdout  # the outputs that are known, and the sizes; no test of the absent family
    assert "1 failed" in done.stdout
    assert "lfm_dit/odd/output.something_new" in done.stdout
    assert "skipped" not in done.stdout


def test_an_output_without_a_rule_is_a_failure(tmp_path):
    case = write_case(tmp_path / "lfm_dit")
    with pytest.raises(AssertionError, match=r"no rule covers.*output.other.*lfm_dit/odd"):
        answer({"output": None}, case, "output.other")


def test_an_unknown_hyper_parameter_is_a_failure(tmp_path):
    case = write_case(tmp_path / "lfm_dit", {**HYPER, "window_size": 4})
    with pytest.raises(AssertionError, match="window_size"):
        case.hyper_parameters({name: name for name in HYPER})


@pytest.mark.parametrize(("error", "tolerance", "right"), [(1e-3, {"forward_max_abs": 2e-3}, True),
                                                           (1e-3, {"forward_max_abs": 2e-4}, False),
                                                           (5e-5, {}, True), (5e-4, {}, False)])  # fmt: skip
def test_the_tolerance_is_that_of_the_json_or_relative(tmp_path, error, tolerance, right):
    case = write_case(tmp_path / "lfm_dit", outputs={"output.a": torch.ones(4)}, suggested_tolerance=tolerance)
    ours = torch.ones(4)
    ours[2] += error
    if right:
        case.compare("output.a", ours, "forward")
    else:
        with pytest.raises(AssertionError, match=r"output\.a: largest error"):
            case.compare("output.a", ours, "forward")
    with pytest.raises(AssertionError, match="shape"):
        case.compare("output.a", ours[:3], "forward")


def test_numbers_are_read_from_the_text_of_the_calls(tmp_path):
    case = write_case(tmp_path / "lfm_dit", calls={"a": "dopri5, atol=rtol=1e-05, NFE 26", "b": "scale 4.0, all"})
    assert case.number("atol=rtol={}", 0.1, "a") == 1e-5
    assert case.number("NFE {}", 0, "a") == 26
    assert case.number("scale {}", 1.5) == 4.0
    assert case.number("scale {}", 1.5, "a") == 1.5
