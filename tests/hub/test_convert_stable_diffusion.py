"""The U-Net of Stable Diffusion from the files of diffusers, and SymmFlow's own files."""

import inspect
import json

import pytest
import torch
from diffusers import AutoencoderKL as Autoencoder
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from lightning_flows import from_pretrained
from lightning_flows.cli import dispatch
from lightning_flows.codecs import AnalogBits, ClassPlane, RGBPalette, ThroughAutoencoder
from lightning_flows.flow import Condition
from lightning_flows.hub.convert import convert, load_network
from lightning_flows.hub.convert.stable_diffusion import FIXED, FREE, READ, empty_prompt, unet_arguments
from lightning_flows.hub.convert.symmflow import sizes_of
from lightning_flows.modules import LatentFlowMatching, SymmFlow, init_from
from lightning_flows.networks import ADMUNet, StableDiffusionUNet
from lightning_flows.store import load_tensors
from tests.codecs.tiny_text import write_clip, write_tokenizer
from tests.hub.official_unets import Weights, adm
from tests.networks.test_stable_diffusion_unet import TINY, close, drawn, randomised

WIDE = {"cross_attention_dim": 8, "sample_size": 8}
PIXELS = {"hidden_size": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention_factors": (2,), "head_channels": 32}


@pytest.fixture
def pipeline(tmp_path):
    """A tiny pipeline of diffusers: U-Net, text encoder, tokenizer; and the U-Net."""
    unet = randomised(UNet2DConditionModel(**TINY | WIDE))
    unet.save_pretrained(tmp_path / "sd/unet")
    write_clip(tmp_path / "sd/text_encoder")
    write_tokenizer(tmp_path / "sd/tokenizer")
    return tmp_path / "sd", unet


@pytest.fixture
def autoencoder(tmp_path):
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    Autoencoder(**kinds, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).save_pretrained(
        tmp_path / "vae"
    )
    return str(tmp_path / "vae")


def text_file(folder, value, name="text.safetensors"):
    file = folder / name
    save_file({"text": value}, file) if file.suffix == ".safetensors" else torch.save(value, file)
    return file


# ---- diffusers-unet ----


@pytest.mark.parametrize("place", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_a_pipeline_becomes_a_start(tmp_path, pipeline, place):
    folder, theirs = pipeline
    out = convert("diffusers-unet", folder / place, tmp_path / "out")
    model = from_pretrained(out)
    assert isinstance(model, LatentFlowMatching)
    assert (model.network.shape, model.network.streams) == ((4, 8, 8), ("tokens",))
    x, t, text = drawn(2, 4, 8, 8), torch.tensor([0.25, 0.5]), model.network.context.expand(2, -1, -1)
    with torch.no_grad():
        close(model.network(x, t), theirs(x, 1000 * t, text).sample)


def test_the_text_is_what_the_encoder_makes_of_the_empty_prompt_with_its_padding(pipeline):
    from transformers import AutoTokenizer, CLIPTextModel

    folder, _ = pipeline
    ids = AutoTokenizer.from_pretrained(folder / "tokenizer")(
        "", padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    ).input_ids
    expected = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids)[0][0]
    close(empty_prompt(folder), expected)
    assert empty_prompt(folder).shape == (12, 8)


@pytest.mark.parametrize(("name", "shape"), [("text.safetensors", (5, 8)), ("text.pt", (1, 5, 8))])
def test_the_text_may_come_from_a_file(tmp_path, pipeline, name, shape):
    text = drawn(*shape)
    network = from_pretrained(
        convert("diffusers-unet", pipeline[0] / "unet", tmp_path / "out", context=text_file(tmp_path, text, name))
    ).network
    assert torch.equal(network.context, text.reshape(5, 8))


TWO = {"a": torch.zeros(5, 8), "b": torch.zeros(1, 8)}


@pytest.mark.parametrize("value", [torch.zeros(8), torch.zeros(2, 5, 8), TWO])
def test_a_file_with_another_content_is_no_text(tmp_path, pipeline, value):
    torch.save(value, tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"text.pt must hold one tensor of shape \(L, D\)"):
        convert("diffusers-unet", pipeline[0], tmp_path / "out", context=tmp_path / "text.pt")


@pytest.mark.parametrize("semantic", [AnalogBits(16), RGBPalette("coco-stuff")])
def test_symmflow_starts_from_it(tmp_path, pipeline, semantic):
    folder, theirs = pipeline
    start = convert("diffusers-unet", folder, tmp_path / "out")
    sizes = from_pretrained(start).network.config["init_args"] | {"reads_tokens": False}
    network = StableDiffusionUNet(**{**sizes, "in_channels": 4 + semantic.channels})
    model = SymmFlow(network=network, semantic=semantic).eval()
    assert init_from(model, start, resize=True) == ["latent_shift", "latent_scale"]  # of another codec
    x, t, text = drawn(2, 4, 8, 8), torch.tensor([0.25, 0.5]), network.context.expand(2, -1, -1)
    if semantic.channels == 4:  # twice the channels: copies
        assert torch.equal(network.stem.weight, theirs.conv_in.weight.repeat(1, 2, 1, 1))
        assert torch.equal(network.out_conv.weight, theirs.conv_out.weight.repeat(2, 1, 1, 1))
        assert torch.equal(network.out_conv.bias, theirs.conv_out.bias.repeat(2))
        return
    with torch.no_grad():  # others begin at zero
        close(network(torch.cat([x, drawn(2, 3, 8, 8, seed=8)], 1), t)[:, :4], theirs(x, 1000 * t, text).sample)
    assert not network.out_conv.weight[4:].any()


def test_the_card_says_what_the_weights_are(tmp_path, pipeline):
    card = (convert("diffusers-unet", pipeline[0], tmp_path / "out") / "README.md").read_text()
    assert "license: other\n" in card
    assert "not to be sampled from" in card
    assert "model.sample" not in card
    assert "--resize true" in card


UNSUPPORTED = [
    ("center_input_sample", True),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("mid_block_type", None),
    ("only_cross_attention", [False, True]),
    ("downsample_padding", 0),
    ("act_fn", "gelu"),
    ("num_attention_heads", 4),
    ("dual_cross_attention", True),
    ("class_embed_type", "timestep"),
    ("num_class_embeds", 10),
    ("addition_embed_type", "text_time"),
    ("encoder_hid_dim", 16),
    ("resnet_time_scale_shift", "scale_shift"),
    ("time_embedding_type", "fourier"),
    ("conv_in_kernel", 1),
    ("attention_type", "gated"),
    ("out_channels", 8),
    ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
    ("cross_attention_dim", [8, 16]),
    ("norm_num_groups", None),
    ("transformer_layers_per_block", [[1], [2]]),
    ("reverse_transformer_layers_per_block", [[1], [2]]),
    ("option_to_come", 3),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_what_our_network_does_not_have_is_named_with_its_value(tmp_path, pipeline, name, value):
    folder, _ = pipeline
    settings = json.loads((folder / "unet/config.json").read_text()) | {name: value}
    (folder / "unet/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"the config says {name}=.*; StableDiffusionUNet has") as raised:
        convert("diffusers-unet", folder, tmp_path / "out")
    assert str(value[0] if isinstance(value, list) else value) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_short_config_means_the_defaults_of_diffusers():
    given = inspect.signature(UNet2DConditionModel.__init__).parameters
    assert {name: given[name].default for name in READ} == READ
    assert {name: given[name].default for name in FIXED} == {name: values[0] for name, values in FIXED.items()}
    assert {*READ, *FIXED, *FREE} == set(given) - {"self"}  # every option has its place
    assert unet_arguments({"sample_size": 8})["num_heads"] == 8


def test_mistakes_around_the_folder_are_named(tmp_path, pipeline):
    folder, _ = pipeline
    with pytest.raises(ValueError, match=r"it needs config\.json and diffusion_pytorch_model\.safetensors"):
        convert("diffusers-unet", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"context must have shape \(L, 8\), as cross_attention_dim says, got \(5, 9"):
        convert("diffusers-unet", folder, tmp_path / "out", context=text_file(tmp_path, drawn(5, 9)))
    settings = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(settings | {"sample_size": None}))
    with pytest.raises(ValueError, match="no sample_size: give input_size"):
        convert("diffusers-unet", folder, tmp_path / "out")
    model = from_pretrained(convert("diffusers-unet", folder, tmp_path / "out", input_size=(8, 16)))
    assert model.shape == (4, 8, 16)
    (folder / "text_encoder").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="no pipeline with a text_encoder around it: give context"):
        convert("diffusers-unet", folder, tmp_path / "out", input_size=8)


# ---- symmflow ----


def official(**changes):
    """A state dict of `SymmFM` on pixels, and what its network answers at raw times."""
    hyper = {**PIXELS, "out_channels": 6, **changes}
    weights, x, t = Weights(), drawn(2, hyper["out_channels"], 16, 16), torch.tensor([0.3, 0.9])
    value = adm(weights, x, t, {**hyper, "scale_shift": False})
    return dict(weights), x, t, value


def file_of(folder, state, name="ema.pt"):
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_masks_on_pixels(tmp_path):
    state, x, t, expected = official()
    out = convert(
        "symmflow", file_of(tmp_path, state), tmp_path / "out", head_channels=32, input_size=16, semantic="coco-stuff"
    )
    model = from_pretrained(out)
    assert isinstance(model, SymmFlow)
    assert isinstance(model.semantic, RGBPalette)
    assert (model.shape, model.semantic.width, model.steps, model.read_steps) == ((3, 16, 16), 6 / 127.5, 25, 25)
    assert model.objective.image_weight == 0.7
    with torch.no_grad():
        close(model.network(x, t), expected)
    card = (out / "README.md").read_text()
    assert "license: mit\n" in card
    assert "tags: [symmflow]\n" in card
    assert "README states" in card
    assert "mask = model.segment(images).labels" in card
    assert "sample(n=" not in card


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_classes_from_the_command_line(tmp_path, capsys):
    state, x, t, expected = official(out_channels=4)
    given = ["--num_classes=10", "--head_channels=32", "--input_size=[16,16]", "--beta=3.0"]
    dispatch(["convert", "symmflow", str(file_of(tmp_path, state)), str(tmp_path / "out"), *given])
    assert "wrote" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "out")
    assert isinstance(model.semantic, ClassPlane)
    assert (model.shape, model.semantic.beta, model.read_steps) == ((3, 16, 16), 3.0, 1)
    assert model.objective.image_weight == 0.9
    with torch.no_grad():
        close(model.network(x, t), expected)
    assert model.sample(Condition(label=torch.tensor([3, 7])), seed=0).shape == (2, 3, 16, 16)


def test_the_size_and_the_heads_are_those_of_the_recipes():
    weights = Weights()
    adm(weights, drawn(1, 4, 32, 32), torch.tensor([0.5]),
        {**PIXELS, "hidden_size": 64, "channel_mult": (1, 2, 2, 2), "attention_factors": (), "out_channels": 4,
         "scale_shift": False, "head_channels": 64})  # fmt: skip
    network = load_network("symmflow", dict(weights))
    assert isinstance(network, ADMUNet)
    assert (network.shape, network.middle[0].attention.num_heads) == ((4, 32, 32), 2)
    assert network.t_embedder.time_scale == 1


@pytest.mark.filterwarnings("ignore:scale_shift=False")
def test_masks_on_latents(tmp_path, autoencoder):
    state, *_ = official(out_channels=8)
    model = from_pretrained(
        convert("symmflow", file_of(tmp_path, state), tmp_path / "out", head_channels=32, input_size=16,
                semantic="celebamask-hq", autoencoder=autoencoder)
    )  # fmt: skip
    assert isinstance(model.semantic, ThroughAutoencoder)
    assert (model.shape, model.semantic.semantic.width) == ((4, 16, 16), 10 / 127.5)
    mask = torch.randint(19, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    assert model.sample(Condition(spatial=mask), seed=0, steps=1).shape == (2, 3, 32, 32)


def doubled(**changes):
    """The U-Net of `SymmFMSD`, made as the authors make it, its state dict and its text."""
    options = {"attention_head_dim": (2, 4), "use_linear_projection": True, "norm_num_groups": 32}
    unet = UNet2DConditionModel(**TINY | options | changes)
    for layer, axis in ((unet.conv_in, 1), (unet.conv_out, 0)):
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight] * 2, dim=axis))
    unet.conv_out.bias = torch.nn.Parameter(torch.cat([unet.conv_out.bias] * 2))
    randomised(unet)
    return unet, {f"unet.{name}": value for name, value in unet.state_dict().items()}, drawn(1, 5, 24, seed=3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers_per_block": [1, 2], "transformer_layers_per_block": [1, 2],
          "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2},
     {"transformer_layers_per_block": 2}],
)  # fmt: skip
def test_stable_diffusion(tmp_path, autoencoder, changes):
    unet, state, text = doubled(**changes)
    out = convert(
        "symmflow", file_of(tmp_path, state), tmp_path / "out", semantic="celebamask-hq", head_channels=16,
        input_size=8, context=text_file(tmp_path, text, "sd_emptyembed.pt"), autoencoder=autoencoder,
    )  # fmt: skip
    model = from_pretrained(out)
    assert isinstance(model.network, StableDiffusionUNet)
    assert (model.shape, model.network.t_embedder.time_scale) == ((4, 8, 8), 1.0)
    x, t = drawn(2, 8, 8, 8), torch.tensor([0.2, 1.0])
    with torch.no_grad():
        close(model.network(x, t), unet(x, t, text.expand(2, -1, -1)).sample)
    card = (out / "README.md").read_text()
    assert "license: openrail++\n" in card
    assert "OpenRAIL++-M" in card


def test_the_published_heads_of_stable_diffusion_are_64_wide():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True)
        ours = StableDiffusionUNet()
    sizes = sizes_of(unet.state_dict())
    wanted = ours.config["init_args"]
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in sizes.items()} == {
        **{name: wanted[name] for name in ("in_channels", "channels", "attention", "context_dim")},
        "num_blocks": [2] * 4,
        "depth": [1] * 4,
    }
    assert [width // 64 for width in sizes["channels"]] == wanted["num_heads"]


@pytest.mark.filterwarnings("ignore:scale_shift=False")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"semantic must be one of \['celebamask-hq', 'class', 'coco-stuff'\], got None: the file does not say"),
        ({"semantic": "ade20k"}, "semantic must be one of .* got 'ade20k'"),
        ({"semantic": "class"}, "num_classes goes with semantic='class', got None with 'class'"),
        ({"semantic": "coco-stuff", "num_classes": 3}, "num_classes goes with semantic='class', got 3"),
        ({"num_classes": 10, "context": "text"}, "context is for the variant of Stable Diffusion"),
        ({"num_classes": 10, "weights": "ema"}, "symmflow has no option weights"),
        ({"num_classes": 10, "label_dropout": 0.1}, "symmflow has no option label_dropout"),
    ],
)
def test_what_the_file_cannot_say_must_be_given(tmp_path, options, message):
    if "context" in options:
        options = {**options, "context": text_file(tmp_path, drawn(5, 24))}
    sizes = {"head_channels": 32, "input_size": 16}
    with pytest.raises(ValueError, match=message):
        convert("symmflow", file_of(tmp_path, official()[0]), tmp_path / "out", **sizes, **options)


def test_stable_diffusion_without_its_text_is_an_error(tmp_path):
    _, state, text = doubled()
    file = file_of(tmp_path, state)
    with pytest.raises(ValueError, match=r"the text of the network is not in the file: give context"):
        convert("symmflow", file, tmp_path / "out", semantic="coco-stuff")
    with pytest.raises(ValueError, match="qkv_order is for the U-Net of guided diffusion, got 'kind'"):
        load_network("symmflow", state, context=text[0], qkv_order="kind")
    broken = {name: value for name, value in state.items() if "mid_block.resnets.1" not in name}
    with pytest.raises(ValueError, match=r"missing .*mid_block"):
        load_network("symmflow", broken, context=text[0], head_channels=16, input_size=8)


def test_the_weights_are_the_official_numbers(tmp_path, autoencoder):
    _, state, text = doubled()
    out = convert("symmflow", file_of(tmp_path, state), tmp_path / "out", semantic="coco-stuff", head_channels=16,
                  input_size=8, context=text_file(tmp_path, text), autoencoder=autoencoder)  # fmt: skip
    stored = load_tensors(out / "model.safetensors")
    assert torch.equal(stored["network.stem.weight"], state["unet.conv_in.weight"])
    assert sum(v.numel() for k, v in stored.items() if k.startswith("network.")) == text.numel() + sum(
        value.numel() for value in state.values()
    )
