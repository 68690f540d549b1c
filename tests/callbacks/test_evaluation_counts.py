"""Evaluation: how many samples, against which real items, on how many processes, with which weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_flows.callbacks import EMA, Evaluation
from lightning_flows.callbacks.places import Places
from lightning_flows.metrics import PRDC, Frechet, InceptionScore, Pixels, collect, save_references
from tests.callbacks.evaluation_ranks import ITEMS, Data, Items, Shades, evaluate, metrics, trainer

ROOT = Path(__file__).parents[2]


def values(folder, stage="test"):
    return json.loads((Path(folder) / "metrics.json").read_text())[stage]["values"]


def scored(folder, *arguments, loader=None, model=None, **options):
    model = model or Shades()
    trainer(folder, Evaluation(*arguments, **options)).test(model, loader or DataLoader(Items(), 2), verbose=False)
    return model, values(folder)


def test_more_samples_than_items_are_drawn_in_further_rounds_with_other_numbers(tmp_path):
    model, found = scored(tmp_path, [Frechet()], samples=16)
    assert sorted(model.drawn) == list(range(16))  # the items' own batches, twice more, nothing beyond
    entry = found["frechet[pixels]"]
    assert (entry["real"], entry["samples"]) == (ITEMS, 16)
    metric = Frechet()
    metric.update(torch.stack([item["image"] for item in map(Items().__getitem__, range(ITEMS))]), real=True)
    metric.update(model.test_step({"index": torch.arange(16), "image": None}, 0)["sample"].detach(), real=False)
    assert entry["value"] == pytest.approx(metric.compute().item())


def test_a_look_draws_no_more_than_it_is_asked_for(tmp_path):
    model = Shades()
    trainer(tmp_path, Evaluation([Frechet()], samples=3, on="validation")).validate(
        model, DataLoader(Items(), 2), verbose=False
    )
    assert sorted(model.drawn) == [0, 1, 2, 3]  # whole batches
    entry = values(tmp_path, "val")["frechet[pixels]"]
    assert (entry["real"], entry["samples"]) == (ITEMS, 3)


@pytest.fixture
def reference(tmp_path):
    return str(save_references(tmp_path / "real.safetensors", collect([torch.randn(50, 1, 2, 2)], Pixels())))


def test_with_a_reference_no_real_items_are_needed_and_its_count_is_written(tmp_path, monkeypatch, reference):
    monkeypatch.setattr(Shades, "data_of", lambda *_: None)
    model, found = scored(tmp_path, [Frechet(reference=reference), InceptionScore(Pixels(), splits=1)])
    entry = found["frechet[pixels]"]
    assert (entry["real"], entry["samples"]) == (50, ITEMS)
    assert entry["reference"] == {"file": "real.safetensors", "count": 50}
    assert entry["value"] > 0
    assert found["inception_score[pixels]"]["value"]["mean"] > 0
    with pytest.raises(ValueError, match=r"prdc\[pixels\] needs \['real'\].*lightning-flows statistics"):
        scored(tmp_path, [PRDC()], model=model)


def test_real_items_that_are_decoded_latents_are_called_so(tmp_path, monkeypatch, reference):
    class Latents(Items):
        def __getitem__(self, index):
            return {"latent": torch.full((1, 2, 2), float(index)), "index": index}

    monkeypatch.setattr(Shades, "data_of", lambda self, batch: batch["latent"])
    _, found = scored(tmp_path, [PRDC(nearest=1), Frechet(reference=reference)], loader=DataLoader(Latents(), 2))
    assert found["prdc[pixels]"]["real_items"] == "decoded from cached latents"
    assert "real_items" not in found["frechet[pixels]"]


@pytest.mark.parametrize(("minimum", "computed"), [(None, True), ("needed", False), (5, True), (8, False)])
def test_too_few_items_are_marked_or_refused(tmp_path, minimum, computed):
    with pytest.warns(UserWarning, match=r"Evaluation: prdc\[pixels\]"):
        _, found = scored(tmp_path, [Frechet(), PRDC(nearest=1)], minimum=minimum)
    entry = found["prdc[pixels]"]
    assert (entry["value"] is not None) == computed
    assert (entry["real"], entry["samples"], entry["extractor"]) == (ITEMS, ITEMS, "pixels")
    assert "20 of each are needed" in entry["caution"] or "needs" in entry["caution"]
    if not computed:
        needed = 20 if minimum == "needed" else 8
        assert f"refused: it needs {needed} items of each set, there are 7 samples and 7 real" in entry["caution"]
    assert (found["frechet[pixels]"]["value"] is not None) == (minimum in (None, 5, "needed"))  # 4 features need 5


@pytest.mark.parametrize(
    ("options", "word"), [({"minimum": 0}, "minimum must be at least 1"), ({"minimum": "all"}, "'needed' or None")]
)
def test_a_wrong_minimum_is_named(options, word):
    with pytest.raises(ValueError, match=word):
        Evaluation(**options)


def test_a_look_in_a_fit_draws_with_the_averaged_weights_and_the_fit_does_not_notice(tmp_path):
    seen = []

    class Watching(Shades):
        def test_step(self, batch, batch_idx):
            seen.append(self.weight.item())
            return super().test_step(batch, batch_idx)

    def weights(*callbacks):
        model = Watching()
        options = {"max_epochs": 2, "limit_train_batches": 1, "num_sanity_val_steps": 1}
        fit = trainer(tmp_path, EMA(0.5, warmup=False), *callbacks, **options)
        fit.fit(model, datamodule=Data())
        return model.weight.item()

    alone = weights()
    assert weights(Evaluation(metrics(), on="validation", every_n_epochs=2)) == alone == 4.0
    assert set(seen) == {4.0}  # steps to 3 and 5: the average, not the raw 5
    assert len(seen) == 4  # batches, once: not at the sanity check, not after the first epoch
    entry = values(tmp_path, "val")["frechet[pixels]"]
    assert (entry["epoch"], entry["samples"], entry["extractor"]) == (1, ITEMS, "pixels")


def test_places_are_those_among_all_processes_and_repeats_are_known():
    from lightning_flows.data.keyed import EvaluationSampler

    for world in (1, 2, 3, 4):
        counted = []
        for rank in range(world):
            sampler = EvaluationSampler(5, wrap=True, rank=rank, world_size=world)
            places = Places(rank, world)
            loader = DataLoader(range(5), sampler=sampler, batch_size=2)
            for batch in loader:
                where, fresh = places.take(len(batch), loader)
                assert torch.equal(where[fresh], batch[fresh])
                assert places.first(where) == int(where[0]) - rank
                counted += batch[fresh].tolist()
        assert sorted(counted) == list(range(5))


@pytest.mark.slow
def test_two_processes_give_the_values_of_one_with_an_odd_number_of_items(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.callbacks.evaluation_ranks", str(tmp_path / "two"), "2", "11"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MASTER_PORT": str(port)}
    started = [subprocess.Popen(command, cwd=ROOT, env=env | {"LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(timeout=600) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    evaluate(tmp_path / "one", 1, 11)
    for folder, stage, samples in (("test", "test", 11), ("fit", "val", 5)):
        one, two = values(tmp_path / "one" / folder, stage), values(tmp_path / "two" / folder, stage)
        assert one.keys() == two.keys()
        for name, entry in one.items():
            assert (entry["real"], entry["samples"]) == (ITEMS, samples)
            assert (two[name]["real"], two[name]["samples"]) == (ITEMS, samples)
            assert two[name]["nfe"] == 9  # of the process that needed most
            numbers = entry["value"] if isinstance(entry["value"], dict) else {"": entry["value"]}
            for key, number in numbers.items():
                other = two[name]["value"][key] if key else two[name]["value"]
                assert other == pytest.approx(number, rel=1e-6, abs=1e-9), (folder, name, key)
    assert values(tmp_path / "two" / "test", "speed")["seconds_per_sample[batch=2]"]["processes"] == 2
