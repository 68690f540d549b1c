"""SymmFlow in the benchmarks: what an entry stores and shows, its figures, codes side by side, and plain readers."""

import json

import pytest
import torch

from benchmarks import plain_readers, semantic_codes, zoo_entry, zoo_semantics, zoo_symmflow
from lightning_flows.codecs import JointSemantics, OneHot, painted
from lightning_flows.data import Shapes, shape_label, shape_mask
from lightning_flows.flow import SymmetricMatching
from lightning_flows.modules import SymmFlow
from lightning_flows.networks import ADMUNet
from tests.benchmarks.test_zoo_entry import run_of

SIZES = {"hidden_size": 32, "channel_mult": [1], "num_blocks": 1, "attention_factors": [], "head_channels": 32}
RECIPE = "data: {class_path: lightning_flows.data.Shapes, init_args: {size: 16, n_test: 12, batch_size: 4}}\n"


def model_of(keys=("mask", "label"), **options):
    parts = {"mask": OneHot(6), "label": OneHot(5, per="image")}
    semantic = JointSemantics([parts[key] for key in keys])
    network = ADMUNet(input_size=16, in_channels=3 + semantic.channels, **SIZES)
    for name, parameter in network.named_parameters():
        if "out_conv" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return SymmFlow(network=network, semantic=semantic, objective=SymmetricMatching(drop_rate=0.1), steps=2, **options)


@pytest.fixture(scope="module")
def items():
    data = Shapes(size=16, n_test=12)
    rows = [data.dataset("test")[i] for i in range(12)]
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("image", "mask", "label")}


@pytest.mark.parametrize("keys", [("mask",), ("label",), ("mask", "label")])
def test_an_entry_stores_velocity_samples_and_codes(keys):
    model = model_of(keys)
    inputs = zoo_entry.inputs_of(model, 10, None)
    assert inputs.keys() == {"x", "t", *keys} <= set(zoo_entry.INPUTS)
    found = zoo_entry.outputs_of(model, inputs)
    assert found["velocity"].shape == (4, *model.network.shape)
    assert found["sample"].shape == (4, 3, 16, 16)
    assert found["code"].shape == (4, model.semantic.channels, 16, 16)
    again = zoo_entry.outputs_of(model, inputs)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_every_class_is_asked_for_in_the_stored_masks():
    masks = zoo_semantics.blocks(10, 6, (16, 12))
    assert masks.shape == (10, 16, 12)
    assert sorted(masks[0].unique().tolist()) == list(range(6))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_the_picture_shows_photos_only_where_they_may_be_shown(items):
    model = model_of()
    rows = torch.stack(zoo_semantics.picture(model, items, columns=6)).split(6)
    assert len(rows) == 8  # two times image, read, asked, drawn
    assert torch.equal(rows[0], items["image"][:6])
    assert torch.equal(rows[2], painted(items["mask"][:6], model.semantic.colours()))
    without = torch.stack(zoo_semantics.picture(model, {k: v for k, v in items.items() if k != "image"}, columns=6))
    assert torch.equal(torch.cat(without.split(6)[:2]), torch.cat([rows[2], rows[3]]))


class Perfect(SymmFlow):
    """Draws and reads what is true."""

    def sample(self, condition, **_):
        return self._rows(condition.spatial[:, 0])

    def read(self, image, *, steps=None, seeds=None):
        rows = {"mask": shape_mask(image), "label": shape_label(shape_mask(image))}
        decoded = self.semantic.decode(self.semantic.encode(rows, (16, 16)))
        return super().read(image, steps=steps, seeds=seeds)._replace(decoded=decoded)

    def _rows(self, masks):
        found = [(self.items["mask"] == mask).flatten(1).all(1).nonzero()[0, 0] for mask in masks]
        return self.items["image"][torch.stack(found)]


def test_a_perfect_model_has_perfect_figures(items):
    plain = model_of()
    model = Perfect(network=plain.network, semantic=plain.semantic, objective=plain.objective)
    model.items = items
    read = zoo_symmflow.reading(model, items, 1)
    assert {name: value["value"] for name, value in read.items()} == pytest.approx(
        {"miou": 1.0, "pixel_accuracy": 1.0, "boundary_f": 1.0, "accuracy": 1.0, "calibration": 0.0}, abs=1e-4
    )
    assert read["miou"]["items"] == 12
    assert read["miou"]["per_class"] == [1.0] * 6
    drawn = zoo_symmflow.drawing(model, items)
    assert drawn["asked_miou"]["value"] == drawn["asked_label"]["value"] == 1.0


def test_what_an_untrained_model_reads_is_no_better_than_a_guess(items):
    read = zoo_symmflow.reading(model_of(), items, 1)
    assert read["miou"]["value"] < 0.3
    assert zoo_symmflow.drawing(model_of(), items)["asked_miou"]["value"] < 0.3


def test_an_inversion_with_the_reached_code_is_better_than_with_the_decoded_one(items, monkeypatch):
    monkeypatch.setattr(zoo_symmflow, "INVERTED", 20)
    found = zoo_symmflow.inversion(model_of(), items)
    assert found["inversion_psnr"]["value"] > 30
    assert found["inversion_psnr"]["value"] > found["inversion_psnr_decoded"]["value"]


def test_an_entry_and_its_figures_by_their_commands(tmp_path, monkeypatch):
    run, out = run_of(model_of(), tmp_path / "run", RECIPE), tmp_path / "entry"
    about = ["--licence", "apache-2.0", "--data", "made up", "--summary", "A pair.", "--photos"]
    monkeypatch.setattr("sys.argv", ["zoo_entry", str(run), str(out), *about])
    zoo_entry.main()
    metrics = out / "metrics.json"
    monkeypatch.setattr(zoo_symmflow, "MANY", 2)
    monkeypatch.setattr("sys.argv", ["zoo_symmflow", str(out), "--metrics", str(metrics), "--inverted", "2"])
    zoo_symmflow.main()
    found = json.loads(metrics.read_text())
    assert found.keys() >= {"reading", "reading_2", "drawing", "inversion"}
    assert found["reading"]["values"]["miou"]["items"] == 12


def test_every_code_has_the_planes_that_its_recipe_says():
    for code, parts in semantic_codes.CODES.items():
        config = semantic_codes.recipe(code, 8)
        assert config.model.init_args.network.init_args.network.init_args.in_channels == 3 + semantic_codes.PLANES[code]
        assert len(parts) == len(config.model.init_args.semantic.init_args.parts) == 2
        assert config.trainer.max_steps == config.model.init_args.lr_scheduler.init_args.total_steps == 8


@pytest.mark.parametrize("field", ["mask", "label"])
def test_a_plain_reader_learns_what_it_is_shown(field):
    torch.manual_seed(0)
    model = model_of()
    data = Shapes(size=16, n_train=64, n_test=32, batch_size=16, cache=True)
    data.prepare_data()
    data.setup("fit")
    optimizer = {"init_args": {"lr": 2e-3}}
    schedule = {"init_args": {"total_steps": 9, "warmup_steps": 5, "final": 0.01}}
    average = {"class_path": "lightning_flows.callbacks.EMA", "init_args": {"decay": 0.99}}
    config = {
        "model": {"init_args": {"optimizer": optimizer, "lr_scheduler": schedule}},
        "trainer": {"gradient_clip_val": 1.0, "callbacks": [average]},
    }
    reader = plain_readers.Reader(model, field)
    before = plain_readers.test(reader, data, field, model.semantic.num_classes[field])
    averaged, steps, _ = plain_readers.train(reader, data, config, 3.0)
    after = plain_readers.test(averaged, data, field, model.semantic.num_classes[field])
    name = {"mask": "pixel_accuracy", "label": "accuracy"}[field]
    assert steps >= 40
    assert after[name] > before[name] + 0.1
    assert after["items"] == 32
