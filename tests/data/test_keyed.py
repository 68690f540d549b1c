"""Data randomness is a function of (seed, epoch, index): not of workers, ranks or interruptions."""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from lightning_flows.data import Digits, EvaluationSampler, FlowDataModule, KeyedLoader, KeyedSampler
from lightning_flows.flow.couplings import Coupling, OptimalTransport
from lightning_flows.flow.noise import SampleNoise, key


class Ramp(Dataset):
    """Image i is a 1 x 6 x 9 picture that says where its crop was taken."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"image": torch.arange(54).reshape(1, 6, 9).add(i).to(torch.uint8), "label": i % 3}


class Ramps(FlowDataModule):
    def __init__(self, n=20, **kwargs):
        super().__init__(**{"batch_size": 4, **kwargs})
        self.n = n

    def read(self, split):
        return Ramp(self.n) if split == "train" else None


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name


def test_sampler_yields_epoch_times_length_plus_index_and_every_item_once():
    sampler = KeyedSampler(7, seed=3)
    for epoch in (0, 5):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        assert sorted(numbers) == list(range(7 * epoch, 7 * epoch + 7))


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(0)
    first = KeyedSampler(50, seed=1).order(2)
    torch.manual_seed(1)
    assert torch.equal(first, KeyedSampler(50, seed=1).order(2))
    assert not torch.equal(first, KeyedSampler(50, seed=1).order(3))
    assert not torch.equal(first, KeyedSampler(50, seed=2).order(2))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_split_the_global_batches_of_one_device(world):
    whole = KeyedSampler(25).order(0)
    parts = [KeyedSampler(25, rank=r, world_size=world).order(0) for r in range(world)]
    together = torch.stack(parts, 1).flatten()
    assert torch.equal(together, whole[: len(together)])
    assert len(together) == 25 // world * world


def test_wrapping_repeats_the_first_items_only():
    parts = [list(KeyedSampler(7, rank=r, world_size=3, drop_last=False)) for r in range(3)]
    whole = KeyedSampler(7).order(0).tolist()
    assert sorted(itertools.chain(*parts)) == sorted(whole + whole[:2])
    assert all(len(part) == 3 for part in parts)


@pytest.mark.parametrize(("n", "world"), [(9, 2), (9, 4), (2, 3)])
def test_evaluation_counts_every_item_once_or_wraps(n, world):
    exact = [EvaluationSampler(n, rank=r, world_size=world) for r in range(world)]
    assert sorted(i for s in exact for i in s) == list(range(n))
    assert all(len(list(s)) == len(s) for s in exact)
    wrapped = [list(EvaluationSampler(n, rank=r, world_size=world, wrap=True)) for r in range(world)]
    assert len({len(part) for part in wrapped}) == 1
    assert set(itertools.chain(*wrapped)) == set(range(n))
    assert sum(map(len, wrapped)) < n + world


@pytest.mark.parametrize("kwargs", [{"length": 0}, {"length": 4, "rank": 2, "world_size": 2}])
def test_sampler_refuses_what_it_cannot_split(kwargs):
    with pytest.raises(ValueError, match=r"length|rank"):
        KeyedSampler(**kwargs)


def test_augmentation_is_the_same_for_any_number_of_workers():
    batches = [list(Ramps(size=4, crop="random", flip=True, num_workers=n).train_dataloader()) for n in (0, 2)]
    same(*batches)
    assert len({tuple(b["image"].flatten().tolist()) for b in batches[0]}) == len(batches[0])


def test_augmentation_changes_with_the_epoch_and_the_seed():
    a, b = (Ramps(size=4, resize=5, crop="random", flip=True, seed=seed) for seed in (0, 1))
    n = len(a.dataset("train"))
    epochs = torch.stack([a.dataset("train")[e * n + 5]["image"] for e in range(8)])
    assert len(epochs.unique(dim=0)) > 3
    others = torch.stack([b.dataset("train")[e * n + 5]["image"] for e in range(8)])
    assert not torch.equal(epochs, others)


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    data = Ramps(size=4, crop="random", flip=True, val_fraction=0.2, coupling=OptimalTransport(1.0))
    first = list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.rand(3), expected)
    same(
        first,
        list(Ramps(**{**data.config["init_args"], "coupling": OptimalTransport(1.0)}).train_dataloader()),
    )


def test_training_items_carry_epoch_and_index_evaluation_items_index():
    data = Ramps(val_fraction=0.2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    batch = next(iter(loader))
    assert batch["epoch"].tolist() == [3] * 4
    assert batch["index"].dtype == torch.int64
    items = data.dataset("train")
    for row, index in enumerate(batch["index"].tolist()):
        assert torch.equal(batch["image"][row], items[index]["image"])
    assert set(next(iter(data.val_dataloader()))) == {"image", "label", "index"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_loader_goes_on_with_the_next_batch(workers, stop):
    def loader():
        return Ramps(size=4, crop="random", num_workers=workers, persistent_workers=False).train_dataloader()

    one = loader()
    whole = list(one) + list(one)  # two epochs: the second follows by itself
    assert [int(b["epoch"][0]) for b in whole] == [0] * 5 + [1] * 5
    broken = loader()
    first = list(itertools.islice(broken, stop))
    state = broken.state_dict()
    assert state["epoch"] == 0
    assert state["batches"] == stop
    resumed = loader()
    resumed.load_state_dict(state)
    assert len(resumed) == 5
    rest = list(resumed) + (list(resumed) if stop < 5 else [])
    same(first + rest, whole)


def test_iterating_again_after_a_break_starts_the_epoch_anew():
    loader = Ramps().train_dataloader()
    first = next(iter(loader))
    same([first], [next(iter(loader))])


def test_state_of_a_resumed_loader_is_kept_before_its_first_batch():
    state = {"epoch": 2, "trainer_epoch": 3, "batches": 3, "global_batch": 4, "length": 20, "seed": 0}
    loader = Ramps().train_dataloader()
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_epochs_that_the_trainer_counts_without_a_batch_change_nothing():
    whole = Ramps().train_dataloader()
    epochs = [list(whole) for _ in range(4)]
    loader = Ramps().train_dataloader()
    loader.load_state_dict({**whole.state_dict(), "epoch": 0, "trainer_epoch": 0, "batches": 5})
    for number in (1, 2):
        loader.sampler.set_epoch(number)
    same(list(loader), epochs[1])
    loader.sampler.set_epoch(3)
    first = list(itertools.islice(loader, 2))
    again = Ramps().train_dataloader()
    again.load_state_dict(loader.state_dict())
    again.sampler.set_epoch(3)
    same(first + list(again), epochs[2])
    again.sampler.set_epoch(4)
    same(list(again), epochs[3])


def test_resuming_with_another_batch_size_keeps_the_place_in_the_order():
    small = Ramps(batch_size=2).train_dataloader()
    small.load_state_dict({"epoch": 1, "trainer_epoch": 1, "batches": 3, "global_batch": 4, "length": 20, "seed": 0})
    numbers = torch.cat([b["index"] for b in small])
    assert numbers.tolist() == KeyedSampler(20).order(1)[12:].tolist()


def test_resuming_with_other_data_says_so_and_starts_the_epoch_anew():
    loader = Ramps().train_dataloader()
    with pytest.warns(UserWarning, match="starts anew"):
        loader.load_state_dict(
            {"epoch": 1, "trainer_epoch": 1, "batches": 3, "global_batch": 4, "length": 99, "seed": 0}
        )
    assert [int(b["epoch"][0]) for b in loader] == [1] * 5


def test_no_full_batch_is_an_error_that_names_the_argument():
    with pytest.raises(ValueError, match=r"batch_size=64 .* 20 training items"):
        Ramps(batch_size=64).train_dataloader()
    assert len(list(Ramps(batch_size=64, drop_last=False).train_dataloader())) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_coupling_runs_in_the_collate_and_only_reorders_keyed_noise(workers):
    plain = Ramps(num_workers=workers).train_dataloader()
    batch = next(iter(plain))
    seeds = [key(0, "source", 0, i) for i in batch["index"].tolist()]
    drawn = SampleNoise(seeds).normal("x0", like=batch["image"])
    coupled = next(iter(Ramps(num_workers=workers, coupling=OptimalTransport(1.0)).train_dataloader()))
    assert torch.equal(coupled["image"], batch["image"])
    rows = {tuple(row.flatten().tolist()) for row in coupled["source"]}
    assert rows == {tuple(row.flatten().tolist()) for row in drawn}
    cost = (coupled["source"] - coupled["image"]).square().sum()
    assert cost <= (drawn - batch["image"]).square().sum() + 2 * 4  # the label term is at most 1 a row


class Backwards(Coupling):
    def __call__(self, x0, x1, condition=None):
        return x0, x1.flip(0), condition


def test_a_coupling_that_moves_the_data_is_refused():
    with pytest.raises(ValueError, match="coupling must reorder the noise"):
        next(iter(Ramps(coupling=_coupled()).train_dataloader()))


def _coupled():
    from dataclasses import dataclass

    return dataclass(frozen=True)(Backwards)()


def test_overfit_batches_may_replace_the_sampler():
    data = Ramps()
    loader = KeyedLoader(data.dataset("train"), batch_size=4, collate_fn=data.train_dataloader().collate_fn)
    assert len(list(loader)) == 5
    loader.load_state_dict(loader.state_dict())
    assert next(iter(loader))["index"].tolist() == [0, 1, 2, 3]


def test_fractions_divide_the_items_without_overlap_whatever_the_seed():
    a, b = (Ramps(val_fraction=0.2, test_fraction=0.1, seed=s) for s in (0, 1))
    parts = {split: a.dataset(split).items.indices for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*parts.values())) == list(range(20))
    assert {split: len(places) for split, places in parts.items()} == {"train": 14, "val": 4, "test": 2}
    assert parts["val"] == b.dataset("val").items.indices
    assert parts["val"] != Ramps(val_fraction=0.2, test_fraction=0.1, split_seed=1).dataset("val").items.indices


def test_missing_test_split_names_the_ways_out():
    data = Ramps(val_fraction=0.2)
    with pytest.raises(ValueError, match=r"no 'test' split.*test_fraction.*test_split"):
        data.test_dataloader()
    assert len(Ramps(val_fraction=0.2, test_split="val").test_dataloader().dataset) == 4


def test_predict_requests_carry_the_items_conditions():
    data = Ramps(test_fraction=0.3, seed=5)
    batches = list(data.predict_dataloader())
    ids = list(itertools.chain(*(batch["id"] for batch in batches)))
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert ids == [f"{i:05d}-label{label}" for i, label in enumerate(labels)]
    assert torch.cat([batch["seed"] for batch in batches]).tolist() == [key(5, i) for i in range(6)]
    assert "image" not in batches[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"channels": 2},
        {"test_split": "dev"},
        {"val_fraction": 1.0},
        {"val_fraction": -0.1},
        {"size": 0},
        {"size": (4, -1)},
        {"crop": "corner"},
        {"resize": 3, "size": 4},
        {"resize": 3},
    ],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Ramps(**wrong)


def test_cache_gives_the_same_items():
    a, b = (Ramps(size=4, crop="random", flip=True, cache=cache) for cache in (False, True))
    same(list(a.train_dataloader()), list(b.train_dataloader()))


def test_shape_is_known_from_arguments_or_from_the_first_item():
    assert Ramps().shape == (1, 6, 9)
    assert Ramps(size=(2, 3), channels=1).shape == (1, 2, 3)


def test_digits_are_the_bundled_set_in_seventeen_levels():
    data = Digits(batch_size=100)
    assert (data.shape, data.num_classes, data.levels) == ((1, 8, 8), 10, 17)
    sizes = {split: len(data.dataset(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1437, "val": 180, "test": 180}
    images = torch.stack([data.dataset("train")[i]["image"] for i in range(1437)])
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())
    assert len(images.unique()) == 17


def test_config_of_a_data_module_rebuilds_it():
    from lightning_flows.store import build

    data = Digits(batch_size=8, flip=True, coupling=OptimalTransport(0.5), seed=4)
    again = build(data.config)
    same(list(data.train_dataloader())[:2], list(again.train_dataloader())[:2])
