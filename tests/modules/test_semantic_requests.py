"""What requests can ask of a SymmFlow: ``predict_step`` for every task."""

import pytest
import torch

from lightning_flows.codecs import ClassPlane, LabelMap, OneHot
from tests.modules.pairs import LABELS, MASKS, batch, symmflow

SEEDS = [21, 22, 23]


def masks(**options):
    return symmflow(OneHot(MASKS), **options)


def labels(**options):
    return symmflow(OneHot(LABELS, per="image"), **options)


def requests(*names, task=None, options=None, n=3):
    data = {name: value[:n] for name, value in batch().items() if name in names}
    asked = {} if task is None else {"task": task, "task_options": options or {}}
    return {"id": [f"{i:05d}" for i in range(n)], "seed": torch.tensor(SEEDS[:n]), **data, **asked}


def test_masks_and_labels_are_drawn():
    made, asked = symmflow(), requests("mask", "label")
    found = made.predict_step(asked, 0)
    expected = made.sample(made.condition_of(asked), seeds=SEEDS)
    assert torch.equal(found["sample"], expected)
    assert torch.equal(made.predict_step({**asked, "task": "sample"}, 0)["sample"], expected)
    assert symmflow(drop_rate=0.1).predict_step(requests("label"), 0)["sample"].shape == (3, 1, 4, 4)


@pytest.mark.parametrize("task", [None, "segment"])
def test_images_alone_are_segmented_and_a_model_of_both_says_both(task):
    made, asked = symmflow(), requests("image", task=task)
    found = made.predict_step(asked, 0)
    assert found["id"] == ["00000", "00000-class", "00001", "00001-class", "00002", "00002-class"]
    read = made.read(asked["image"], seeds=asked["seed"])
    for i in range(3):
        assert isinstance(found["sample"][2 * i], LabelMap)
        assert torch.equal(found["sample"][2 * i].labels, read.decoded["mask"].labels[i])
        assert found["sample"][2 * i].colours == made.semantic.colours()
        record = found["sample"][2 * i + 1]
        assert record["label"] == int(read.decoded["label"].labels[i])
        assert record["scores"] == pytest.approx(read.decoded["label"].scores[i].tolist())


def test_uncertainty_is_a_picture_and_options_serve_every_batch():
    options = {"votes": 3, "uncertainty": True}
    made, asked = symmflow(), requests("image", task="segment", options=options)
    found, again = made.predict_step(asked, 0), made.predict_step(asked, 1)
    assert options == {"votes": 3, "uncertainty": True}
    assert found["id"] == again["id"]
    assert found["id"][:3] == ["00000", "00000-uncertainty", "00000-class"]
    unsure = made.read(asked["image"], seeds=asked["seed"], votes=3).uncertainty
    torch.testing.assert_close(found["sample"][1], unsure["mask"][:1] * 2 - 1)
    assert found["sample"][2]["uncertainty"] == pytest.approx(float(unsure["label"][0]))


@pytest.mark.parametrize("task", [None, "classify"])
def test_images_alone_are_classified_by_a_model_of_labels(task):
    made, asked = symmflow(ClassPlane(LABELS)), requests("image", task=task)
    found = made.predict_step(asked, 0)
    assert found["id"] == asked["id"]
    assert [record["label"] for record in found["sample"]] == made.classify(asked["image"], seeds=SEEDS).labels.tolist()
    assert symmflow().predict_step(requests("image", task="classify"), 0)["id"] == asked["id"]


def test_edits_are_requested_with_repainted_masks():
    made, asked = symmflow(), requests("image", "mask", task="edit", options={"steps": 2, "grow": 0})
    found = made.predict_step(asked, 0)
    expected = made.edit(asked["image"], asked["mask"], seeds=asked["seed"], steps=2, grow=0)
    assert torch.equal(found["sample"], expected)
    label = torch.tensor([3, 3, 3])
    other = made.predict_step({**asked, "label": label}, 0)["sample"]
    assert torch.equal(
        other, made.edit(asked["image"], asked["mask"], label=label, seeds=asked["seed"], steps=2, grow=0)
    )


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (masks, requests("image", task="paint"), r"ask for the task 'paint', but SymmFlow has \('sample', 'segment'"),
        (masks, requests("image", task="classify"), r"needs a model of labels, this one knows \['mask'\]"),
        (labels, requests("image", task="segment"), r"needs a model of masks, this one knows \['label'\]"),
        (labels, requests("image", "mask", task="edit"), r"give 'mask', but .* reads \['label'\]"),
        (masks, requests("image", "mask"), r"images and \['mask'\]: name a task, one of \('sample', 'segment'"),
        (masks, requests("image", task="edit"), r"task 'edit' needs \['mask'\] of each request"),
        (masks, requests("mask", task="segment"), r"task 'segment' needs \['image'\]"),
        (masks, requests("image", "mask", task="sample"), "give images, but no task with a use for them"),
        (masks, requests("label"), "give 'label', but"),
        (masks, requests(), r"must give \('spatial',\) for every sample"),
        (masks, requests("image", task="segment", options={"grow": 1}), r"'segment' can be \['steps', 'votes', 'un"),
        (masks, requests("image", task="segment", options={"uncertainty": True}), "votes must be at least 2, got 1"),
        (masks, {**requests("image"), "image": torch.zeros(3, 1, 6, 6)}, r"another size or other channels"),
    ],
)
def test_wrong_requests_are_named(made, asked, message):
    with pytest.raises(ValueError, match=message):
        made().predict_step(asked, 0)
