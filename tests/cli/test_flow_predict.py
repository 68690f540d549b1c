"""``lightning-flows predict`` with a task: a tiny flow saved to a folder, pictures in, pictures and numbers out."""

import json

import pytest
import torch
from PIL import Image

import lightning_flows as lf
from lightning_flows.callbacks.pictures import to_image
from lightning_flows.cli import dispatch, main
from lightning_flows.codecs import WordEncoder
from lightning_flows.flow import GaussianNoise, MaximumLikelihood
from lightning_flows.modules import NormalizingFlow
from lightning_flows.networks import STARFlow, TARFlow
from tests.modules.tiny import dit
from tests.networks.tiny_flows import redrawn

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
GREY = ["--data.channels=1"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A class-conditional flow of 4 x 4 grey pixels, saved in ``flow`` of the working directory."""
    monkeypatch.chdir(tmp_path)
    sizes = {"patch_size": 2, "in_channels": 1, "hidden_size": 8, "num_blocks": 2, "depth": 1, "head_size": 4}
    network = redrawn(TARFlow(4, num_classes=3, **sizes))
    made = NormalizingFlow(network=network, objective=MaximumLikelihood(GaussianNoise(0.1)))
    made.save_pretrained("flow")
    return made


@pytest.fixture
def images(model):
    """Four pictures on disk as the command line reads them, (4, 1, 4, 4)."""
    levels = torch.randint(0, 256, (4, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    x = levels / 127.5 - 1
    for i, image in enumerate(x):
        to_image(image).save(f"{'abcd'[i]}.png")
    return x


def predict(*words, weights="flow"):
    dispatch(["predict", "--weights", weights, *QUIET, *words])


def refused(*words, weights="flow"):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--weights", weights, *QUIET, *words])
    return str(caught.value)


def written(tmp_path, name, run="flow"):
    folder = tmp_path / f"runs/{run}/predictions"
    return json.loads((folder / name).read_text()) if name.endswith(".json") else Image.open(folder / name)


def pixels(image):
    return torch.tensor(list(image.convert("L").tobytes())).reshape(4, 4)


def of(x):
    return ((x[0].clamp(-1, 1) + 1) * 127.5).round().long()


def test_classification(model, images, tmp_path):
    predict("--data.images=[a.png,b.png,c.png]", "--data.task=classify", "--data.batch_size=2", *GREY)
    found = model.classify(images[:3])
    table = written(tmp_path, "predictions.json")
    assert list(table) == ["00000", "00001", "00002"]
    for i, record in enumerate(table.values()):
        assert record == written(tmp_path, f"0000{i}.json")
        assert record["label"] == int(found.label[i])
        assert record["candidates"] == [0, 1, 2]
        assert record["log_posterior"] == pytest.approx(found.scores[i].tolist(), abs=1e-3)
        assert record["log_prob"] == pytest.approx(found.log_prob[i].tolist(), abs=1e-3)


def test_options_of_a_task_come_from_the_command_line(model, images, tmp_path):
    options = '--data.task_options={"candidates": [2, 1], "prior": [1, 3]}'
    predict("--data.images=[a.png]", "--data.task=classify", options, *GREY)
    found = model.classify(images[:1], candidates=[2, 1], prior=[1, 3])
    record = written(tmp_path, "00000.json")
    assert record["candidates"] == [2, 1]
    assert record["log_posterior"] == pytest.approx(found.scores[0].tolist(), abs=1e-3)
    assert record["label"] == int(found.label)


def test_scores(model, images, tmp_path):
    predict("--data.images=[a.png,b.png]", "--data.task=score", *GREY)
    record = written(tmp_path, "00001.json")
    assert record["score"] == pytest.approx(float(model.anomaly_score(images[1:2])), abs=1e-4)
    assert (record["method"], record["unit"]) == ("nll", "nats per dimension")
    typical = '--data.task_options={"method": "typicality", "reference": 1.5}'
    predict("--data.images=[a.png]", "--data.labels=[2]", "--data.task=score", typical, *GREY)
    nll = float(model.anomaly_score(images[:1], lf.Condition(label=torch.tensor([2]))))
    assert written(tmp_path, "00000-label2.json")["score"] == pytest.approx(abs(nll - 1.5), abs=1e-4)


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_inpainting(model, images, tmp_path, rule):
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[:, 2:] = 9
    Image.fromarray(mask.numpy()).save("mask.png")
    lists = ["--data.images=[a.png,b.png]", "--data.masks=[mask.png,mask.png]", "--data.labels=[0,2]"]
    options = f'--data.task_options={{"steps": 4, "rule": "{rule}"}}'
    predict(*lists, "--data.task=inpaint", "--data.seed=5", options, *GREY)
    condition = lf.Condition(label=torch.tensor([0, 2]))
    expected = model.inpaint(images[:2], mask, condition, steps=4, rule=rule, seed=5).x
    for i, name in enumerate(["00000-label0.png", "00001-label2.png"]):
        made = pixels(written(tmp_path, name))
        assert (made - of(expected[i])).abs().max() <= 1
        assert torch.equal(made[:, :2], of(images[i])[:, :2])
        assert (made[:, 2:] != of(images[i])[:, 2:]).any()
    assert (tmp_path / "runs/flow/predictions/grid.png").is_file()


def test_interpolation_of_images(model, images, tmp_path):
    predict("--data.images=[a.png,b.png,c.png,d.png]", "--data.labels=[0,1]", "--data.task=interpolate", *GREY)
    for i in range(2):
        names = [f"0000{i}-label{i}-{k:02d}.png" for k in range(8)]
        frames = [pixels(written(tmp_path, name)) for name in names]
        path = model.interpolate(images[2 * i], images[2 * i + 1], 8, lf.Condition(label=torch.tensor([i])))
        assert max((frame - of(own)).abs().max() for frame, own in zip(frames, path, strict=True)) <= 1
        assert (frames[0] - of(images[2 * i])).abs().max() <= 1
        assert (frames[7] - of(images[2 * i + 1])).abs().max() <= 1


def test_interpolation_of_seeds(model, tmp_path):
    predict("--data.seeds=[3,4]", "--data.task=interpolate", '--data.task_options={"n": 3}')
    end = model.sample(seeds=[4])
    assert (pixels(written(tmp_path, "00000-02.png")) - of(end[0])).abs().max() <= 1
    assert not (tmp_path / "runs/flow/predictions/00000-03.png").exists()


def test_a_task_of_samples_is_the_plain_prediction(model, tmp_path):
    predict("--data.labels=[1]", "--data.task=sample", "--data.seed=3")
    expected = model.sample(lf.Condition(label=torch.tensor([1])), seed=3)
    assert (pixels(written(tmp_path, "00000-label1.png")) - of(expected[0])).abs().max() <= 1


def test_captions_are_candidates_on_the_command_line(images, tmp_path):
    sizes = {"patch_size": 2, "in_channels": 1, "hidden_size": 20, "depth": (1, 1), "head_size": 20}
    network = redrawn(STARFlow(4, text_length=2, text_size=5, **sizes))
    made = NormalizingFlow(network=network, text=WordEncoder(5, length=2, buckets=9))
    made.save_pretrained("words")
    options = '--data.task_options={"candidates": ["a cat", "a dog"]}'
    predict("--data.images=[a.png]", "--data.task=classify", options, *GREY, weights="words")
    record = written(tmp_path, "00000.json", run="words")
    found = made.classify(images[:1], candidates=["a cat", "a dog"])
    assert record["caption"] == ["a cat", "a dog"][int(found.label)]
    assert record["log_prob"] == pytest.approx(found.log_prob[0].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.images=[a.png]"], "give images, but no task with a use for them; there are ('sample', 'classify'"),
        (["--data.task=classify", "--data.n=1"], "needs ['images']"),
        (["--data.task=inpaint", "--data.images=[a.png]"], "there are no ['masks']"),
        (["--data.task=paint", "--data.n=1"], "task must be one of ['sample', 'classify'"),
        (["--data.task=interpolate", "--data.images=[a.png]"], "must come in pairs"),
        (["--data.task=score", "--data.images=[a.png]"], "give the requests other channels=... and size=..."),
        (["--data.task=score", "--data.images=[a.png]", "--data.size=6", *GREY], "those of the model have (1, 4, 4)"),
        (
            ["--data.task=score", "--data.images=[a.png]", '--data.task_options={"steps": 3}', *GREY],
            "task_options of 'score' can be ['method', 'reference', 'marginal', 'prior', 'batch_size'], got ['steps']",
        ),
        (
            ["--data.task=score", "--data.images=[a.png]", "--data.prompts=[cat]", *GREY],
            "the requests give 'caption', but TARFlow reads ['label']",
        ),
        (["--data.task=score", "--data.images=[e.png]"], "e.png does not exist"),
    ],
)
def test_wrong_requests_are_refused(images, words, message):
    assert message in refused(*words)


def test_families_without_tasks_refuse_them(images):
    lf.LatentFlowMatching(network=dit(), steps=2).save_pretrained("matching")
    message = refused("--data.images=[a.png]", "--data.task=classify", *GREY, weights="matching")
    assert "ask for the task 'classify', but LatentFlowMatching has ('sample',)" in message
