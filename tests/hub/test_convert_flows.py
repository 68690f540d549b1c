"""TARFlow and STARFlow files of the official code, as a user downloads them, into models that sample."""

import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_flows import from_pretrained
from lightning_flows.cli import dispatch
from lightning_flows.codecs import FrozenText
from lightning_flows.flow import Condition, Dequantization, Tokens
from lightning_flows.hub import check_folder
from lightning_flows.hub.convert import convert, load_network, read_state
from lightning_flows.hub.licences import NOTE
from lightning_flows.networks import STARFlow, TARFlow
from tests.codecs.tiny_text import write_t5

TARFLOW = {"patch_size": 2, "hidden_size": 16, "num_blocks": 2, "depth": 1, "head_size": 8}
STARFLOW = {"hidden_size": 32, "depth": [1, 0, 2], "head_size": 32}
TEXT = {"text_length": 5, "text_size": 8, "text_dropout": 0.1}


def random(network, seed=0):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.05)
    return network.eval()


def official(network):
    """The state dict of the official class: ours, and the buffers that it has besides."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    side = network.shape[1] // network.patch_size
    tokens, channels = side**2, network.shape[0] * network.patch_size**2
    text = getattr(network, "text_length", 0)
    state["var"] = state.pop("prior_variance", torch.ones(tokens, channels))
    for b, block in enumerate(network.blocks):
        if len(block.attn_blocks):
            state[f"blocks.{b}.attn_mask"] = torch.ones(tokens + text, tokens + text).tril()
    if isinstance(network, STARFlow):
        angles = torch.zeros(tokens + text, network.head_size)
        state |= {"feat_rope.freqs_cos": angles, "feat_rope.freqs_sin": angles}  # of one storage, as there
    return state


def save(folder, state, name="model.pth"):
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    return folder / name


def save_distributed(folder, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
    return folder


def tarflow(**options):
    return random(TARFlow(8, **{**TARFLOW, **options}))


def starflow(size=4, **options):
    return random(STARFlow(size, **{**STARFLOW, **options}))


def text_condition(size=2):
    values = torch.randn(size, 5, 8, generator=torch.Generator().manual_seed(1))
    return Condition(tokens=Tokens(values, torch.ones(size, 5, dtype=torch.bool)))


def agree(model, network, condition=None):
    x = torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(2))
    assert type(model.network) is type(network)
    for ours, theirs in zip(model.network(x, condition), network(x, condition), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.network.inverse(x, condition), network.inverse(x, condition))


# ---- round trips


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("volume_preserving", [False, True])
def test_tarflow_comes_back_with_its_numbers(tmp_path, classes, volume_preserving):
    network = tarflow(num_classes=classes, label_dropout=0.1 if classes else 0.0, volume_preserving=volume_preserving)
    if volume_preserving:
        network.prior_variance.uniform_(0.5, 2.0)
    file = save(tmp_path, official(network))
    folder = convert("tarflow", file, tmp_path / "out", head_size=8, noise_std=0.1)
    model = from_pretrained(folder)
    agree(model, network, None if classes is None else Condition(label=torch.tensor([2, 0])))
    assert model.network.config["init_args"] == network.config["init_args"] | {"input_size": [8, 8], "depth": [1, 1]}
    assert model.objective.data_noise.std == 0.1
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    sample = model.sample(None if classes is None else Condition(label=torch.tensor([1, 1])), n=2, seed=3)
    assert sample.shape == (2, 3, 8, 8)
    assert torch.isfinite(sample).all()


def test_starflow_comes_back_with_its_numbers_and_its_text_encoder(tmp_path):
    network = starflow(in_channels=3, patch_size=2, **TEXT)
    encoder = write_t5(tmp_path / "t5")
    with pytest.warns(UserWarning, match="no licence beside it"):
        folder = convert(
            "starflow", save(tmp_path, official(network)), tmp_path / "out", in_channels=3, text_encoder=str(encoder)
        )
    model = from_pretrained(folder)
    agree(model, network, text_condition())
    assert model.network.config["init_args"] == network.config["init_args"] | {
        "input_size": [4, 4], "deep_hidden_size": 32,
    }  # fmt: skip
    assert (type(model.text), model.text.repo, model.text.length) == (FrozenText, str(encoder), 5)
    assert (model.objective.data_noise.std, model.objective.latent_penalty) == (0.3, 1e-4)
    assert model.sample(Condition(tokens=model.text.encode(["a cat", "a dog"])), seed=0).shape == (2, 3, 4, 4)


def test_the_published_model_reads_texts_of_t5_and_latents_of_stable_diffusion(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenText, "size", 2048)  # else its config is fetched
    network = starflow(text_length=128, text_size=2048)
    (tmp_path / "LICENSE").write_text("the agreement")
    folder = convert("starflow", save(tmp_path, official(network)), tmp_path / "out")
    model = from_pretrained(folder)
    assert (model.text.repo, model.text.length, model.text.template) == ("google/flan-t5-xl", 128, None)
    assert (model.codec.repo, model.guidance.scale, model.network.text_dropout) == (
        "stabilityai/sd-vae-ft-ema", 4.6, 0.1,
    )  # fmt: skip


@pytest.mark.parametrize("told", [{}, {"text_length": 1}])
def test_a_class_token_makes_a_network_of_labels(tmp_path, told):
    texts = starflow(text_length=1, text_size=6)
    state = official(texts)
    if told:
        del state["blocks.2.attn_mask"]
    (tmp_path / "licence.txt").write_text("the agreement")
    folder = convert("starflow", save(tmp_path, state), tmp_path / "out", class_token=True, label_dropout=0.2, **told)
    network = from_pretrained(folder).network
    assert (network.num_classes, network.label_dropout, network.streams) == (5, 0.2, ("label",))
    x = torch.randn(2, *network.shape)
    code = torch.nn.functional.one_hot(torch.tensor([[4], [5]]), 6).float()  # the last one is no class
    theirs = texts(x, Condition(tokens=Tokens(code, torch.ones(2, 1, dtype=torch.bool))))
    label = Condition(label=torch.tensor([4, 0]), present={"label": torch.tensor([True, False])})
    for a, b in zip(network(x, label), theirs, strict=True):
        assert torch.equal(a, b)


def test_what_no_file_says_can_be_told(tmp_path):
    options = {"reverse_first": False, "scale": "exp", "soft_clip": 0.0, "reference_length": 7.0, "theta": 100.0}
    network = starflow(in_channels=3, **options)
    file = save(tmp_path, official(network))
    (tmp_path / "LICENSE").write_text("the agreement")
    model = from_pretrained(convert("starflow", file, tmp_path / "out", in_channels=3, network=options))
    agree(model, network)
    assert (model.text, model.guidance) == (None, None)
    other = load_network("starflow", read_state(file), in_channels=3)
    x = torch.randn(2, *network.shape)
    assert not torch.allclose(other(x)[0], network(x)[0])


@pytest.mark.parametrize(("side", "classes", "std"), [(64, None, 0.05), (64, 1000, 0.05), (128, 1000, 0.15)])
def test_the_noise_of_the_published_models_is_known(tmp_path, side, classes, std):
    network = random(TARFlow(side, patch_size=side // 2, hidden_size=64, num_blocks=1, depth=1, num_classes=classes))
    model = from_pretrained(convert("tarflow", save(tmp_path, official(network)), tmp_path / "out"))
    assert model.objective.data_noise.std == std


def test_no_gaussian_noise_is_uniform_noise(tmp_path):
    file = save(tmp_path, official(tarflow()))
    model = from_pretrained(convert("tarflow", file, tmp_path / "out", head_size=8, noise_std=0.0))
    assert isinstance(model.objective.data_noise, Dequantization)


# ---- files


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


def in_16_bits(state):
    return {name: value.bfloat16() for name, value in state.items()}


@pytest.mark.parametrize("wrap", [prefixed, in_16_bits, lambda state: {"model": state, "step": 3}])
@pytest.mark.parametrize("write", [save, save_distributed])
def test_files_of_any_kind_of_training_are_read(tmp_path, wrap, write):
    state = official(starflow(**TEXT))
    read = read_state(write(tmp_path / "run", wrap(state)))
    assert read.keys() == state.keys()
    for name, value in state.items():
        want = value.bfloat16().float() if wrap is in_16_bits else value
        assert read[name].dtype == torch.float32
        assert torch.equal(read[name], want), name


def test_a_folder_of_a_sharded_run_is_converted(tmp_path):
    network = starflow(in_channels=3)
    run = save_distributed(tmp_path / "run", official(network))
    (run / "License.txt").write_text("the agreement")
    model = from_pretrained(folder := convert("starflow", run, tmp_path / "out", in_channels=3))
    agree(model, network)
    assert (folder / "License.txt").read_text() == "the agreement"
    text = (folder / "README.md").read_text()
    assert "SHA-256 of the names and checksums of the original files" in text
    assert "tags: [normalizing-flow, starflow]" in text
    assert "`License.txt`" in text


class Danger:
    def __reduce__(self):
        return print, ("code of the file was executed",)


def spoil_index(run):
    (run / ".metadata").write_bytes(pickle.dumps(Danger()))


def spoil_class(run):
    (run / ".metadata").write_bytes(pickle.dumps([1, 2]))


def lead_out(run):
    index = pickle.loads((run / ".metadata").read_bytes())
    for part in index.storage_data.values():
        part.relative_path = f"../{part.relative_path}"
    (run / ".metadata").write_bytes(pickle.dumps(index))


def lose_shard(run):
    (run / "__0_0.distcp").unlink()


def cut_shard(run):
    file = run / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])


def lose_index(run):
    (run / ".metadata").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_index, r"cannot be read safely: \.metadata names builtins\.print"),
        (spoil_class, r"cannot be read safely: \.metadata holds a list"),
        (lead_out, r"cannot be read safely: \.metadata names '\.\./__0_0\.distcp'"),
        (lose_shard, r"run is broken or incomplete.*__0_0\.distcp"),
        (cut_shard, "run is broken or incomplete"),
        (lose_index, r"run has no \.metadata"),
    ],
)
def test_a_broken_or_dangerous_folder_is_an_error_that_names_it(tmp_path, spoil, message, capsys):
    run = save_distributed(tmp_path / "run", official(starflow()))
    spoil(run)
    with pytest.raises(ValueError, match=message):
        read_state(run)
    assert capsys.readouterr().out == ""


def test_values_that_are_no_tensors_are_not_read(tmp_path, capsys):
    state = official(starflow())
    run = save_distributed(tmp_path / "run", {"model": state, "args": Danger()})
    assert read_state(run).keys() == state.keys()
    with pytest.raises(ValueError, match=r"'extra' must be a tensor"):
        read_state(save_distributed(tmp_path / "bare", {**state, "extra": Danger()}))
    assert capsys.readouterr().out == ""


# ---- what the file cannot say, and what it is not


@pytest.mark.parametrize(
    ("network", "format", "options", "message"),
    [
        (tarflow, "tarflow", {"head_size": 8}, r"noise_std is needed.*8 x 8 pixels and num_classes=None"),
        (tarflow, "tarflow", {"in_channels": 1, "head_size": 8}, "in_channels=1 does not fit: a token has 12 values"),
        (tarflow, "tarflow", {"text_length": 2}, "tarflow has no option text_length; it has .*'noise_std'"),
        (starflow, "starflow", {"network": {"depth": 3}}, "starflow has no option depth"),
        (starflow, "starflow", {"head_size": 32, "network": {"head_size": 32}}, "head_size is given twice"),
        (starflow, "starflow", {"class_token": True}, r"has no 'blocks\.2\.proj_txt\.weight'"),
        (starflow, "starflow", {"text_encoder": "org/t5"}, "text_encoder='org/t5', but the network reads no text"),
        (starflow, "starflow", {"in_channels": 1}, "in_channels=1: it is not known whose latents"),
        (lambda: starflow(**TEXT), "starflow", {}, "5 tokens of 8 channels, not those of google/flan-t5-xl"),
        (lambda: starflow(**TEXT), "starflow", {"text_length": 4}, "text_length=4, but .* texts of 5"),
        (lambda: starflow(**TEXT), "starflow", {"class_token": True}, "a class is one token, .* texts of 5"),
        (lambda: starflow(text_length=1, text_size=6), "starflow", {}, "class_token=True where the token is a class"),
        (lambda: starflow(in_channels=5), "starflow", {"in_channels": 5}, "in_channels=5: it is not known"),
        (tarflow, "starflow", {"head_size": 8, "in_channels": 3}, r"blocks\.0\.pos_embed"),
        (lambda: starflow(8, in_channels=3, patch_size=2), "tarflow", {}, r"no 'blocks\.0\.pos_embed'"),
        (tarflow, "sit", {"noise_std": 0.1}, "sit has no option noise_std"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, network, format, options, message):
    file = save(tmp_path, official(network()))
    with pytest.raises(ValueError, match=rf"model\.pth cannot be converted as {format}: .*({message})"):
        convert(format, file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_for_video_says_so(tmp_path):
    state = official(starflow()) | {"learnable_self_denoiser.proj_in.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="STARFlow-V model for video"):
        convert("starflow", save(tmp_path, state), tmp_path / "out")


def test_a_part_of_a_file_is_not_enough(tmp_path):
    state = official(starflow(in_channels=3))
    del state["blocks.2.proj_in.bias"]
    with pytest.raises(ValueError, match=r"blocks\.2\.proj_in\.bias"):
        convert("starflow", save(tmp_path, state), tmp_path / "out", in_channels=3)


# ---- the agreement


@pytest.mark.parametrize("name", ["LICENSE", "licence.md", "License_MODEL.txt"])
def test_the_licence_goes_with_the_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"the agreement\r\n")
    file = save(tmp_path, official(starflow(in_channels=3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = convert("starflow", file, tmp_path / "out", in_channels=3)
    assert (folder / name).read_bytes() == b"the agreement\r\n"
    assert not (folder / NOTE).exists()
    assert f"Beside these weights: `{name}`" in (folder / "README.md").read_text()
    assert check_folder(folder) == folder


def test_without_a_licence_a_note_says_what_is_known_and_nothing_is_pushed(tmp_path):
    file = save(tmp_path, official(starflow(in_channels=3)))
    with pytest.warns(UserWarning, match=rf"model\.pth has no licence beside it.*{NOTE}"):
        folder = convert("starflow", file, tmp_path / "out", in_channels=3)
    text = (folder / NOTE).read_text()
    for word in ("research only", "not commercially", "same terms", "modified", "not the agreement", "model.pth"):
        assert word in text
    with pytest.raises(ValueError, match=rf"lacks the agreement.*{NOTE}"):
        check_folder(folder)
    (folder / NOTE).unlink()
    (folder / "LICENSE").write_text("the agreement")
    assert check_folder(folder) == folder


def test_other_formats_take_no_licence_along(tmp_path):
    (tmp_path / "LICENSE").write_text("of something else")
    folder = convert("tarflow", save(tmp_path, official(tarflow())), tmp_path / "out", head_size=8, noise_std=0.1)
    assert not (folder / "LICENSE").exists()


# ---- the command line


def test_from_the_command_line(tmp_path, capsys):
    network = starflow(in_channels=3, reverse_first=False)
    (tmp_path / "LICENSE").write_text("the agreement")
    file = save(tmp_path, official(network))
    more = ["--in_channels=3", "--noise_std=0.2", "--network.reverse_first=false", "--network.scale=softplus"]
    dispatch(["convert", "starflow", str(file), str(tmp_path / "out"), *more])
    assert "wrote" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "out")
    agree(model, network)
    assert model.objective.data_noise.std == 0.2
