"""Requests: each has an id, its own seed and its condition, whatever the batch size."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.data import EvaluationSampler, Requests
from lightning_flows.flow.noise import seeds_from


def joined(requests):
    batches = list(requests.predict_dataloader())
    ids = list(itertools.chain(*(batch["id"] for batch in batches)))
    return ids, {k: torch.cat([b[k] for b in batches]) for k, v in batches[0].items() if torch.is_tensor(v)}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_requests_do_not_depend_on_the_batch_size(batch_size):
    ids, fields = joined(Requests(labels=[4, 7], n=5, seed=3, batch_size=batch_size))
    assert ids == ["00000-label4", "00001-label7", "00002-label4", "00003-label7", "00004-label4"]
    assert fields["label"].tolist() == [4, 7, 4, 7, 4]
    assert fields["label"].dtype == fields["seed"].dtype == torch.int64
    assert torch.equal(fields["seed"], seeds_from(3, 5))


def test_a_longer_run_begins_with_the_same_requests():
    _, short = joined(Requests(n=3, seed=1))
    _, long = joined(Requests(n=6, seed=1))
    assert torch.equal(short["seed"], long["seed"][:3])


def test_prompts_and_own_seeds():
    batch = next(iter(Requests(prompts=["a cat", "a dog"], seeds=[11, 12]).predict_dataloader()))
    assert batch["caption"] == ["a cat", "a dog"]
    assert batch["seed"].tolist() == [11, 12]
    assert batch["id"] == ["00000", "00001"]


def test_masks_are_read_and_resized_without_new_ids(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2, (6, 8), dtype=np.uint8) * 9
    Image.fromarray(ids).save(tmp_path / "m.png")
    path = str(tmp_path / "m.png")
    batch = next(iter(Requests(masks=[path], n=2).predict_dataloader()))
    assert torch.equal(batch["mask"], torch.from_numpy(ids).long().expand(2, 6, 8))
    small = next(iter(Requests(masks=[path], size=3).predict_dataloader()))["mask"]
    assert small.shape == (1, 3, 3)
    assert set(small.flatten().tolist()) <= {0, 9}


def save(path, value, size=(8, 6), mode="RGB"):
    Image.new(mode, size, value).save(path)
    return str(path)


def test_images_are_read_scaled_and_cropped(tmp_path):
    files = [save(tmp_path / f"{i}.png", (i * 255, 0, 0), size) for i, size in enumerate([(8, 6), (4, 4)])]
    batch = next(iter(Requests(images=files, labels=[3, 4], size=(6, 4)).predict_dataloader()))
    assert batch["image"].shape == (2, 3, 6, 4)
    assert batch["image"].dtype == torch.float32
    assert batch["image"][:, 0, 0, 0].tolist() == [-1, 1]
    assert batch["label"].tolist() == [3, 4]
    grey = next(iter(Requests(images=files[:1], channels=1, n=2).predict_dataloader()))["image"]
    assert grey.shape == (2, 1, 6, 8)


def test_masks_are_cropped_with_their_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (6, 9), dtype=np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    batch = next(iter(Requests(images=[path], masks=[path], size=6, channels=1).predict_dataloader()))
    assert torch.equal(batch["mask"], ((batch["image"][:, 0] + 1) * 127.5).long())


@pytest.mark.parametrize("field", ["images", "masks"])
def test_files_of_different_sizes_need_a_size(tmp_path, field):
    files = [save(tmp_path / f"{i}.png", 0, (8, i + 5), mode="L") for i in range(2)]
    with pytest.raises(ValueError, match=rf"{field} of one batch must have one shape.*size="):
        next(iter(Requests(**{field: files}).predict_dataloader()))


def test_a_mask_of_another_size_than_its_image_names_both(tmp_path):
    image, mask = save(tmp_path / "i.png", (0, 0, 0)), save(tmp_path / "m.png", 0, (8, 7), mode="L")
    with pytest.raises(ValueError, match=r"m\.png and image .*i\.png differ in size: \(7, 8\) and \(6, 8\)"):
        next(iter(Requests(images=[image], masks=[mask], size=4).predict_dataloader()))


def test_missing_and_broken_images_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        next(iter(Requests(images=["gone.png"]).predict_dataloader()))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        next(iter(Requests(images=[str(tmp_path / "broken.png")]).predict_dataloader()))


def test_one_aspect_for_all_changes_nothing_else():
    batches = list(Requests(labels=[1, 2, 3], aspect="16:9", batch_size=2, seed=4).predict_dataloader())
    plain = list(Requests(labels=[1, 2, 3], batch_size=2, seed=4).predict_dataloader())
    for batch, other in zip(batches, plain, strict=True):
        assert batch.pop("aspect") == ["16:9"] * len(batch["id"])
        assert batch["id"] == other["id"]
        assert torch.equal(batch["seed"], other["seed"])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_requests_of_several_aspects_come_in_batches_of_one(batch_size, workers):
    ratios = ["16:9", "1:1", "16:9", "9:16"]
    options = {"batch_size": batch_size, "num_workers": workers, "seed": 9}
    batches = list(Requests(prompts=list("abcd"), aspect=ratios, n=7, **options).predict_dataloader())
    assert all(len(set(batch["aspect"])) == 1 for batch in batches)
    assert max(len(batch["id"]) for batch in batches) == min(batch_size, 4)
    seeds, found = seeds_from(9, 7).tolist(), {}
    for batch in batches:
        rows = zip(batch["caption"], batch["aspect"], batch["seed"].tolist(), strict=True)
        found.update(zip(batch["id"], rows, strict=True))
    assert found == {f"{i:05d}": ("abcd"[i % 4], ratios[i % 4], seeds[i]) for i in range(7)}


def test_a_list_of_aspects_counts_the_requests():
    assert Requests(aspect=["16:9", "1:1"]).n == 2
    with pytest.raises(ValueError, match="nothing to sample"):
        Requests(aspect="16:9")


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"images": []}, "images is an empty list"),
        ({"aspect": []}, "aspect is an empty list"),
        ({"images": ["a"], "masks": ["b", "c"]}, r"one length.*'masks': 2, 'images': 1"),
        ({"labels": [1], "aspect": ["1:1", "2:3"]}, r"one length.*'labels': 1, 'aspect': 2"),
        ({"n": 1, "aspect": "wide"}, "aspect must be WIDTH:HEIGHT such as '16:9', got 'wide'"),
        ({"aspect": ["1:1", "0:1"]}, "aspect must be WIDTH:HEIGHT"),
        ({"n": 1, "channels": 2}, "channels must be 1"),
        ({"n": 1, "size": 0}, "size must be"),
        ({}, "nothing to sample"),
        ({"labels": []}, "labels is an empty list"),
        ({"prompts": []}, "prompts is an empty list"),
        ({"n": 0}, "nothing to sample"),
        ({"seeds": []}, "nothing to sample"),
        ({"labels": [1], "n": -1}, "nothing to sample"),
        ({"labels": [1, 2], "prompts": ["a"]}, r"one length.*'labels': 2, 'prompts': 1"),
        ({"labels": [1, 2], "seeds": [1]}, "seeds must have one seed for each of the 2 requests"),
        ({"labels": [-1]}, "labels must be class indices"),
        ({"n": 1, "batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_requests_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        Requests(**wrong)


def test_missing_mask_names_its_file():
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        next(iter(Requests(masks=["gone.png"]).predict_dataloader()))


def test_requests_are_dealt_out_in_turn_over_devices():
    loader = Requests(labels=list(range(5))).predict_dataloader()
    assert isinstance(loader.sampler, EvaluationSampler)
    assert list(EvaluationSampler(5, rank=1, world_size=2)) == [1, 3]


def test_requests_know_their_config():
    config = Requests(labels=[1, 2], seed=5).config
    assert config["class_path"] == "lightning_flows.data.Requests"
    assert config["init_args"]["labels"] == [1, 2]


# ---------------------------------------------------------------------- tasks


def test_a_batch_says_what_is_asked_of_it(tmp_path):
    image, mask = save(tmp_path / "i.png", (0, 0, 0)), save(tmp_path / "m.png", 255, mode="L")
    options = {"steps": 5, "prior": [0.5, 0.5]}
    for task, lists in {
        "classify": {"images": [image]},
        "score": {"images": [image], "labels": [3]},
        "inpaint": {"images": [image], "masks": [mask], "prompts": ["a"]},
    }.items():
        batch = next(iter(Requests(**lists, task=task, task_options=options, n=2).predict_dataloader()))
        assert (batch["task"], batch["task_options"]) == (task, options)
        assert batch["image"].shape == (2, 3, 6, 8)
    assert batch["mask"].unique().tolist() == [255]
    plain = next(iter(Requests(n=1, task="sample").predict_dataloader()))
    assert set(plain) == {"id", "seed"}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_interpolations_have_two_images_each(tmp_path, batch_size):
    files = [save(tmp_path / f"{i}.png", 51 * i, mode="L") for i in range(6)]
    options = {"task": "interpolate", "channels": 1, "batch_size": batch_size, "seed": 2}
    ids, fields = joined(Requests(images=files, labels=[4, 5, 6], **options))
    assert ids == ["00000-label4", "00001-label5", "00002-label6"]
    assert fields["image"].shape == (3, 2, 1, 6, 8)
    grey = ((fields["image"][..., 0, 0].flatten() + 1) * 2.5).round()
    assert grey.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(fields["seed"], seeds_from(2, 6).reshape(3, 2))


def test_interpolations_without_images_go_from_seed_to_seed():
    _, fields = joined(Requests(seeds=[5, 6, 7, 8], labels=[1, 2], task="interpolate"))
    assert fields["seed"].tolist() == [[5, 6], [7, 8]]
    _, derived = joined(Requests(n=3, seed=4, task="interpolate"))
    assert torch.equal(derived["seed"], seeds_from(4, 6).reshape(3, 2))


def test_ends_of_other_sizes_name_their_files(tmp_path):
    files = [save(tmp_path / f"{i}.png", (0, 0, 0), (8, 6 + i)) for i in range(2)]
    with pytest.raises(ValueError, match=r"0\.png and .*1\.png must have one shape.*size="):
        next(iter(Requests(images=files, task="interpolate").predict_dataloader()))
    batch = next(iter(Requests(images=files, task="interpolate", size=4).predict_dataloader()))
    assert batch["image"].shape == (1, 2, 3, 4, 4)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"task": "paint", "n": 1}, r"task must be one of \['sample', .*'interpolate'\], got 'paint'"),
        ({"task": "classify", "n": 1}, r"'classify' needs \['images'\], but there are no \['images'\]"),
        ({"task": "score", "labels": [1]}, "'score' needs"),
        ({"task": "inpaint", "images": ["a"]}, r"'inpaint' needs \['images', 'masks'\], but there are no \['masks'\]"),
        ({"task": "classify", "images": ["a"], "labels": [1]}, r"'classify' takes .* has no use for \['labels'\]"),
        ({"task": "score", "images": ["a"], "masks": ["b"]}, r"no use for \['masks'\]"),
        ({"task": "inpaint", "images": ["a"], "masks": ["b"], "aspect": "1:1"}, r"no use for \['aspect'\]"),
        ({"task": "sample", "images": ["a"]}, r"'sample' takes .* no use for \['images'\]"),
        ({"task": "interpolate", "images": ["a"]}, "images must come in pairs .* got 1"),
        ({"task": "interpolate", "seeds": [1, 2, 3]}, "seeds must come in pairs"),
        ({"task": "interpolate", "seeds": [1, 2], "labels": [1, 2]}, "seeds must have one seed for each of the 2"),
        ({"task": "interpolate"}, "nothing to sample"),
        ({"n": 1, "task_options": {"steps": 2}}, r"task_options \['steps'\] belong to a task other than 'sample'"),
        ({"n": 1, "task": "sample", "task_options": {"steps": 2}}, "belong to a task"),
    ],
)
def test_requests_that_do_not_go_with_their_task_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        Requests(**wrong)
