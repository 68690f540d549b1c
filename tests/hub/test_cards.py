"""A card says what a model is, and beside every figure what it was measured with."""

import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from lightning_flows.hub import card, figures, read_header, write_card
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import ADMUNet
from lightning_flows.store import build

CONFIG = {
    "class_path": "lightning_flows.modules.LatentFlowMatching",
    "init_args": {"network": {"class_path": "lightning_flows.networks.DiT", "init_args": {"num_classes": 10}}},
}
SETTING = {
    "real": 500,
    "samples": 400,
    "extractor": "digits",
    "seed": 7,
    "solver": "Euler",
    "steps": 50,
    "nfe": 50,
}
METRICS = {
    "test": {
        "values": {
            "kid": {"value": 0.0123456, **SETTING},
            "prdc": {"value": {"precision": 0.5, "recall": 0.25}, **SETTING},
            "failed": {"value": None, **SETTING},
        },
        "logged": {"test/nfe": 50.0},
        "versions": {"torch": "2"},
    }
}


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_figures_of_an_evaluation():
    found = figures(METRICS)
    assert [(f.name, f.value) for f in found] == [
        ("kid", 0.0123456),
        ("prdc/precision", 0.5),
        ("prdc/recall", 0.25),
    ]
    assert all(figure.setting == SETTING for figure in found)


@pytest.mark.parametrize(
    "metrics",
    [{"fid": 3.0}, {"fid": {"value": 3.0}}, [{"name": "fid", "value": 3.0}], {"fid": {"value": {"": 3.0}}}],
)
def test_other_spellings_of_figures(metrics):
    (figure,) = figures(metrics)
    assert figure.name.rstrip("/") == "fid"
    assert figure.value == 3.0


def test_no_metrics_is_no_figures():
    assert figures(None) == figures({}) == figures({"test": {"values": {}}}) == []


def test_the_header_is_what_the_hub_reads():
    text = card(CONFIG, METRICS, licence="cc-by-4.0", model_id="m", data=["digits"], split="test", base_model="org/b")
    data = ModelCard(text).data
    assert data.library_name == "lightning_flows"
    assert data.license == "cc-by-4.0"
    assert data.datasets == ["digits"]
    assert data.base_model == "org/b"
    first = data.eval_results[0]
    assert (first.metric_type, first.metric_value) == ("kid", 0.0123456)
    assert first.metric_args == SETTING
    (model,) = header(text)["model-index"]
    assert model["name"] == "m"


def test_the_table_holds_every_setting():
    text = card(CONFIG, METRICS, licence="mit", command="lightning-flows test -c recipe.yaml")
    assert "| metric | value | real | samples | extractor | solver | steps | network calls | seed |" in text
    assert "| kid | 0.012346 | 500 | 400 | digits | Euler | 50 | 50 | 7 |" in text
    assert "lightning-flows test -c recipe.yaml" in text


def snippet(text):
    return text.split("```python\n")[1].split("```")[0]


def test_the_snippet_is_python_and_asks_for_labels_where_there_are_some():
    labelled = snippet(card(CONFIG, licence="mit", model_id="org/m"))
    compile(labelled, "card", "exec")
    assert 'lf.from_pretrained("org/m")' in labelled
    assert "lf.Condition(label=torch.arange(10))" in labelled
    plain = snippet(card({"class_path": "torch.nn.Linear", "init_args": {}}, licence="mit"))
    compile(plain, "card", "exec")
    assert "n=16" in plain


def test_a_card_without_figures_has_no_results():
    text = card(CONFIG, licence="mit")
    assert "model-index" not in text
    assert "## Results" not in text


def test_an_empty_licence_is_refused():
    with pytest.raises(ValueError, match="licence=''"):
        card(CONFIG, licence="")


def test_a_written_card_is_read_back(tmp_path):
    folder = tmp_path / "lfm-digits"
    folder.mkdir()
    file = write_card(folder, CONFIG, METRICS, licence="mit")
    assert file == folder / "README.md"
    assert "# lfm-digits" in file.read_text()
    assert read_header(folder)["license"] == "mit"
    assert read_header(tmp_path) == {}


def test_the_hub_client_is_imported_only_where_it_is_used():
    code = "import sys\nfrom lightning_flows.hub import table\ntable()\nprint('huggingface_hub' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "False"


def test_the_card_of_an_autoencoder_encodes_and_decodes():
    config = {"class_path": "lightning_flows.modules.KLAutoencoder", "init_args": {}}
    text = card(config, {"psnr": {"value": 28.0}}, licence="mit", model_id="kl-m")
    assert 'AutoencoderKL("kl-m")' in text
    assert "model.encode(images)" in text
    assert "model.sample" not in text
    assert header(text)["pipeline_tag"] == "image-to-image"
    assert header(text)["tags"] == ["autoencoder", "lightning"]
    flow = card(CONFIG, licence="mit")
    assert header(flow)["pipeline_tag"] == "unconditional-image-generation"
    assert header(flow)["tags"] == ["flow-matching", "lightning"]


def test_the_card_of_a_normalizing_flow_is_tagged_as_one_and_says_how_it_is_inverted():
    config = {"class_path": "lightning_flows.modules.NormalizingFlow", "init_args": {}}
    entry = {"value": 0.9, "samples": 20, "method": "Sequential()", "denoise": 0.0, "nfe": 2, "passes": 392}
    text = card(config, {"accuracy": entry}, licence="mit")
    assert header(text)["tags"] == ["normalizing-flow", "lightning"]
    assert "| metric | value | samples | inverse | denoise | network calls | passes |" in text
    assert "| accuracy | 0.9 | 20 | Sequential() | 0 | 2 | 392 |" in text


ONE_HOT = {"class_path": "lightning_flows.codecs.OneHot", "init_args": {"num_classes": 6}}
PER_IMAGE = {"class_path": "lightning_flows.codecs.ClassPlane", "init_args": {"num_classes": 4}}
BOTH = {"class_path": "lightning_flows.codecs.JointSemantics", "init_args": {"parts": [ONE_HOT, PER_IMAGE]}}
FACES = {"class_path": "lightning_flows.codecs.RGBPalette", "init_args": {"palette": "celebamask-hq"}}


def symmflow(semantic):
    return {"class_path": "lightning_flows.modules.SymmFlow", "init_args": {"semantic": semantic}}


@pytest.mark.parametrize(
    ("semantic", "task", "tags", "counts"),
    [
        (BOTH, "image-segmentation", ["image-segmentation", "mask-to-image", "image-classification"], (6, 4)),
        (FACES, "image-segmentation", ["image-segmentation", "mask-to-image"], (19, None)),
        (PER_IMAGE, "image-classification", ["image-classification"], (None, 4)),
    ],
)
def test_the_card_of_a_symmflow_says_what_it_reads_and_draws(semantic, task, tags, counts):
    text = card(symmflow(semantic), licence="mit", model_id="m", tags=["own"])
    assert header(text)["tags"] == ["symmflow", "lightning", *tags, "own"]
    assert header(text)["pipeline_tag"] == task
    lines = snippet(text)
    for name, count in zip(("segment", "classify"), counts, strict=True):
        found = [line for line in lines.splitlines() if f"model.{name}(images)" in line]
        assert len(found) == (count is not None)
        assert all(f"of 0..{count - 1}," in line for line in found)


@pytest.mark.parametrize("semantic", [BOTH, PER_IMAGE, ONE_HOT])
def test_the_snippet_of_a_symmflow_runs(semantic, tmp_path):
    code = build(semantic)
    options = {"hidden_size": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention_factors": ()}
    network = ADMUNet(input_size=8, in_channels=3 + code.channels, head_channels=32, **options)
    model = SymmFlow(network=network, semantic=code, steps=1)
    model.save_pretrained(tmp_path / "m")
    found = {"images": torch.zeros(2, 3, 8, 8)}
    exec(snippet(card(model.config, licence="mit", model_id=str(tmp_path / "m"))), found)
    assert found["drawn"].shape == (2, 3, 8, 8)
    for name in code.keys:
        assert found[name].dtype == torch.int64


def test_a_code_of_another_package_is_not_imported_for_a_card():
    foreign = {"class_path": "somewhere.Code", "init_args": {"num_classes": 3}}
    text = card(symmflow(foreign), licence="mit")
    assert header(text)["tags"] == ["symmflow", "lightning"]
    assert "segment" not in text


def test_the_card_says_when_weights_are_stored_in_16_bits():
    assert "Stored as float16" in card(CONFIG, licence="mit", dtype="float16")
    assert "Stored as" not in card(CONFIG, licence="mit")
