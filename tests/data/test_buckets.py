"""Buckets: batches of one shape, and every promise of the data room with them."""

import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from torchmetrics import Metric

from lightning_flows.callbacks import Evaluation
from lightning_flows.callbacks.places import Places
from lightning_flows.codecs import Identity
from lightning_flows.codecs.aspect import bucket_size, width_to_height
from lightning_flows.data import (
    Arrays,
    AspectBuckets,
    BucketEvaluationSampler,
    BucketSampler,
    CaptionFolder,
    ImageFolder,
    LatentWriter,
    MaskFolder,
    WebDataset,
)
from lightning_flows.data.bucketed import BatchesOfRanks
from lightning_flows.flow.couplings import OptimalTransport
from lightning_flows.flow.noise import key
from lightning_flows.store import build

BUCKETS = AspectBuckets(16, 2, ratios=("16:9", "1:1", "2:3"))  # 12 x 22, 16 x 16, 20 x 14
SHAPES = {"16:9": (18, 32), "1:1": (20, 21), "2:3": (30, 20)}  # height, width of the files
NUMBERS = torch.tensor([0] * 11 + [1] * 9 + [2] * 3)


def picture(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """11 wide, 9 square and 3 tall pictures for training, 3 + 3 + 1 to test, mixed by their names."""
    root = tmp_path_factory.mktemp("pictures")
    for split, counts in (("train", (11, 9, 3)), ("test", (3, 3, 1)), ("val", (2, 2, 1))):
        kinds = [kind for kind, count in zip(SHAPES, counts, strict=True) for _ in range(count)]
        for place in torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1)).tolist():
            picture(root / split / f"{place:02d}.png", *SHAPES[kinds[place]], seed=place)
    return root


def folder(files, **kwargs):
    return ImageFolder(str(files), **{"buckets": BUCKETS, "batch_size": 2, "seed": 5, **kwargs})


def check(batch):
    (aspect,) = set(batch["aspect"])
    assert batch["image"].shape[2:] == BUCKETS.size(aspect)
    assert len(batch["aspect"]) == len(batch["image"]) == len(batch["index"])


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)


# ---- the sizes


@pytest.mark.parametrize("side", [64, 256, 1000])
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_sizes_have_the_area_the_shape_and_the_multiple(side, multiple):
    buckets = AspectBuckets(side, multiple)
    assert len(buckets.ratios) == 9
    for ratio in buckets.ratios:
        height, width = buckets.size(ratio)
        wide = width_to_height(ratio)
        assert height % multiple == width % multiple == 0
        assert abs(height - side / wide**0.5) <= multiple / 2
        assert abs(width - side * wide**0.5) <= multiple / 2
        turned = ":".join(reversed(ratio.split(":")))
        assert buckets.size(turned) == (width, height)


def test_a_picture_of_a_buckets_size_belongs_to_it():
    buckets = AspectBuckets(512, 8)
    assert [buckets.of(*buckets.size(ratio)) for ratio in buckets.ratios] == list(buckets.ratios)


def test_the_nearest_bucket_is_that_of_the_logarithm():
    buckets = AspectBuckets(64, 1, ratios=("4:1", "1:1"))
    assert buckets.of(100, 201) == "4:1"  # the border lies at 2, not at 2.5
    assert buckets.of(100, 199) == "1:1"
    assert buckets.of(1000, 1) == "1:1"
    assert AspectBuckets(64, 1, ratios=("1:2", "2:1")).of(7, 7) == "1:2"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"side": 0}, "side and multiple must be at least 1, got side=0"),
        ({"multiple": 0}, "multiple=0"),
        ({"side": 4, "multiple": 8}, "side=4 is too small for multiple=8"),
        ({"ratios": ()}, "ratios must be one or more"),
        ({"ratios": ("1:1", "2:2")}, "different shapes"),
        ({"ratios": ("16/9",)}, "ratios must be WIDTH:HEIGHT such as '16:9', got '16/9'"),
        ({"ratios": ("0:1",)}, "WIDTH:HEIGHT"),
        ({"ratios": (969,)}, "in YAML in quotation marks"),
        ({"min_pixels": 1.5}, r"min_pixels must lie in \[0, 1\]"),
        ({"min_pixels": float("nan")}, "min_pixels"),
    ],
)
def test_wrong_buckets_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        AspectBuckets(**{"side": 64, "multiple": 8, **wrong})


def test_an_unknown_bucket_or_an_empty_picture_is_named():
    with pytest.raises(ValueError, match=r"ratio must be one of \['16:9', '1:1', '2:3'\], got '9:16'"):
        BUCKETS.size("9:16")
    with pytest.raises(ValueError, match="height and width must be at least 1, got 0 and 3"):
        BUCKETS.of(0, 3)
    with pytest.raises(ValueError, match="side=0"):
        bucket_size("1:1", 0)


# ---- training batches


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_of_one_bucket_and_of_its_size(files, workers):
    loader = folder(files, num_workers=workers, persistent_workers=False).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 5 + 4 + 1
    for batch in batches:
        check(batch)
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    assert len(set(indices)) == len(indices) == 20
    assert Counter(batch["aspect"][0] for batch in batches) == {"16:9": 5, "1:1": 4, "2:3": 1}


def test_what_no_batch_holds_comes_in_another_epoch_and_the_order_changes(files):
    loader = folder(files).train_dataloader()
    epochs = [list(loader) for _ in range(12)]
    orders = {tuple(batch["aspect"][0] for batch in epoch) for epoch in epochs}
    assert len(orders) > 6
    left = [set(range(23)) - set(torch.cat([b["index"] for b in epoch]).tolist()) for epoch in epochs]
    assert all(len(each) == 3 for each in left)
    assert not set.intersection(*left)


def test_the_order_is_that_of_seed_and_epoch():
    def order(**kwargs):
        return BucketSampler(NUMBERS, 2, **{"seed": 1, **kwargs}).order(3).tolist()

    torch.manual_seed(0)
    first = order()
    torch.manual_seed(1)
    assert order() == first != order(seed=2)
    sampler = BucketSampler(NUMBERS, 2, seed=1)
    sampler.set_epoch(3)
    assert list(itertools.chain(*sampler)) == [3 * 23 + i for i in first]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_global_batches_of_one_bucket(world, drop_last):
    parts = [BucketSampler(NUMBERS, 2, rank=r, world_size=world, drop_last=drop_last) for r in range(world)]
    batches = [part.batches(7) for part in parts]
    assert {len(each) for each in batches} == {len(parts[0])}
    taken = Counter()
    for rows in zip(*batches, strict=True):  # batch k of every rank
        together = torch.cat(rows)
        assert len(NUMBERS[together].unique()) == 1
        assert len({len(row) for row in rows}) == 1
        taken.update(together.tolist())
    if drop_last:
        assert set(taken.values()) == {1}
        assert len(taken) == sum(n // (2 * world) * 2 * world for n in (11, 9, 3))
    else:
        assert set(taken) == set(range(23))
        assert sum(taken.values()) == sum(-(-n // world) * world for n in (11, 9, 3))


def test_one_device_sees_the_global_batches_of_two():
    one = BucketSampler(NUMBERS, 4).batches(2)
    two = [BucketSampler(NUMBERS, 2, rank=r, world_size=2).batches(2) for r in range(2)]
    assert all(torch.equal(whole, torch.stack(rows, 1).flatten()) for whole, *rows in zip(one, *two, strict=True))


def test_more_ranks_than_items_of_a_bucket_take_them_in_turn():
    parts = [BucketSampler(torch.tensor([0, 0]), 2, rank=r, world_size=5, drop_last=False) for r in range(5)]
    assert Counter(torch.cat([part.order(0) for part in parts]).tolist()).keys() == {0, 1}
    assert {len(part) for part in parts} == {1}


def test_smaller_last_batches_hold_what_is_left(files):
    batches = list(folder(files, drop_last=False).train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(23))
    for batch in batches:
        check(batch)
    assert Counter(len(batch["index"]) for batch in batches) == {2: 10, 1: 3}


def test_buckets_without_a_full_batch_are_told(files):
    with pytest.warns(UserWarning, match=r"global batch of 4 are never seen, {'2:3': 3}"):
        folder(files, batch_size=4).train_dataloader()
    with pytest.raises(ValueError, match=r"batch_size=12 on 1 device.*{'16:9': 11, '1:1': 9, '2:3': 3}"):
        folder(files, batch_size=12).train_dataloader()


def test_augmentation_is_keyed_by_epoch_and_index(files):
    batches = [
        list(folder(files, crop="random", flip=True, num_workers=n, persistent_workers=False).train_dataloader())
        for n in (0, 2)
    ]
    same(*batches)
    plain = list(folder(files).train_dataloader())
    assert [b["index"].tolist() for b in plain] == [b["index"].tolist() for b in batches[0]]
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(plain, batches[0], strict=True))


def test_a_coupling_pairs_noise_of_the_buckets_shape(files):
    batch = next(iter(folder(files, coupling=OptimalTransport(0.0)).train_dataloader()))
    assert batch["source"].shape == batch["image"].shape


# ---- stop and resume


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_loader_goes_on_with_the_next_batch(files, workers, stop, drop_last):
    def loader():
        options = {"num_workers": workers, "persistent_workers": False, "drop_last": drop_last}
        return folder(files, crop="random", **options).train_dataloader()

    one = loader()
    whole = list(one) + list(one)
    stopped = loader()
    first = list(itertools.islice(stopped, stop))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert (state["epoch"], state["batches"], state["length"]) == (0, stop, 23)
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    same(first + list(resumed) + list(resumed), whole)


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"drop_last": False}, {"buckets": AspectBuckets(16, 2)}])
def test_resuming_with_other_buckets_says_so_and_starts_the_epoch_anew(files, change):
    state = {**folder(files).train_dataloader().state_dict(), "epoch": 1, "trainer_epoch": 1, "batches": 3}
    loader = folder(files, **change).train_dataloader()
    with pytest.warns(UserWarning, match="starts anew"):
        loader.load_state_dict(state)
    numbers = torch.cat([batch["index"] for batch in loader])
    assert torch.equal(numbers, loader.sampler.order(1))


def test_a_state_of_batches_without_buckets_starts_the_epoch_anew(files):
    plain = folder(files, buckets=None, size=16).train_dataloader()
    bucketed = folder(files).train_dataloader()
    for one, other in ((plain, bucketed), (bucketed, plain)):
        with pytest.warns(UserWarning, match="starts anew"):
            one.load_state_dict(other.state_dict())


class Probe(L.LightningModule):
    """Notes what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.tested, self.predicted = [], [], [], []

    def training_step(self, batch):
        check(batch)
        self.seen.append((batch["epoch"].tolist(), batch["index"].tolist(), batch["image"].sum().item()))
        return self.weight * 1.0

    def validation_step(self, batch):
        self.validated += batch["index"].tolist()

    def test_step(self, batch, batch_idx=0):
        self.tested += batch["index"].tolist()
        sample = batch["index"].float().reshape(-1, 1, 1, 1)
        return {"real": batch["image"], "sample": sample, "nfe": 1, "seconds": 0.0}

    def predict_step(self, batch):
        assert len(set(batch["aspect"])) == 1
        self.predicted += zip(batch["id"], batch["aspect"], batch["seed"].tolist(), strict=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(path, data, steps, callbacks=(), ckpt_path=None, **kwargs):
    model = Probe()
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=path, max_steps=steps, logger=False, callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


def test_a_run_of_the_trainer_is_resumed_exactly_and_tests_every_item(tmp_path, files, recwarn):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    data = folder(files, crop="random", num_workers=2, persistent_workers=False)
    whole, trainer = run(tmp_path / "whole", data, 23, [save])
    assert sorted(whole.validated) == sorted([*range(5)] * 2)  # two epochs of ten steps
    for stop in (4, 10, 17):
        ckpt = tmp_path / f"step={stop}.ckpt"
        rest, _ = run(tmp_path / f"rest{stop}", folder(files, crop="random"), 23, ckpt_path=ckpt)
        assert rest.seen == whole.seen[stop:], stop
    trainer.test(whole, data, verbose=False)
    assert sorted(whole.tested) == list(range(7))
    trainer.predict(whole, data)
    assert sorted(name for name, *_ in whole.predicted) == [f"{i:05d}" for i in range(7)]
    aspects = {i: item["aspect"] for i, item in enumerate(data.dataset("test"))}
    assert {(name, aspect, seed) for name, aspect, seed in whole.predicted} == {
        (f"{i:05d}", aspects[i], key(5, i)) for i in range(7)
    }
    assert not [w for w in recwarn if "batch indices" in str(w.message)]


class Report(Callback):
    """Keeps what each process saw, in a file for each stage."""

    def _keep(self, trainer, stage, seen):
        (Path(trainer.default_root_dir) / f"{stage}{trainer.global_rank}.json").write_text(json.dumps(seen))

    def on_train_end(self, trainer, module):
        self._keep(trainer, "fit", module.seen)

    def on_test_end(self, trainer, module):
        self._keep(trainer, "test", module.tested)

    def on_predict_end(self, trainer, module):
        self._keep(trainer, "predict", module.predicted)


class Total(Metric):
    """Number and sum of the first pixels it is shown."""

    name = "total"

    def __init__(self):
        super().__init__()
        self.add_state("sums", torch.zeros(4), dist_reduce_fx="sum")

    def update(self, x, real):
        self.sums[0 if real else 2] += len(x)
        self.sums[1 if real else 3] += x.flatten(1)[:, 0].sum()

    def compute(self):
        return self.sums


def test_two_devices_share_batches_of_one_bucket_and_test_every_item_once(tmp_path, files):
    data = folder(files)
    evaluation = Evaluation([Total()], samples=16)
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True}
    _, trainer = run(tmp_path, data, 4, [Report(), evaluation], **options)
    trainer.test(Probe(), data, verbose=False)
    trainer.predict(Probe(), data)

    def kept(stage):
        return [json.loads((tmp_path / f"{stage}{rank}.json").read_text()) for rank in (0, 1)]

    one = list(folder(files, batch_size=4).train_dataloader())
    for step, rows in enumerate(zip(*kept("fit"), strict=True)):
        assert [row[1] for row in rows] == [one[step]["index"].tolist()[rank::2] for rank in (0, 1)]
    drawn = itertools.chain(*kept("test"))  # also for the further rounds of the evaluation, numbered from 7 on
    assert sorted(number for number in drawn if number < 7) == list(range(7))
    names = [name for name, *_ in itertools.chain(*kept("predict"))]
    assert sorted(names) == [f"{i:05d}" for i in range(7)]
    total = json.loads((tmp_path / "metrics.json").read_text())["test"]["values"]["total"]
    pixels = sum(item["image"].flatten()[0].item() for item in data.dataset("test"))
    assert (total["real"], total["samples"]) == (7, 16)
    assert total["value"] == pytest.approx([7, pixels, 16, sum(range(16))], rel=1e-5)


# ---- evaluation


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("world", "size"), [(1, 2), (2, 2), (3, 2), (4, 1), (5, 4)])
def test_evaluation_counts_every_item_once_in_batches_of_one_bucket(world, size, wrap):
    numbers = NUMBERS[torch.randperm(23, generator=torch.Generator().manual_seed(0))]
    samplers = [BucketEvaluationSampler(numbers, size, wrap=wrap, rank=r, world_size=world) for r in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(each) for each in batches] == [len(sampler) for sampler in samplers]
    for batch in itertools.chain(*batches):
        assert 1 <= len(batch) <= size
        assert len(numbers[batch].unique()) == 1
    every = Counter(itertools.chain(*itertools.chain(*batches)))
    assert set(every) == set(range(23))
    assert sum(every.values()) == (-(-23 // world) * world if wrap else 23)
    most, least = (choose(map(len, batches)) for choose in (max, min))
    assert most - least <= (0 if wrap else 1)


class Dealt(torch.utils.data.Dataset):
    def __len__(self):
        return 23


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_gives_every_item_one_place_and_the_same_first_place_on_all_ranks(world, wrap):
    """What `callbacks.Evaluation` relies on, so that its counts are exact with buckets too."""
    found, firsts = Counter(), []
    for rank in range(world):
        sampler = BucketEvaluationSampler(NUMBERS, 2, wrap=wrap, rank=rank, world_size=world)
        loader = torch.utils.data.DataLoader(Dealt(), sampler=sampler, batch_size=None)
        places, first = Places(rank, world), []
        for batch in sampler:
            numbers, fresh = places.take(len(batch), loader)
            first.append(places.first(numbers))
            found.update((place, item) for place, item in zip(numbers[fresh].tolist(), batch, strict=False))
        firsts.append(first)
    assert set(found.values()) == {1}
    assert sorted(place for place, _ in found) == sorted(item for _, item in found) == list(range(23))
    assert all(first == firsts[0][: len(first)] for first in firsts)


@pytest.mark.parametrize("workers", [0, 2])
def test_test_batches_are_of_one_bucket(files, workers):
    data = folder(files, num_workers=workers, persistent_workers=False)
    for loader, count in ((data.test_dataloader(), 7), (data.val_dataloader(), 5)):
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            check(batch)
            assert "epoch" not in batch
        assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(count))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_of_requests_are_dealt_out_in_turn(world):
    batches = BatchesOfRanks(Dealt(), NUMBERS, 4, world).batches
    assert sorted(itertools.chain(*batches)) == list(range(23))
    for rank in range(world):
        own = list(BucketEvaluationSampler(NUMBERS, 4, rank=rank, world_size=world))
        assert batches[rank::world] == own


# ---- the files


def test_images_are_scaled_to_cover_their_bucket_and_cropped(tmp_path):
    ramp = np.tile(np.arange(40, dtype=np.uint8)[None, :, None] * 5, (22, 1, 3))  # 22 x 40, a little wide for 12 x 22
    (tmp_path / "train").mkdir()
    Image.fromarray(ramp).save(tmp_path / "train" / "a.png")
    item = folder(tmp_path, channels=1).dataset("train")[0]
    assert item["aspect"] == "16:9"
    row = (item["image"][0, 5] + 1) * 127.5
    assert item["image"].shape == (1, 12, 22)
    assert (row.diff() - 5 * 22 / 12).abs().max() < 3  # undistorted: 22 rows became 12
    assert abs(row.mean() - 19.5 * 5) < 1  # the centre


def test_small_images_are_left_out_and_counted(tmp_path):
    for name, (height, width) in {"a": (16, 16), "b": (11, 11), "c": (12, 11), "d": (40, 40), "e": (2, 90)}.items():
        picture(tmp_path / f"{name}.png", height, width)
    buckets = AspectBuckets(16, 2, min_pixels=0.5)  # 128 pixels
    with pytest.warns(UserWarning, match=r"1 of 5 train images have less than min_pixels=0.5 of 16 x 16 pixels"):
        items = folder(tmp_path, buckets=buckets).dataset("train")
    assert [item["aspect"] for item in items] == ["1:1", "1:1", "1:1", "21:9"]
    assert len(folder(tmp_path, buckets=AspectBuckets(16, 2)).dataset("train")) == 5
    with pytest.raises(ValueError, match="none of the 5 train images"):
        folder(tmp_path, buckets=AspectBuckets(256, 2, min_pixels=0.5)).dataset("train")


def test_sizes_come_from_the_headers_once(files, monkeypatch):
    opened, decoded = Counter(), []
    real = Image.open

    def counting(file, *others, **options):
        opened[str(file)] += 1
        return real(file, *others, **options)

    monkeypatch.setattr(Image, "open", counting)
    monkeypatch.setattr("lightning_flows.data.folders.read_image", lambda *_: decoded.append(1))
    data = folder(files)
    data.setup("fit")
    for _ in range(2):
        data.train_dataloader()
        data.val_dataloader()
    assert set(opened.values()) == {1}
    assert len(opened) == 23 + 5
    assert not decoded


def test_fractions_and_a_cache_change_nothing(files):
    a, b = (folder(files / "train", val_fraction=0.3, cache=cache, channels=3, batch_size=1) for cache in (False, True))
    assert (len(a.dataset("train")), len(a.dataset("val"))) == (16, 7)
    same(list(a.train_dataloader()), list(b.train_dataloader()))
    same(list(a.val_dataloader()), list(b.val_dataloader()))


def test_a_broken_file_is_named_or_replaced_by_one_of_the_batches_size(tmp_path):
    for i in range(8):
        picture(tmp_path / f"{i}.png", *SHAPES["16:9" if i % 2 else "1:1"])
    (tmp_path / "2.png").write_bytes(b"no picture")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])  # the header is there
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        folder(tmp_path).dataset("train")
    data = folder(tmp_path, on_broken="skip", max_broken=0.3)
    with pytest.warns(UserWarning, match=r"[25]\.png"):
        batches = list(data.train_dataloader())
    for batch in batches:
        check(batch)
    items = data.dataset("train")
    assert [items[i]["aspect"] for i in (2, 3, 5, 6)] == ["16:9", "16:9", "16:9", "1:1"]
    assert torch.equal(items[2]["image"], items[3]["image"])
    assert data.broken("train") == [2, 5]
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 8 train items can be read"):
        folder(tmp_path, on_broken="skip", max_broken=1.0).dataset("train")


def test_the_other_layouts_with_files_have_buckets_too(tmp_path):
    shapes = [SHAPES["16:9"], SHAPES["2:3"]] * 2
    for i, shape in enumerate(shapes):
        picture(tmp_path / "captions" / f"{i}.png", *shape)
        picture(tmp_path / "masks" / "images" / f"{i}.png", *shape)
        (tmp_path / "masks" / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.full(shape, i, np.uint8)).save(tmp_path / "masks" / "masks" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"text {i}"}) for i in range(4)]
    (tmp_path / "captions" / "metadata.jsonl").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(4):
            tar.add(tmp_path / "captions" / f"{i}.png", arcname=f"{i}.png")
    options = {"buckets": BUCKETS, "batch_size": 2}
    for data in (
        CaptionFolder(str(tmp_path / "captions"), **options),
        MaskFolder(str(tmp_path / "masks"), **options),
        WebDataset(str(tmp_path / "shard.tar"), **options),
    ):
        batches = list(data.train_dataloader())
        assert sorted(batch["aspect"][0] for batch in batches) == ["16:9", "2:3"]
        for batch in batches:
            check(batch)
            if "mask" in batch:
                assert batch["mask"].shape[1:] == batch["image"].shape[2:]
            if "caption" in batch:
                assert batch["caption"] == [f"text {i}" for i in batch["index"].tolist()]


def test_a_broken_member_of_a_shard_is_named(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "0.png", arcname="0.png")
    with pytest.raises(ValueError, match=r"shard\.tar, 0\.png cannot be read"):
        WebDataset(str(tmp_path / "shard.tar"), buckets=BUCKETS).dataset("train")


def test_data_that_cannot_tell_sizes_say_so(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros((4, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"buckets need the size of every image, which TensorItems cannot tell"):
        Arrays(str(tmp_path), buckets=BUCKETS).dataset("train")
    batch = next(iter(Arrays(str(tmp_path), buckets=BUCKETS, cache=True, batch_size=2).train_dataloader()))
    assert batch["aspect"] == ["1:1", "1:1"]


@pytest.mark.parametrize("wrong", [{"size": 16}, {"size": 16, "resize": 20}])
def test_a_size_beside_buckets_is_an_error(files, wrong):
    with pytest.raises(ValueError, match="buckets say the sizes: size must be None with them, got size=16"):
        folder(files, **wrong)


def test_an_unknown_crop_is_named_with_buckets_too(files):
    with pytest.raises(ValueError, match="crop must be 'center' or 'random'"):
        folder(files, crop="corner")


def test_latents_of_buckets_are_refused(tmp_path, files):
    with pytest.raises(ValueError, match=r"buckets=.* cannot be encoded: latents of one folder have one shape"):
        LatentWriter(Identity(), folder(files), tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_the_config_rebuilds_the_buckets(files):
    data = folder(files, buckets=AspectBuckets(16, 2, ratios=("1:1", "2:3"), min_pixels=0.5))
    assert json.loads(json.dumps(data.config))["init_args"]["buckets"] == {
        "class_path": "lightning_flows.data.AspectBuckets",
        "init_args": {"side": 16, "multiple": 2, "ratios": ["1:1", "2:3"], "min_pixels": 0.5},
    }
    assert build(data.config).buckets == data.buckets
