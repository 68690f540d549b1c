"""Hand signs and hats made like garments, the judge of signs, and the tables of finetuning, on made-up images."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import finetuning, new_class, small_sets
from benchmarks.judges import cnn, fashion_cnn, sign_cnn
from lightning_flows.codecs import Identity
from lightning_flows.codecs.base import Posterior
from lightning_flows.data import Arrays
from lightning_flows.modules import LatentFlowMatching, WarmupCosine
from lightning_flows.networks import DiT, load_adapter
from tests.benchmarks.tiny import SIZES, images, pictures

TABLE = "network.y_embedder.embedding_table.weight"


def photo(colour, wall, *, shadow=0.0, side=28):
    """A square thing of one colour on a wall, (1, 3, side, side) in [0, 1]; the left of the wall lies in shadow."""
    x = torch.tensor(wall).view(1, 3, 1, 1).repeat(1, 1, side, side)
    x[..., : side // 4] *= 1 - shadow
    x[..., side // 4 : -side // 4, side // 4 : -side // 4] = torch.tensor(colour).view(1, 3, 1, 1)
    return x


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Both sets in the packed layout: 12 signs and 120 hats among other garments, with fewer to test."""
    generator = np.random.default_rng(0)

    def write(name, labels):
        files = []
        for label in labels:
            pixels = (photo((0.8, 0.5, 0.3 - 0.02 * label), (0.6, 0.6, 0.6), side=64)[0] * 255).permute(1, 2, 0)
            noise = generator.integers(0, 4, pixels.shape)
            Image.fromarray((pixels.numpy() + noise).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=95)
            files.append(file.getvalue())
        (tmp_path / name).parent.mkdir(exist_ok=True)
        offsets = np.cumsum([0, *map(len, files)])
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(tmp_path / name, jpeg=jpeg, offsets=offsets, labels=np.array(labels, np.uint8))

    write("sign_digits64/train.npz", [i % 10 for i in range(12)])
    write("sign_digits64/val.npz", [3, 1, 2])
    write("clothing128/train-00.npz", [1, 0] * 30)
    write("clothing128/train-01.npz", [1, 5] * 40)
    write("clothing128/val.npz", [1, 1, 2])
    monkeypatch.setenv(cnn.DATA, str(tmp_path))
    return tmp_path


@pytest.fixture
def judges(monkeypatch):
    """Untrained networks in the judges' places."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cnn.Network().eval()
    for judge in (sign_cnn, fashion_cnn):
        monkeypatch.setattr(judge, "trained", lambda: cnn.Judge(network, 0.97, "digest"))
    return network


@pytest.fixture
def base(monkeypatch, tmp_path):
    """Folder of a tiny model of ten classes in pixels, in the place of the published one."""
    torch.manual_seed(0)
    model = LatentFlowMatching(
        network=DiT(**SIZES, num_classes=10, label_dropout=0.1), steps=1,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        lr_scheduler=partial(WarmupCosine, total_steps=9, warmup_steps=1),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = str(model.save_pretrained(tmp_path / "base"))
    for module in (finetuning, new_class):
        monkeypatch.setattr(module, "BASE", folder)
    monkeypatch.setattr(finetuning, "WARMUP", 1)
    return folder


def items(count, seed=0):
    x, labels = images(count, seed)
    return [{"latent": z, "latent_std": torch.zeros_like(z), "label": y} for z, y in zip(x, labels, strict=True)]


def tensors_of(folder):
    return LatentFlowMatching.from_pretrained(folder).state_dict()


# ------------------------------------------------------------------ light on black


def test_hands_are_light_and_walls_black_shadows_too():
    x = small_sets.skin(photo((0.8, 0.5, 0.3), (0.6, 0.6, 0.6), shadow=0.5))
    assert x.shape == (1, 1, 28, 28)
    assert x[..., 7:21, 7:21].min() == 1
    assert x[..., :7].max() == x[..., 21:].max() == 0


@pytest.mark.parametrize("colour", [(0.1, 0.1, 0.1), (0.9, 0.9, 0.9), (0.2, 0.2, 0.9)])
def test_a_thing_on_one_cloth_comes_out_whatever_its_colour(colour):
    x = small_sets.apart(photo(colour, (0.9, 0.1, 0.1)) + 0.01 * torch.rand(1, 3, 28, 28))
    wanted = 1 - 0.6 * sum(colour) / 3
    assert x[..., 9:19, 9:19].mean() == pytest.approx(wanted, abs=0.02)  # the negative of its grey
    assert x[..., :5, :].max() < 0.05


def test_levels_put_two_quantiles_at_black_and_white():
    x = small_sets.levels(torch.arange(100.0).view(1, 1, 10, 10).repeat(2, 1, 1, 1), 0.5, 0.9)
    assert (x == 0).sum() == 100
    assert (x == 1).sum() == 20
    assert torch.equal(small_sets.levels(torch.ones(1, 1, 4, 4), 0.5, 0.9), torch.zeros(1, 1, 4, 4))


def test_the_sets_are_read_divided_and_written_for_our_data_modules(packed, tmp_path):
    found, labels = small_sets.signs("train")
    assert (found.shape, found.dtype) == ((12, 1, 28, 28), torch.uint8)
    assert labels.tolist() == [i % 10 for i in range(12)]
    assert found[0, 0, 14, 14] > 220
    assert found[0, 0, 2, 2] < 40
    assert len(small_sets.hats("train")) == 70  # of both files: fewer than 100
    assert len(small_sets.hats("test")) == 2
    small_sets.write(tmp_path / "out")
    data = Arrays(str(tmp_path / "out/sign_digits28"), layout="NHW", batch_size=4)
    batch = next(iter(data.val_dataloader()))
    assert batch["label"].tolist() == [3, 1, 2]
    assert torch.equal(batch["image"], sign_cnn.signs("val").images)
    assert len(np.load(tmp_path / "out/hats28/test.npz")["images"]) == 2


def test_the_first_hundred_hats_are_for_training(packed, monkeypatch):
    monkeypatch.setattr(small_sets, "TRAINED_HATS", 50)
    assert [len(small_sets.hats(split)) for split in ("train", "test")] == [50, 22]


def test_without_the_photos_the_variable_or_the_file_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(cnn.DATA, raising=False)
    with pytest.raises(ValueError, match="LIGHTNING_FLOWS_DATA is not set"):
        small_sets.signs("train")
    monkeypatch.setenv(cnn.DATA, str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no sign_digits64/val\*\.npz"):
        small_sets.signs("val")


# ------------------------------------------------------------------ the judge of signs


def test_moved_hands_stay_on_black_and_are_never_mirrored():
    left = torch.full((200, 1, 28, 28), -1.0)
    left[..., 8:20, 2:10] = 1
    torch.manual_seed(0)
    x = sign_cnn.moved(left)
    assert x.min() == -1
    assert x.max() <= 1
    assert not torch.equal(x[0], x[1])
    weight = (x + 1).sum((1, 2))
    assert (weight[:, :14].sum(1) > 2 * weight[:, 14:].sum(1)).all()


def test_the_judge_of_signs_is_trained_once_and_kept(monkeypatch, tmp_path):
    asked, splits = [], {"train": pictures(64), "val": pictures(30, seed=1)}
    monkeypatch.setattr(small_sets, "signs", lambda split: asked.append(split) or splits[split])
    monkeypatch.setattr(sign_cnn, "RECIPE", cnn.Recipe(epochs=2, batch_size=16, lr=0.05))
    monkeypatch.setattr(sign_cnn, "REQUIRED", 0.0)
    found = [sign_cnn.trained.__wrapped__(tmp_path) for _ in range(2)]
    assert asked == ["train", "val"]
    assert found[0].digest == found[1].digest
    assert sign_cnn.place(tmp_path, sign_cnn.RECIPE).is_file()
    assert fashion_cnn.place(tmp_path, sign_cnn.RECIPE) != sign_cnn.place(tmp_path, sign_cnn.RECIPE)
    monkeypatch.setattr(sign_cnn, "REQUIRED", 1.01)
    with pytest.raises(RuntimeError, match=r"1\.01 are needed"):
        sign_cnn.trained.__wrapped__(tmp_path)


def test_the_judge_of_signs_judges(judges):
    x, _ = images(12)
    taken = judges(x).argmax(1)
    assert sign_cnn.judge(x, taken) == (1.0, 0.97, 12)
    assert sign_cnn.judge(x, (taken + 1) % 10).accuracy == 0
    assert torch.allclose(sign_cnn.features(x), judges.features(x))
    assert sign_cnn.extractor().name == "sign-cnn"


# ------------------------------------------------------------------ finetuning to signs


def test_methods_train_what_they_say_and_start_alike(base):
    published = tensors_of(base)
    full, lora, scratch = (
        finetuning.model_of(finetuning.METHODS[name], 5) for name in ("full", "lora-2", "scratch")
    )  # fmt: skip
    assert torch.equal(full.state_dict()[TABLE], scratch.state_dict()[TABLE])
    assert not torch.equal(full.state_dict()[TABLE], published[TABLE])
    inner = "network.blocks.0.attn.qkv.weight"
    assert torch.equal(full.state_dict()[inner], published[inner])
    assert not torch.equal(scratch.state_dict()[inner], published[inner])
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert TABLE in trained
    assert all("lora" in name for name in trained - {TABLE})
    assert len(trained) > 1


def test_a_method_is_trained_kept_scored_and_not_made_again(base, judges, tmp_path):
    train, held_out = images(40)[0], images(20, seed=1)[0]
    real = finetuning.reference(train, held_out, 20)
    found = finetuning.run("lora-2", tmp_path / "lora", items(80), real, 2)
    assert found == json.loads((tmp_path / "lora/figures.json").read_text())
    assert found["file_bytes"] == (tmp_path / "lora/adapter/adapter_model.safetensors").stat().st_size
    assert (found["steps"], found["samples"], found["rank"], found["batch_size"]) == (2, 1000, 2, 64)
    (tmp_path / "lora/adapter/adapter_model.safetensors").unlink()
    assert finetuning.run("lora-2", tmp_path / "lora", items(80), real, 2) == found
    line = finetuning.table({"lora-2": found}, finetuning.bound(Identity(), real, images(20, seed=1)[1]))
    assert f"{found['trained_parameters']:,}" in line.splitlines()[-1]


def test_the_kept_adapter_is_the_averaged_model(base, tmp_path):
    method = finetuning.METHODS["lora-2"]
    model = finetuning.model_of(method, 3)
    cost = finetuning.fit(model, finetuning.loader_of(items(40), 16), 3)
    assert cost.steps == 3
    assert 0 < cost.loss < 10
    finetuning.keep(model, method, tmp_path / "kept")
    again = load_adapter(finetuning.model_of(finetuning.METHODS["full"], 3), tmp_path / "kept/adapter")
    assert torch.equal(again.sample(n=2, seed=0, condition=None), model.sample(n=2, seed=0, condition=None))


def test_batches_come_in_the_same_order_for_every_method():
    first, second = ([batch["label"] for batch in finetuning.loader_of(items(40), 16)] for _ in range(2))
    assert len(first) == 2  # the rest is left out
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_latents_are_those_of_the_codec():
    class Codec:
        def posterior(self, x):
            return Posterior(x[..., :14], torch.full_like(x[..., :14], 0.1))

    x, labels = images(300)
    found = finetuning.latents(Codec(), x, labels)
    assert len(found) == 300
    assert torch.equal(found[270]["latent"], x[270, ..., :14])
    assert (found[270]["latent_std"] == 0.1).all()
    assert found[270]["label"] == labels[270]


def test_real_photos_have_the_ratio_one_and_a_perfect_autoencoder_too(judges):
    real = finetuning.reference(images(60)[0], images(30, seed=1)[0], 30)
    assert all(len(first) == 45 and len(second) == 30 for first, second in real.halves)
    assert finetuning.ratio([second for _, second in real.halves], real)["value"] == pytest.approx(1)
    noise = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert finetuning.ratio([noise] * 5, real)["value"] > 3
    assert finetuning.bound(Identity(), real, images(30, seed=1)[1])["frechet_ratio"]["value"] == pytest.approx(1)


def test_copies_of_training_images_are_seen(judges):
    x, labels = images(60)
    real = finetuning.reference(x, images(30, seed=1)[0], 30)
    assert finetuning.scores(x[:20], labels[:20], real)["nearest_training"]["ratio"] == 0


# ------------------------------------------------------------------ a new class


def test_batches_hold_hats_and_garments_as_asked():
    batches = list(new_class.Mixed(new=20, old=300, batches=3))
    assert len(batches) == 3
    assert all(len(batch) == 64 and sum(place < 20 for place in batch) == 16 for batch in batches)
    assert max(max(batch) for batch in batches) < 320
    assert batches == list(new_class.Mixed(new=20, old=300, batches=3))
    assert all(place < 20 for batch in new_class.Mixed(new=20, old=0, batches=3) for place in batch)


@pytest.mark.parametrize("name", ["row", "lora", "replay"])
def test_old_rows_are_kept_where_only_the_new_one_is_trained(base, name):
    before = tensors_of(base)[TABLE]
    model = new_class.model_of(name, 10)
    assert torch.equal(model.state_dict()[TABLE][:10], before[:10])
    assert torch.allclose(model.state_dict()[TABLE][10], before[:10].mean(0), atol=1e-6)
    hats = [{**item, "label": torch.tensor(10)} for item in items(20)]
    loader = finetuning.DataLoader(hats + items(40), batch_sampler=new_class.Mixed(20, 40, 3))
    finetuning.fit(model, loader, 3)
    after = dict(model.named_parameters())[TABLE]
    assert not torch.equal(after[10], before[:10].mean(0))
    kept = torch.equal(after[:10], before[:10]) and torch.equal(after[11], before[10])
    assert kept == (name != "replay")
    width = SIZES["hidden_size"]
    if name == "row":
        assert new_class.trained(model, name) == width
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert new_class.trained(model, name) == whole - (0 if name == "replay" else 11 * width)


def test_logistic_regression_finds_a_small_class():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(420, 3, generator=generator)
    y = torch.cat([torch.arange(400) % 2, torch.full((20,), 2)])
    x[torch.arange(420), y] += 6
    layer = new_class.fitted(x, y, 3)
    assert (layer(x).argmax(1) == y).double().mean() > 0.99
    assert not layer.weight.requires_grad


def test_a_model_with_hats_is_scored_and_drawn(base, judges, monkeypatch, tmp_path):
    hats = images(12)[0]
    monkeypatch.setattr(new_class.small_sets, "hats", lambda split: pictures(12, seed=len(split))[0])
    judges.requires_grad_(False)
    head = new_class.fitted(judges.features(torch.cat([hats, -hats])), torch.tensor([10] * 12 + [0] * 12), 11)
    monkeypatch.setattr(new_class, "judge", lambda: new_class.Head(head, 0.9, 0.8))
    monkeypatch.setattr(new_class, "OLD_PER_CLASS", 4)
    monkeypatch.setattr(new_class, "NEW", 60)
    found = {
        name: new_class.run(name, tmp_path / name, (items(30), 10), 1) for name in ("before", "row")
    }  # fmt: skip
    assert (tmp_path / "row/samples.png").is_file()
    assert "hats_accuracy" not in found["before"]
    assert 0 <= found["row"]["hats_accuracy"] <= 1
    assert found["row"]["garments_accuracy"] == found["before"]["garments_accuracy"]  # bit for bit the same
    assert "| row |" in new_class.table(found)
