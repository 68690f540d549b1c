"""Text in a module: captions become tokens, cached ones are taken as they are, and absent ones are the null prompt."""

import pytest
import torch
from torch import nn

from lightning_flows.codecs import FrozenText, PromptTemplate, WordEncoder
from lightning_flows.flow import Condition, Tokens
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.store import Recorded
from tests.codecs import tiny_text
from tests.modules.tiny import batch, model


class Reader(Recorded, nn.Module):
    """Adds a word's mean to its input; reads a label too, which it ignores."""

    streams = ("label", "tokens")
    shape = (1, 4, 4)

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.project = nn.Linear(size, 16)

    def forward(self, x, t, condition=None):
        return x if condition is None else x + self.project(condition.tokens.values.mean(1)).reshape(-1, 1, 4, 4)

    def null(self, condition=None, batch_size=None):
        return Condition() if condition is None else condition.absent(*self.streams)

    def drop(self, condition, generator):
        lost = torch.rand(condition.batch_size, generator=generator) < 0.5
        return condition.absent("tokens", where=lost)


class TextFlow(LatentFlowMatching):
    """Latent flow matching of captions, whose dropped ones are the null prompt."""

    def __init__(self, *, text=None, **options) -> None:
        super().__init__(**options)
        self.text = text


def reader(text):
    torch.manual_seed(0)
    return TextFlow(network=Reader(), text=text, steps=2)


def words(**options):
    torch.manual_seed(0)
    return WordEncoder(6, length=5, **options)


def test_captions_become_tokens_of_the_text_encoder():
    made = reader(words())
    captions = ["a cat", "", "two dogs"]
    condition = made.condition_of({"caption": captions, "label": torch.arange(3)})
    assert condition.streams == ("label", "tokens")
    assert condition.present == {}
    torch.testing.assert_close(condition.tokens, made.text.encode(captions))
    assert made.condition_of({"caption": captions}).streams == ("tokens",)
    assert made.condition_of({"label": torch.arange(3)}).streams == ("label",)
    assert made.condition_of({"image": torch.zeros(3, 1, 4, 4)}) is None


def test_a_batch_tells_the_template_its_aspect_ratio():
    made = reader(words(template=PromptTemplate(aspect="1:1")))
    found = made.condition_of({"caption": ["a cat"], "aspect": ["16:9"]}).tokens
    torch.testing.assert_close(found, made.text.encode(["a cat"], aspect="16:9"))


def test_cached_tokens_come_first_and_are_float32():
    made = reader(words())
    values, mask = torch.ones(2, 5, 6, dtype=torch.float16), torch.ones(2, 5, dtype=torch.bool)
    found = made.condition_of({"caption": ["a", "b"], "tokens": values, "tokens_mask": mask}).tokens
    assert torch.equal(found.values, values.float())
    assert found.mask is mask


def test_captions_without_a_text_encoder_are_an_error_with_the_fix():
    with pytest.raises(ValueError, match=r"Reader reads tokens, but .* no text encoder: give TextFlow text=\.\.\."):
        reader(None).condition_of({"caption": ["a cat"]})
    assert model().condition_of({"caption": ["a cat"]}) is None  # its network reads labels alone
    found = model().condition_of({"caption": ["a cat"], "tokens": torch.ones(1), "label": torch.tensor([1])})
    assert found.streams == ("label",)


def test_null_condition_has_the_null_prompt_in_the_place_of_tokens():
    made = reader(words())
    condition = made.condition_of({"caption": ["a cat", "two dogs"], "label": torch.tensor([0, 1])})
    null = made.null_condition(condition)
    torch.testing.assert_close(null.tokens, made.text.null(2))
    assert not null.presence("label").any()
    assert torch.equal(null.label, condition.label)
    alone = made.null_condition(None, 3)
    torch.testing.assert_close(alone.tokens, made.text.null(3))
    labels = made.null_condition(Condition(label=torch.tensor([0, 1])))
    torch.testing.assert_close(labels.tokens, made.text.null(2))
    assert made.null_condition(None).streams == ()


def test_without_a_text_encoder_null_is_the_networks_own():
    tokens = Tokens(torch.ones(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))
    null = reader(None).null_condition(Condition(tokens=tokens))
    assert torch.equal(null.tokens.values, tokens.values)
    assert not null.presence("tokens").any()
    label = model().null_condition(Condition(label=torch.tensor([0, 1])))
    assert not label.presence("label").any()


@pytest.mark.parametrize("facts", [{}, {"aspect": ["16:9", "1:1", "16:9", "1:1"]}])
def test_dropped_captions_are_filled_with_the_null_prompt(facts):
    made = reader(words(template=PromptTemplate(aspect="1:1")))
    condition = made.condition_of({"caption": ["a", "cat", "two", "dogs"], **facts})
    lost = torch.tensor([True, False, False, True])
    filled = made.filled(condition.absent("tokens", where=lost), **facts)
    null = made.text.null(4, **facts)
    assert torch.equal(filled.tokens.values[lost], null.values[lost])
    assert torch.equal(filled.tokens.mask[lost], null.mask[lost])
    assert torch.equal(filled.tokens.values[~lost], condition.tokens.values[~lost])
    assert torch.equal(filled.tokens.mask[~lost], condition.tokens.mask[~lost])
    assert bool(filled.presence("tokens").all())  # a network that hides what is absent sees the null prompt
    assert made.filled(condition, **facts) is condition
    assert made.filled(None) is None


def test_tokens_of_another_shape_are_named():
    tokens = Tokens(torch.ones(2, 4, 6), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"condition\.tokens must have shape \(B, 5, 6\), .* got \(2, 4, 6\)"):
        reader(words()).null_condition(Condition(tokens=tokens))


def test_a_word_encoder_is_trained_with_the_module(quiet_trainer):
    made = reader(words())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert {"text.table.weight", "text.position"} <= set(before)
    items = [{"image": torch.zeros(1, 4, 4) + i, "caption": f"number {i}"} for i in range(4)]
    quiet_trainer(max_steps=2).fit(made, torch.utils.data.DataLoader(items, batch_size=2))
    after = made.state_dict()
    used = made.text.rows("number 0")[0]
    assert not torch.equal(after["text.table.weight"][used], before["text.table.weight"][used])
    assert not torch.equal(after["text.position"], before["text.position"])
    assert made.config["init_args"]["text"] == words().config


def test_a_frozen_encoder_is_no_part_of_the_module(tmp_path, quiet_trainer):
    tiny_text.write_t5(tmp_path)
    made = TextFlow(network=Reader(8), text=FrozenText(str(tmp_path), length=5), steps=2)
    made.sample(made.condition_of({"caption": ["a cat", "two dogs"]}), seed=1)
    assert not [name for name in made.state_dict() if name.startswith("text")]
    sizes = {"image": torch.zeros(1, 4, 4), "caption": "a cat"}
    quiet_trainer(max_steps=1).fit(made, torch.utils.data.DataLoader([sizes] * 2, batch_size=2))
    assert made.config["init_args"]["text"]["init_args"]["repo"] == str(tmp_path)


def test_requests_with_captions_are_sampled(tmp_path):
    made = reader(words())
    out = made.predict_step({"id": ["a", "b"], "seed": [1, 2], "caption": ["a cat", "two dogs"]}, 0)
    alone = made.predict_step({"id": ["b"], "seed": [2], "caption": ["two dogs"]}, 0)
    torch.testing.assert_close(out["sample"][1:], alone["sample"])
    other = made.predict_step({"id": ["b"], "seed": [2], "caption": ["a cat"]}, 0)
    assert (out["sample"][1:] - other["sample"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="the requests give 'caption', but DiT reads"):
        model().predict_step({**batch(2), "id": ["a", "b"], "seed": [1, 2], "caption": ["a", "b"]}, 0)
