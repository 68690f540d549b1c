"""SymmFlow's codes of masks and labels: palettes, dequantisation and read-out against the official numbers."""

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_flows.codecs import ClassPlane, RGBPalette
from lightning_flows.flow.noise import Noise
from tests.parity.parity_cases import VARIABLE, parameters

PALETTES = {"coco": "coco-stuff", "celeba": "celebamask-hq"}


@cache
def facts():
    return json.loads(Path(os.environ[VARIABLE], "symmflow", "symmflow_parity.json").read_text())


def given(what):
    """Parametrizes a test with the cases of one kind, or with what the palettes of the file are called."""

    def found(folder):
        if not (folder / "symmflow/symmflow_parity.json").is_file():
            return []
        if what == "palette":
            return [(name, (name,)) for name in sorted(PALETTES)]
        return [(case["case"], (case,)) for case in facts()["cases"] if case["kind"] == what]

    return parameters(what, ("palette" if what == "palette" else "case",), found)


def tensors(case):
    return load_file(Path(os.environ[VARIABLE], "symmflow", f"{case['case']}.safetensors"))


class Given(Noise):
    """The uniform numbers of the file."""

    def __init__(self, uniform):
        self.uniform_numbers = uniform

    def draw(self, purpose, shape, sampler):
        assert self.uniform_numbers.shape == shape
        return self.uniform_numbers

    def generator(self, purpose):
        raise AssertionError(f"no generator is needed for {purpose}")


@given("palette")
def test_noisy_colours_are_read_as_the_official_classes(palette):
    known = facts()["mask_colour_decoding"]
    pixels = torch.tensor(known["pixels_minus1_1"])  # (N, 3)
    labels = RGBPalette(PALETTES[palette]).decode(pixels.T[None, :, None])["mask"].labels
    assert labels.flatten().tolist() == known[f"{palette}_class"]


@given("palette")
def test_colours_are_the_official_ones(palette):
    known = facts()["mask_colour_decoding"]
    ours = ((RGBPalette(PALETTES[palette]).table() + 1) * 127.5).round().int().tolist()
    if palette == "celeba":
        assert ours == known["celeba_palette"]
    else:
        first, last = known["coco_palette_first"], known["coco_palette_last"]
        assert len(ours) == known["coco_classes"]
        assert (ours[: len(first)], ours[-len(last) :]) == (first, last)


@given("mask")
def test_masks_are_dequantised_as_officially(case):
    known = tensors(case)
    clean, channels = known["in/mask_clean"], case["semantic_channels"]
    codec = RGBPalette("celebamask-hq", beta=case["beta"])
    uniform = known["in/uniform"][:, :1].expand(-1, 3, -1, -1)
    black = torch.zeros(len(clean), *clean.shape[2:], dtype=torch.long)
    added = codec.encode({"mask": black}, clean.shape[2:], Given(uniform)) + 1  # of black, which is -1
    theirs = known["out/semantic_dequantized"] - clean
    assert theirs.shape[1] == channels
    torch.testing.assert_close(added[:, :1], theirs[:, :1], atol=3e-7, rtol=0)


@given("class")
def test_labels_are_planes_as_officially(case):
    known = tensors(case)
    codec = ClassPlane(case["n_classes"], beta=case["beta"])
    size = tuple(known["in/uniform"].shape[2:])
    y = codec.encode({"label": known["in/label"]}, size, Given(known["in/uniform"]))
    torch.testing.assert_close(y, known["out/semantic_dequantized"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(codec.heights(y), known["out/plane_mean_class"], atol=1e-5, rtol=1e-5)
    labels = codec.decode(y)["label"].labels
    assert labels.tolist() == known["out/quantized"].long().tolist() == known["in/label"].tolist()


@given("class")
def test_planes_of_every_solver_are_read_as_officially(case):
    known = tensors(case)
    codec = ClassPlane(case["n_classes"], beta=case["beta"])
    solvers = [name.removeprefix("out/class_score_") for name in known if name.startswith("out/class_score_")]
    assert solvers
    for solver in solvers:
        y = known[f"out/segment_{solver}"][:, case["image_channels"] :]
        labels = codec.decode(y)["label"].labels
        torch.testing.assert_close(codec.heights(y), known[f"out/class_score_{solver}"], atol=1e-5, rtol=1e-5)
        assert labels.tolist() == known[f"out/class_{solver}"].long().tolist()
