"""Cached latents: what the live pipeline would have encoded, kept whole, checked, and completed after a stop."""

import json
import pickle

import pytest
import torch
from torch.utils.data import Dataset

from lightning_flows.codecs import Codec, Posterior, PromptTemplate, TextEncoder, WordEncoder
from lightning_flows.data import CachedLatents, FlowDataModule, LatentFormat, LatentWriter
from lightning_flows.flow.condition import Tokens
from lightning_flows.flow.couplings import OptimalTransport


class Sums(Codec):
    """Two channels at half the size: means that tell left from right, and deviations."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def posterior(self, x):
        mean = torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1) * self.gain
        return Posterior(mean, mean.abs() + 0.5)

    def decode(self, z):
        return z[:, :1].repeat_interleave(2, -1).repeat_interleave(2, -2)

    def latent_shape(self, shape):
        return (2, shape[1] // 2, shape[2] // 2)


class Items(Dataset):
    def __init__(self, n, texts):
        self.n, self.texts = n, texts

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(i)) * 2 - 1
        mask = torch.arange(24).reshape(4, 6).add(i) % 7
        texts = {"caption": f"picture {i}", "mask": mask} if self.texts else {}
        return {"image": image, "label": i % 3, **texts}


class Pictures(FlowDataModule):
    def __init__(self, n: int = 20, texts: bool = True, **kwargs) -> None:
        super().__init__(**{"batch_size": 4, "flip": True, **kwargs})
        self.n, self.texts = n, texts

    def read(self, split):
        return {"train": Items(self.n, self.texts), "val": Items(3, self.texts)}.get(split)

    classes = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "latents"


def write(folder, codec=None, data=None, splits=("train", "val"), **kept):
    kept = LatentFormat(**{"dtype": "float32", "flip": True, "shard_size": 8, **kept})
    writer = LatentWriter(codec or Sums(), data or Pictures(), folder, kept, batch_size=3)
    return [writer.write(split) for split in splits]


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.mark.parametrize("format", ["safetensors", "npy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_live_ones_encoded(folder, format, workers):
    write(folder, format=format)
    live, cached = Pictures(seed=5), CachedLatents(str(folder), batch_size=4, seed=5, num_workers=workers, verify=True)
    mirrored = 0
    for epoch in range(2):
        loaders = live.train_dataloader(), cached.train_dataloader()
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for a, b in zip(*loaders, strict=True):
            mean, std = Sums().posterior(a.pop("image"))
            assert torch.equal(b.pop("latent"), mean)
            assert torch.equal(b.pop("latent_std"), std)
            assert a.pop("caption") == b.pop("caption")
            assert a.keys() == b.keys() == {"label", "mask", "index", "epoch"}
            assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
            mirrored += sum(int(a["mask"][i, 0, 0] != a["index"][i] % 7) for i in range(4))
    assert 5 < mirrored < 35
    (a,), (b,) = live.val_dataloader(), cached.val_dataloader()
    assert torch.equal(b["latent"], Sums().posterior(a["image"]).mean)


def test_flips_can_be_left_out_and_must_exist(folder, tmp_path):
    write(folder)
    plain = Sums().posterior(torch.stack([Items(20, False)[i]["image"] for i in range(20)])).mean
    for batch in CachedLatents(str(folder), batch_size=4, flip=False).train_dataloader():
        assert torch.equal(batch["latent"], plain[batch["index"]])
    write(tmp_path / "unflipped", flip=False)
    batch = next(iter(CachedLatents(str(tmp_path / "unflipped"), batch_size=4).train_dataloader()))
    assert torch.equal(batch["latent"], plain[batch["index"]])
    with pytest.raises(ValueError, match=r"flip=True, but .* has no mirrored copies"):
        CachedLatents(str(tmp_path / "unflipped"), flip=True).setup("fit")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_16_bits_are_read_as_float32(folder, dtype, error):
    write(folder, dtype=dtype, mean_only=True)
    item = CachedLatents(str(folder)).dataset("val")[1]
    expected = Sums().posterior(Items(3, True)[1]["image"][None]).mean[0]
    assert item["latent"].dtype == torch.float32
    assert 0 < (item["latent"] - expected).abs().max() < error
    assert "latent_std" not in item


def test_index_describes_codec_data_and_latents(folder):
    write(folder, data=Pictures(num_workers=0, seed=9))
    index = index_of(folder)
    assert index["codec"] == Sums().config
    assert index["data"]["init_args"] == {"n": 20, "texts": True}
    assert (index["image_shape"], index["latent_shape"]) == ([1, 4, 6], [2, 2, 3])
    assert [shard["count"] for shard in index["splits"]["train"]["shards"]] == [8, 8, 4]
    images = torch.stack([Items(20, False)[i]["image"] for i in range(20)])
    means, stds = zip(*(Sums().posterior(x) for x in (images, images.flip(-1))), strict=True)
    mean, std = torch.cat(means), torch.cat(stds)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(index["statistics"]["mean"]), mean.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(index["statistics"]["std"]), variance.sqrt())
    cached = CachedLatents(str(folder))
    assert (cached.shape, cached.latent_shape, cached.classes, cached.levels) == (
        (1, 4, 6),
        (2, 2, 3),
        ["a", "b", "c"],
        256,
    )
    assert cached.has("val")
    assert not cached.has("test")


def test_interrupted_encoding_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    calls, posterior = [], Sums.posterior

    def stopped(self, x):
        calls.append(len(x))
        if len(calls) == 9:  # in the second shard: three batches a shard, each as it is and mirrored
            raise KeyboardInterrupt
        return posterior(self, x)

    monkeypatch.setattr(Sums, "posterior", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(folder, splits=["train"])
    assert [shard["count"] for shard in index_of(folder)["splits"]["train"]["shards"]] == [8]
    with pytest.raises(ValueError, match="holds 8 of the 20 train items: encoding was interrupted"):
        CachedLatents(str(folder)).setup("fit")
    first = (folder / "train-00000.safetensors").stat().st_mtime_ns
    (folder / ".train-00001.safetensors.0a1b2c3d.tmp").write_bytes(b"half")  # what a killed process leaves
    assert write(folder, splits=["train"]) == [2]
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns == first
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    write(tmp_path / "whole", splits=["train"])
    assert index_of(folder) == index_of(tmp_path / "whole")


def test_damaged_shards_are_named_and_written_anew(folder):
    write(folder)
    file = folder / "train-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    CachedLatents(str(folder)).dataset("train")[10]  # of the right size, and nobody asked for checksums
    items = CachedLatents(str(folder), verify=True).dataset("train")
    items[0]
    with pytest.raises(ValueError, match=r"damaged: .*train-00001\.safetensors has SHA-256"):
        items[10]
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"train-00001\.safetensors has \d+ bytes instead of"):
        CachedLatents(str(folder)).dataset("train")[10]
    (folder / "train-00002.json").unlink()
    with pytest.raises(ValueError, match=r"train-00002\.json does not exist"):
        CachedLatents(str(folder)).dataset("train")[19]
    assert write(folder) == [2, 0]
    assert len([CachedLatents(str(folder), verify=True).dataset("train")[i] for i in range(20)]) == 20


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("codec", {"codec": Sums(gain=2.0)}),
        ("data", {"data": Pictures(n=21)}),
        ("dtype", {"dtype": "float16"}),
        ("flip", {"flip": False}),
        ("mean_only", {"mean_only": True}),
        ("shard_size", {"shard_size": 9}),
        ("format", {"format": "npy"}),
    ],
)
def test_other_latents_are_not_mixed_in(folder, name, other):
    write(folder, splits=["val"])
    before = index_of(folder)
    with pytest.raises(ValueError, match=f"holds latents with another {name}: .* name another folder"):
        write(folder, **other)
    assert index_of(folder) == before
    assert write(folder, data=Pictures(batch_size=2, seed=4, num_workers=1), splits=["val"]) == [0]


def test_splits_must_exist_and_keep_their_items(folder, monkeypatch):
    write(folder, splits=["train"])
    with pytest.raises(ValueError, match="Pictures has no 'test' split"):
        write(folder, splits=["test"])
    monkeypatch.setattr(Items, "__len__", lambda self: self.n - 1)
    with pytest.raises(ValueError, match="made for 20 train items, the data has 19"):
        write(folder, splits=["train"])


def test_latents_beyond_the_dtype_are_an_error(folder):
    with pytest.raises(ValueError, match="latent of item 0 is not finite in dtype='float16'"):
        write(folder, Sums(gain=1e6), dtype="float16")
    assert not (folder / "index.json").exists()


def test_random_crops_cannot_be_kept_and_say_so(folder):
    with pytest.warns(UserWarning, match="crop='random' cannot be kept"):
        write(folder, data=Pictures(crop="random", size=4), splits=["val"])


def test_wrong_formats_and_folders_are_named(folder, tmp_path):
    wrong = [{"dtype": "int8"}, {"format": "zip"}, {"shard_size": 0}, {"dtype": "bfloat16", "format": "npy"}]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            LatentFormat(**options)
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist"):
        CachedLatents(str(folder)).setup("fit")
    (tmp_path / "index.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="no index of latents of version 1"):
        CachedLatents(str(tmp_path)).setup("fit")
    write(folder)
    with pytest.raises(ValueError, match="gives no 'image' to encode"):
        write(tmp_path / "twice", data=CachedLatents(str(folder)), splits=["val"])


def test_coupling_pairs_noise_with_latents(folder):
    write(folder)
    cached = CachedLatents(str(folder), batch_size=4, coupling=OptimalTransport(condition_weight=1.0))
    batch = next(iter(cached.train_dataloader()))
    assert batch["source"].shape == batch["latent"].shape


def test_items_are_pickled_without_what_was_read(folder):
    write(folder)
    items = CachedLatents(str(folder)).dataset("train")
    small = len(pickle.dumps(items))
    item = items[11]
    assert len(pickle.dumps(items)) == small
    assert torch.equal(pickle.loads(pickle.dumps(items))[11]["latent"], item["latent"])


def test_requests_carry_the_labels_of_the_latents(folder):
    write(folder)
    cached = CachedLatents(str(folder), batch_size=3, test_split="val")
    batch = next(iter(cached.predict_dataloader()))
    assert batch["id"] == ["00000-label0", "00001-label1", "00002-label2"]


# ---- captions as tokens


class Letters(TextEncoder):
    """A token for each of the first letters: two numbers that tell which."""

    frozen = True
    size = 2

    def __init__(self, length: int = 12, gain: float = 0.01, template: PromptTemplate | None = None) -> None:
        super().__init__(length, template)
        self.gain = gain

    def embed(self, prompts, device=None):
        codes = [[ord(letter) * self.gain for letter in prompt[: self.length]] for prompt in prompts]
        values = torch.tensor([code + [0.0] * (self.length - len(code)) for code in codes])
        mask = torch.arange(self.length) < torch.tensor([len(code) for code in codes])[:, None]
        return Tokens(torch.stack([values, -values], -1), mask)


def write_tokens(folder, text=None, data=None, splits=("train", "val"), **kept):
    kept = LatentFormat(**{"dtype": "float32", "flip": True, "shard_size": 8, **kept})
    writer = LatentWriter(Sums(), data or Pictures(), folder, kept, text=text or Letters(), batch_size=3)
    return [writer.write(split) for split in splits]


@pytest.mark.parametrize("format", ["safetensors", "npy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_lie_beside_the_latents(folder, format, workers):
    write_tokens(folder, format=format)
    live, cached = Pictures(seed=5), CachedLatents(str(folder), batch_size=4, seed=5, num_workers=workers, verify=True)
    for a, b in zip(live.train_dataloader(), cached.train_dataloader(), strict=True):
        expected = Letters().encode(a["caption"])
        assert a["caption"] == b["caption"]
        assert torch.equal(b["tokens"], expected.values)
        assert torch.equal(b["tokens_mask"], expected.mask)
        assert b["tokens"].dtype == torch.float32
        assert b["tokens_mask"].dtype == torch.bool
        assert b["tokens_mask"].sum(1).min() < 11  # "picture 3"
    assert index_of(folder)["text"] == cached.text == Letters().config
    assert write_tokens(folder, format=format) == [0, 0]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_tokens_are_kept_in_the_dtype_of_the_latents(folder, dtype, error):
    write_tokens(folder, dtype=dtype, splits=["val"])
    stored = CachedLatents(str(folder)).dataset("val").items[1]["tokens"]
    item = CachedLatents(str(folder)).dataset("val")[1]
    expected = Letters().encode(["picture 1"]).values[0]
    assert stored.dtype == getattr(torch, dtype)
    assert item["tokens"].dtype == torch.float32
    assert 0 < (item["tokens"] - expected).abs().max() < error


def test_tokens_of_one_encoder_are_not_mixed_with_those_of_another(folder, tmp_path):
    write_tokens(folder, splits=["val"])
    with pytest.raises(ValueError, match=r"holds latents with another text: .*\"length\": 12.*\"length\": 13"):
        write_tokens(folder, Letters(13))
    with pytest.raises(ValueError, match=r"holds latents with another text: .*\"fps\": 0"):
        write_tokens(folder, Letters(template=PromptTemplate(fps=0)))
    with pytest.raises(ValueError, match=r"holds latents with another text: .* instead of null"):
        write(folder)
    write(tmp_path / "plain", splits=["val"])
    assert CachedLatents(str(tmp_path / "plain")).text is None


def test_folders_of_earlier_versions_are_read_and_completed(folder):
    write(folder, splits=["val"])
    index = index_of(folder)
    del index["text"]
    (folder / "index.json").write_text(json.dumps(index))
    assert CachedLatents(str(folder)).text is None
    assert write(folder) == [3, 0]


def test_what_cannot_be_kept_of_a_text_is_named(folder):
    with pytest.raises(ValueError, match="text must be a frozen encoder: the tokens of a WordEncoder change in"):
        LatentWriter(Sums(), Pictures(), folder, text=WordEncoder())
    with pytest.raises(ValueError, match="Pictures gives no 'caption' to encode, only"):
        write_tokens(folder, data=Pictures(texts=False))
    with pytest.raises(ValueError, match="the text embedding of item 0 is not finite in dtype='float16'"):
        write_tokens(folder, Letters(gain=1e4), dtype="float16")
