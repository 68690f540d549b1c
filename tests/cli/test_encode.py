"""lightning-flows encode: the codec and the data of a recipe make a folder, and the recipe trains on it."""

import json

import pytest
import torch

from lightning_flows.cli import HELP, dispatch
from lightning_flows.codecs import FrozenText
from lightning_flows.data import CachedLatents
from tests.codecs import tiny_text

RECIPE = """\
seed_everything: 3
model:
  class_path: lightning_flows.modules.LatentFlowMatching
  init_args:
    network:
      class_path: lightning_flows.networks.DiT
      init_args: {input_size: 4, in_channels: 2, hidden_size: 16, depth: 1, num_heads: 2, num_classes: 10}
    codec:
      class_path: AutoencoderKL
      init_args: {repo: vae, posterior: sample}
data:
  class_path: lightning_flows.data.Digits
  init_args: {batch_size: 16, flip: true, val_fraction: 0.02, test_fraction: 0.95}
trainer:
  max_steps: ${data.init_args.batch_size}
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    import diffusers

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("encode") / "vae"
    network.save_pretrained(path)
    return path


@pytest.fixture
def place(vae, tmp_path, monkeypatch):
    """Working directory with ``recipe.yaml`` and the autoencoder that it names."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "vae").symlink_to(vae)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encode(*options):
    return dispatch(["encode", "-c", "recipe.yaml", "--out", "latents", *options])


def test_folder_is_made_from_the_recipe_and_completed(place, capsys):
    text = encode("--splits", "train,val", "--dtype", "float32", "--flip", "--shard_size", "40")
    assert text == "latents: 54 train items in 2 shards (2 written now), 36 val items in 1 shards (1 written now)"
    assert capsys.readouterr().out == f"{text}\n"
    index = json.loads((place / "latents" / "index.json").read_text())
    assert index["codec"]["init_args"]["repo"] == "vae"
    assert index["data"]["init_args"] == {"val_fraction": 0.02, "test_fraction": 0.95}
    assert (index["dtype"], index["flip"], index["latent_shape"]) == ("float32", True, [2, 4, 4])
    again = encode("--splits=val,train", "--dtype=float32", "--flip", "--shard_size=40", "--data.batch_size=7")
    assert again == "latents: 36 val items in 1 shards (0 written now), 54 train items in 2 shards (0 written now)"


def test_the_recipe_trains_on_the_folder(place):
    encode("--splits", "train", "--flip")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2"]
    cli = dispatch(["fit", "-c", "recipe.yaml", "--data=CachedLatents", "--data.folder=latents", *quiet])
    assert isinstance(cli.datamodule, CachedLatents)
    assert (cli.datamodule.batch_size, cli.datamodule.flip) == (16, True)
    assert cli.trainer.global_step == 2


def test_options_override_the_recipe(place):
    encode(
        "--splits=val", "--mean_only", "--format=npy", "--batch_size=5", "--device=cpu",
        "--data.val_fraction=0.01", "--model.init_args.codec.init_args.scale=2",
    )  # fmt: skip
    index = json.loads((place / "latents" / "index.json").read_text())
    assert index["codec"]["init_args"]["scale"] == 2
    assert index["data"]["init_args"]["val_fraction"] == 0.01
    assert sorted(index["splits"]["val"]["shards"][0]["files"]) == ["val-00000.label.npy", "val-00000.latent.npy"]


def test_other_latents_in_the_folder_are_one_sentence(place):
    encode("--splits=val")
    with pytest.raises(SystemExit, match='encode: latents holds latents with another dtype: "float16" instead of'):
        encode("--splits=val", "--dtype=bfloat16")


def test_missing_parts_of_the_command_are_named(place, capsys):
    with pytest.raises(SystemExit, match="--splits must be some of train,val,test, got dev"):
        encode("--splits=train,dev")
    (place / "recipe.yaml").write_text("data: {")
    with pytest.raises(SystemExit, match=r"recipe\.yaml is not YAML: while parsing"):
        encode()
    (place / "recipe.yaml").write_text("model:\n  class_path: x\ndata: Digits\n")
    with pytest.raises(SystemExit, match=r"recipe\.yaml: the model has no codec"):
        encode()
    with pytest.raises(SystemExit, match="the recipe nothing does not exist"):
        dispatch(["encode", "-c", "nothing", "--out=latents"])
    with pytest.raises(SystemExit):
        dispatch(["encode", "--out=latents"])
    assert "data" in capsys.readouterr().err
    assert not (place / "latents").exists()
    assert "  encode " in HELP


def test_interpolations_of_the_recipe_are_resolved(place):
    text = RECIPE.replace("val_fraction: 0.02", "val_fraction: '${share}'").replace("trainer:", "share: 0.01\ntrainer:")
    (place / "recipe.yaml").write_text(text)
    encode("--splits=val")
    index = json.loads((place / "latents" / "index.json").read_text())
    assert index["data"]["init_args"]["val_fraction"] == 0.01


TEXT = """\
    text:
      class_path: FrozenText
      init_args: {repo: t5, length: 6, template: {noise_std: 0.3}}
"""


@pytest.fixture
def captioned(place):
    """The same place, with a recipe of captions in the place of digits."""
    from PIL import Image

    (place / "shoes").mkdir()
    lines = []
    for i, colour in enumerate(["red", "blue", "green", "red"]):
        Image.new("L", (8, 8), 40 * i).save(place / "shoes" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{colour} cat"}))
    (place / "shoes" / "metadata.jsonl").write_text("\n".join(lines))
    tiny_text.write_t5(place / "t5")
    head, _, _ = RECIPE.partition("data:")
    data = "data:\n  class_path: CaptionFolder\n  init_args: {root: shoes, size: 8, channels: 1, batch_size: 2}\n"
    (place / "recipe.yaml").write_text(head + TEXT + data)
    return place


def test_captions_are_kept_as_tokens_of_a_frozen_text_encoder(captioned):
    encode("--dtype=float32")
    data = CachedLatents("latents", batch_size=4)
    batch = next(iter(data.train_dataloader()))
    text = FrozenText("t5", length=6)
    assert data.text["init_args"]["template"]["init_args"]["noise_std"] == 0.3
    assert {"repo": "t5", "length": 6}.items() <= data.text["init_args"].items()
    prompts = [f"Noise Level 300:\n{caption}" for caption in batch["caption"]]
    torch.testing.assert_close(batch["tokens"], text.encode(prompts).values)
    assert batch["tokens_mask"].shape == (4, 6)


def test_options_override_the_text_encoder(captioned):
    encode("--model.init_args.text.init_args.length=4")
    assert CachedLatents("latents", batch_size=1).dataset("train")[0]["tokens"].shape == (4, 8)


def test_tokens_of_a_trained_encoder_are_not_kept(captioned):
    recipe = captioned / "recipe.yaml"
    text = recipe.read_text().replace("FrozenText", "WordEncoder")
    recipe.write_text(text.replace("{repo: t5, length: 6, template: {noise_std: 0.3}}", "{size: 4}"))
    encode()
    item = CachedLatents("latents").dataset("train")[0]
    assert item["caption"] == "red cat"
    assert "tokens" not in item
    assert CachedLatents("latents").text is None
