"""Text encoders: a frozen one gives what transformers gives, a trainable one needs nothing but words."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn

from lightning_flows.codecs import FrozenText, PromptTemplate, TextEncoder, WordEncoder
from lightning_flows.store import build
from tests.codecs import tiny_text

CAPTIONS = ["A cat, on the mat.", "", "red blue red blue red blue red blue", "zebra"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def t5(place):
    return str(tiny_text.write_t5(place / "t5"))


@pytest.fixture
def text(t5):
    return FrozenText(t5, length=7)


def reference(network, folder, length):
    """What transformers itself gives, one caption at a time and without padding."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows, counts = [], []
    for caption in CAPTIONS:
        ids = tokenizer([caption], return_tensors="pt", truncation=True, max_length=length)["input_ids"]
        with torch.no_grad():
            hidden = network(input_ids=ids).last_hidden_state[0]
        rows.append(nn.functional.pad(hidden, (0, 0, 0, length - len(hidden))))
        counts.append(ids.shape[1])
    return torch.stack(rows), torch.arange(length) < torch.tensor(counts)[:, None]


def direct(kind, folder):
    import transformers

    return getattr(transformers, kind).from_pretrained(folder).eval()


KINDS = {
    "t5": (tiny_text.write_t5, {}, lambda f: direct("T5EncoderModel", f)),
    "t5-whole": (tiny_text.write_t5, {"whole": True}, lambda f: direct("T5Model", f).encoder),
    "clip": (tiny_text.write_clip, {}, lambda f: direct("CLIPTextModel", f)),
    "clip-whole": (tiny_text.write_clip, {"whole": True}, lambda f: direct("CLIPModel", f).text_model),
    "bert": (tiny_text.write_bert, {}, lambda f: direct("BertModel", f)),
    "gpt2": (tiny_text.write_gpt2, {}, lambda f: direct("GPT2Model", f)),
    "bart": (tiny_text.write_bart, {}, lambda f: direct("BartModel", f).encoder),
}


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_transformers(place, name):
    write, options, network = KINDS[name]
    folder = str(write(place / f"kind-{name}", **options))
    values, mask = reference(network(folder), folder, 7)
    made = FrozenText(folder, length=7)
    tokens = made.encode(CAPTIONS)
    assert tokens.mask.dtype == torch.bool
    assert torch.equal(tokens.mask, mask)
    assert tokens.mask.sum(1).tolist() == [7, 1, 7, 2]
    torch.testing.assert_close(tokens.values, values, rtol=1e-4, atol=1e-5)
    assert tokens.values[0].std() > 0.05
    assert bool((tokens.values[~mask] == 0).all())
    assert tokens.values.shape[1:] == (made.length, made.size) == (7, 8)


@pytest.mark.parametrize("name", ["t5-whole", "clip-whole", "bart"])
def test_of_a_model_of_two_halves_only_the_text_encoder_is_kept(place, name):
    write, options, network = KINDS[name]
    folder = str(write(place / f"half-{name}", **options))
    count = sum(p.numel() for p in FrozenText(folder, length=7).network().parameters())
    assert count == sum(p.numel() for p in network(folder).parameters())


def test_the_size_is_known_without_weights(t5, tmp_path):
    (tmp_path / "config.json").write_text((Path(t5) / "config.json").read_text())
    made = FrozenText(str(tmp_path), length=5)
    assert (made.size, made.length) == (8, 5)
    with pytest.raises(ValueError, match=r"text model '.*' of the text encoder cannot be loaded"):
        made.network()


def test_null_is_the_empty_caption_and_is_encoded_once(text, monkeypatch):
    expected = text.encode(["", "", ""])
    calls, embed = [], FrozenText.embed
    monkeypatch.setattr(FrozenText, "embed", lambda self, *args: calls.append(args[0]) or embed(self, *args))
    for tokens in (text.null(3), copy.deepcopy(text).null(3), text.null(3, device="cpu")):
        torch.testing.assert_close(tokens.values, expected.values)
        assert torch.equal(tokens.mask, expected.mask)
    assert calls == [[""]]
    assert text.null().values.shape == (1, 7, 8)


def test_null_of_a_template_is_the_template_around_nothing(t5):
    template = PromptTemplate(noise_std=0.3)
    made, plain = FrozenText(t5, length=9, template=template), FrozenText(t5, length=9)
    torch.testing.assert_close(made.encode(["a cat"]), plain.encode(template.build(["a cat"])))
    torch.testing.assert_close(made.null(), plain.encode(["Noise Level 300:\n"]))
    torch.testing.assert_close(made.null(noise_std=0.1), plain.encode(["Noise Level 100:\n"]))
    torch.testing.assert_close(made.null(), plain.encode(["Noise Level 300:\n"]))
    assert (made.null().values - plain.null().values).abs().max() > 0.1
    for level in range(20):  # as many as there may be: the kept ones stay few
        made.null(noise_std=level / 10)
    assert len(made._nulls) <= 16
    several = made.null(3, noise_std=0.1, aspect=["1:1", "16:9", "1:1"])
    torch.testing.assert_close(several, made.encode(["", "", ""], noise_std=0.1, aspect=["1:1", "16:9", "1:1"]))
    with pytest.raises(ValueError, match=r"\['fps'\] have no place in the prompts: give the text encoder a template"):
        plain.encode(["a cat"], fps=16)


def test_facts_of_a_batch_are_those_that_the_template_writes(t5):
    batch = {"caption": ["a cat"], "aspect": ["16:9"]}
    assert FrozenText(t5, template=PromptTemplate(aspect="1:1")).facts_of(batch) == {"aspect": ["16:9"]}
    assert FrozenText(t5, template=PromptTemplate(aspect="1:1")).facts_of({"caption": ["a cat"]}) == {}
    assert FrozenText(t5, template=PromptTemplate(fps=0)).facts_of(batch) == {}
    assert FrozenText(t5).facts_of(batch) == {}


def test_one_text_in_the_place_of_a_list_is_refused(text):
    with pytest.raises(ValueError, match=r"list of texts, got the text 'a cat': give \['a cat'\]"):
        text.encode("a cat")
    for made in (text, WordEncoder(4)):
        with pytest.raises(ValueError, match="at least one text, got an empty one"):
            made.encode([])


def test_network_is_frozen_evaluated_and_no_submodule(text):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = text
            self.layer = nn.Linear(1, 1)

    holder = Holder()
    tokens = text.encode(CAPTIONS)
    holder.train()
    assert set(holder.state_dict()) == {"layer.weight", "layer.bias"}
    assert isinstance(text, TextEncoder)
    assert not isinstance(text, nn.Module)
    assert not text.network().training
    assert not any(p.requires_grad for p in text.network().parameters())
    assert not tokens.values.requires_grad
    assert torch.equal(text.encode(CAPTIONS).values, tokens.values)  # no dropout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float32_inside(text, dtype):
    expected = text.encode(CAPTIONS).values
    with torch.autocast("cpu", dtype=dtype):
        found = text.encode(CAPTIONS).values
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_tokens_of_a_validation_can_be_trained_on(t5):
    made, layer = FrozenText(t5, length=7), nn.Linear(8, 1)
    with torch.inference_mode():  # as Lightning validates
        null, tokens = made.null(2), made.encode(["a cat", "a dog"])
    layer(null.values).sum().backward()
    layer(tokens.values).sum().backward()
    layer(made.encode(["a dog"]).values).sum().backward()
    assert layer.weight.grad.abs().min() > 0


def test_weights_load_at_first_use_only_and_from_safetensors(t5, monkeypatch):
    import transformers

    calls, load = [], transformers.AutoModelForTextEncoding.from_pretrained
    spy = lambda *args, **options: calls.append(options) or load(*args, **options)  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForTextEncoding, "from_pretrained", spy)
    made = FrozenText(t5, length=7)
    assert made.size == 8
    assert calls == []
    state = torch.get_rng_state()
    made.encode(CAPTIONS)
    copy.deepcopy(made).encode(CAPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 1
    assert (calls[0]["use_safetensors"], calls[0]["trust_remote_code"]) == (True, False)


def test_a_pickled_weight_file_is_not_read(t5, tmp_path):
    for file in Path(t5).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(direct("T5EncoderModel", t5).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*safetensors.*--model\.init_args\.text"):
        FrozenText(str(tmp_path), length=7).encode(["a cat"])


def test_a_file_that_lacks_weights_is_refused(t5, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in Path(t5).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its file lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        FrozenText(str(tmp_path), length=7).encode(["a cat"])


def test_code_of_a_repository_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ValueError, match=r"text model '.*' of the text encoder cannot be loaded"):
        _ = FrozenText(str(tmp_path)).size


@pytest.mark.parametrize("use", [lambda text: text.size, lambda text: text.encode(["x"])])
def test_a_model_that_is_nowhere_is_named_with_a_way_out(tmp_path, monkeypatch, use):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # its variable is read once, at import
    (tmp_path / "empty").mkdir()
    for repo in (str(tmp_path / "empty"), "nobody/nothing"):
        with pytest.raises(ValueError, match=rf"text model '{repo}' .*repo=FOLDER, .*--model\.init_args\.text"):
            use(FrozenText(repo))


def test_the_tokenizer_may_lie_elsewhere(place, t5, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    whole = place / "pipeline"
    tiny_text.write_t5(whole / "text_encoder_3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (whole / "text_encoder_3" / name).unlink()
    tiny_text.write_tokenizer(whole / "tokenizer_3")
    expected = FrozenText(t5, length=7).encode(CAPTIONS).values
    inner = FrozenText(str(whole), subfolder="text_encoder_3", tokenizer_subfolder="tokenizer_3", length=7)
    assert torch.equal(inner.encode(CAPTIONS).values, expected)
    other = FrozenText(str(whole), subfolder="text_encoder_3", tokenizer=str(whole / "tokenizer_3"), length=7)
    assert torch.equal(other.encode(CAPTIONS).values, expected)
    missing = FrozenText(t5, tokenizer="nobody/nothing", length=7)
    with pytest.raises(ValueError, match=r"tokenizer 'nobody/nothing' .*tokenizer=FOLDER"):
        missing.encode(["a cat"])


def test_a_length_beyond_the_positions_is_refused(place):
    folder = str(tiny_text.write_clip(place / "positions"))
    assert FrozenText(folder, length=12).encode(["a cat"]).values.shape == (1, 12, 8)
    with pytest.raises(ValueError, match=r"length must be at most 12, .* got 13"):
        FrozenText(folder, length=13).encode(["a cat"])


def test_copies_share_the_network_and_pickles_leave_it_out(text):
    expected = text.encode(CAPTIONS).values
    text.null()
    assert copy.deepcopy(text).network() is text.network()
    written = pickle.dumps(text)
    assert len(written) < 2000
    again = pickle.loads(written)
    assert again.config == text.config
    assert torch.equal(again.encode(CAPTIONS).values, expected)


def test_config_names_the_weights_and_nothing_else(text, t5):
    text.encode(["a cat"])
    expected = {
        "repo": t5, "length": 7, "subfolder": None, "revision": None, "tokenizer": None, "tokenizer_subfolder": None,
        "template": None,
    }  # fmt: skip
    assert text.config == {"class_path": "lightning_flows.codecs.FrozenText", "init_args": expected}
    template = FrozenText(t5, template=PromptTemplate(fps=0))
    again = build(template.config, TextEncoder)
    assert again.template == PromptTemplate(fps=0)
    assert again.config == template.config


def test_revision_is_read_from_the_reference():
    assert (FrozenText("org/name@abc").repo, FrozenText("org/name@abc").revision) == ("org/name", "abc")
    with pytest.raises(ValueError, match="revision='x' contradicts repo='org/name@abc'"):
        FrozenText("org/name@abc", revision="x")


@pytest.mark.parametrize(
    ("make", "wrong"),
    [(FrozenText, {"repo": "org/name", "length": 0}), (WordEncoder, {"length": 0}), (WordEncoder, {"size": 0}),
     (WordEncoder, {"buckets": 0})],
)  # fmt: skip
def test_wrong_arguments_are_named(make, wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} must be at least 1, got 0"):
        make(**wrong)


# ---- words


def words(**options):
    torch.manual_seed(0)
    return WordEncoder(6, **{"length": 5, **options})


def test_a_token_is_its_word_and_its_place():
    made = words()
    values, mask = made.encode(["A cat, a CAT!", "a", "", "  ", "one two three four five six"])
    assert values.shape == (5, 5, 6)
    assert mask.sum(1).tolist() == [5, 1, 1, 1, 5]
    word = values - made.position  # without the places
    torch.testing.assert_close(word[0, 0], word[0, 3])  # "A" and "a"
    torch.testing.assert_close(word[0, 1], word[0, 4])  # "cat" and "CAT"
    torch.testing.assert_close(word[0, 0], word[1, 0])
    assert (values[0, 0] - values[0, 3]).abs().max() > 0.01  # at two places
    assert (word[0, 1] - word[0, 2]).abs().max() > 0.1  # "cat" and ","
    assert bool((values[~mask] == 0).all())
    torch.testing.assert_close(word[2, 0], made.table.weight[-1])  # the null token
    assert torch.equal(values[2], values[3])


def test_rows_are_the_same_on_every_machine():
    made = words(buckets=1000)
    assert made.rows("A red cat, two dogs") == [928, 261, 939, 126, 701]
    assert made.rows("") == [1000]
    code = "from lightning_flows.codecs import WordEncoder; print(WordEncoder(2, buckets=1000).rows('a red cat'))"
    for seed in ("1", "2"):  # of Python's own hashes
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "[928, 261, 939]", done.stderr


def test_words_of_any_language_are_words():
    made = words(length=8, buckets=10**6)
    assert len(made.rows("été 猫 кот")) == 3
    assert made.rows("ÉTÉ") == made.rows("été")


def test_null_is_learned_and_the_empty_caption():
    made = words()
    tokens = made.null(3)
    assert torch.equal(tokens.values, made.encode(["", "", ""]).values)
    assert tokens.mask.sum(1).tolist() == [1, 1, 1]
    tokens.values.sum().backward()
    assert made.table.weight.grad[-1].abs().min() > 0
    assert made.table.weight.grad[:-1].abs().max() == 0
    named = words(template=PromptTemplate(fps=0))
    assert torch.equal(named.null().mask, named.encode([""]).mask)
    assert named.null().mask.sum() == 3  # an image :


def test_words_are_trained():
    made = words()
    target = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(200):
        loss = (made(["a cat", "two dogs"]).values.mean(1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_the_word_encoder_is_an_ordinary_submodule():
    holder = nn.ModuleDict({"text": words()})
    assert set(holder.state_dict()) == {"text.table.weight", "text.position"}
    again = build(words(template=PromptTemplate(aspect="1:1")).config, TextEncoder)
    assert again.config == words(template=PromptTemplate(aspect="1:1")).config
    assert again.size == 6
    made = words().to(torch.bfloat16)
    assert made.encode(["a cat"]).values.dtype == torch.float32
    assert not words().frozen
    assert FrozenText.frozen
