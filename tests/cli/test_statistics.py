"""statistics and the options of test: reference files, extractors, the standard set, speed."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open

from lightning_flows.cli import HELP, main
from lightning_flows.cli.evaluation import usual_extractor
from lightning_flows.cli.statistics import describe
from lightning_flows.data import Digits, ImageFolder
from lightning_flows.metrics import Frechet, Pixels
from tests.cli.conftest import RECIPE, SMALL
from tests.cli.test_trainer_verbs import LAST, refused


def statistics(file, *options):
    main(["statistics", *RECIPE, "--out", str(file), *options])
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118


def test_statistics_are_those_of_the_split_and_say_where_they_come_from(tmp_path, capsys):
    tensors, meta = statistics(tmp_path / "s.safetensors", "--split", "val", "--features", "--data.batch_size=50")
    assert "180 val images in pixels" in capsys.readouterr().out
    data = Digits(batch_size=50)
    images = torch.stack([data.dataset("val")[i]["image"] for i in range(180)]).flatten(1).double()
    assert torch.allclose(tensors["mean"], images.mean(0))
    assert torch.allclose(tensors["covariance"], torch.cov(images.T), atol=1e-12)
    assert torch.equal(tensors["features"].double(), images)
    assert (meta["extractor"], meta["count"], meta["shape"], meta["split"]) == ("pixels", "180", "[1, 8, 8]", "val")
    assert json.loads(meta["data"])["init_args"]["batch_size"] == 50
    assert {"sha256", "lightning-flows", "torch"} <= meta.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_training_images_are_taken_without_their_augmentation_and_n_are_always_the_same(tmp_path):
    options = ["--split", "train", "--n", "100"]
    plain, about = statistics(tmp_path / "plain", *options)
    flipped, same = statistics(tmp_path / "flipped", *options, "--data.flip=true", "--data.seed=5")
    assert torch.equal(plain["mean"], flipped["mean"])
    assert "features" not in plain
    assert (about["count"], about["sha256"]) == ("100", same["sha256"])


def test_paths_of_this_machine_stay_at_home(tmp_path):
    text = describe(ImageFolder(root=str(tmp_path / "images"), size=8))
    assert str(tmp_path) not in text
    assert '"images"' in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--n", "1"], "--n must lie in 2..1437"),
        (["--n", "2000"], "--n must lie in 2..1437"),
        (["--extractor", "Inception", "--extractor.weights", "none.pth"], "weights must be a file"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(tmp_path, options, word):
    assert word in refused(["statistics", *RECIPE, "--out", str(tmp_path / "s"), *options])
    assert not list(tmp_path.iterdir())


def test_the_help_knows_it():
    assert "\n  statistics " in HELP


def test_a_test_measures_the_whole_set_against_a_file_with_as_many_samples_as_asked(in_run, tmp_path):
    file = tmp_path / "s.safetensors"
    statistics(file, "--split", "val", "--features", "--extractor", "Pixels", "--extractor.size", "4")
    options = ["--extractor", "Pixels", "--extractor.size", "4", "--reference", str(file), "--samples", "200"]
    ckpt = str(in_run / "runs/digits/checkpoints/last.ckpt")
    where = ["--trainer.default_root_dir", str(tmp_path / "out"), "--ckpt_path", ckpt]
    main(["test", *RECIPE, *SMALL, *options, *where])
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    found = content["test"]["values"]
    names = [f"{name}[pixels-4]" for name in ("frechet", "kernel", "prdc", "sliced_wasserstein")]
    assert list(found) == [*names, "bits_per_dim"]
    for name in names:
        entry = found[name]
        assert (entry["real"], entry["samples"], entry["extractor"]) == (180, 200, "pixels-4")
        assert entry["reference"]["file"] == "s.safetensors"
        assert (entry["reference"]["data"], entry["reference"]["split"]) == ("Digits", "val")
        assert entry["nfe"] == 4
    assert set(content["speed"]["values"]) == {f"seconds_per_sample[batch={size}]" for size in (1, 128)}
    saved = yaml.safe_load((tmp_path / "out/test.yaml").read_text())
    assert saved["extractor"]["init_args"] == {"size": 4}


def test_a_file_of_another_extractor_is_refused_before_anything_is_sampled(in_run, tmp_path):
    other = Frechet(Pixels(size=2))
    other.update(torch.randn(9, 1, 8, 8), real=True)
    other.save_reference(tmp_path / "s")
    message = refused(["test", *RECIPE, *SMALL, *LAST, "--reference", str(tmp_path / "s")])
    assert "is of 'pixels-2', not of 'pixels'" in message


def test_a_recipe_that_says_what_is_measured_allows_no_second_word(in_run, tmp_path):
    recipe = tmp_path / "own.yaml"
    entry = {"class_path": "lightning_flows.callbacks.Evaluation"}
    recipe.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    ckpt = str(in_run / "runs/digits/checkpoints/last.ckpt")
    message = refused(["test", *RECIPE, "-c", str(recipe), *SMALL, "--ckpt_path", ckpt, "--samples", "9"])
    assert "--samples: the recipe has an Evaluation of the test" in message


def test_large_images_are_compared_small():
    assert usual_extractor(Digits()).name == "pixels"

    class Large:
        shape = (3, 64, 64)

    assert usual_extractor(Large()).name == usual_extractor(None).name == "pixels-32"


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {")
    with pytest.raises(SystemExit, match=r"recipe\.yaml is not YAML: while parsing"):
        main(["statistics", "-c", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out.safetensors")])
