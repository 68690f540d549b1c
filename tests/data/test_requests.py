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


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
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
