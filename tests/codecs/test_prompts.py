"""Prompts of the official models, to the letter."""

import pytest

from lightning_flows.codecs import PromptTemplate
from lightning_flows.store import build, config_of


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ({}, "a corgi"),
        ({"fps": 16}, "A video with 16 fps:\na corgi\n"),
        ({"fps": 0}, "An image:\na corgi\n"),
        ({"noise_std": 0.5}, "Noise Level 500:\na corgi"),
        ({"noise_std": 0.0}, "Noise Level 0:\na corgi"),
        ({"aspect": "16:9"}, "a corgi\n in a 16:9 aspect ratio.\n"),
        (
            {"fps": 0, "noise_std": 0.3, "aspect": "1:1"},
            "Noise Level 300:\nAn image:\na corgi\n\n in a 1:1 aspect ratio.\n",
        ),
        (
            {"fps": 16, "chat": True},
            "<start_of_turn>user\nPlease generate a video about: A video with 16 fps:\na corgi\n<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            {"chat": True},
            "<start_of_turn>user\nPlease generate an image about: a corgi<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_the_strings_are_the_official_ones(template, prompt):
    made = PromptTemplate(**template)
    assert made.build(["a corgi", ""]) == [prompt, prompt.replace("a corgi", "")]
    assert build(config_of(made)) == made


def test_facts_of_a_batch_take_the_place_of_those_of_the_template():
    template = PromptTemplate(fps=0, noise_std=0.3)
    assert template.build(["x"], fps=24, noise_std=0.1) == ["Noise Level 100:\nA video with 24 fps:\nx\n"]
    assert PromptTemplate().build(["x"], fps=0) == ["An image:\nx\n"]
    assert PromptTemplate(fps=16, chat=True).build(["x"], fps=0)[0].count("an image") == 1
    assert template == PromptTemplate(fps=0, noise_std=0.3)


def test_each_caption_may_have_an_aspect_ratio_of_its_own():
    made = PromptTemplate(aspect="1:1").build(["x", "y"], aspect=["16:9", "9:16"])
    assert made == ["x\n in a 16:9 aspect ratio.\n", "y\n in a 9:16 aspect ratio.\n"]
    assert PromptTemplate().build([], aspect=[]) == []
    with pytest.raises(ValueError, match="aspect must be one, or one for each of the 2 captions"):
        PromptTemplate().build(["x", "y"], aspect=["16:9"])


@pytest.mark.parametrize(
    "wrong",
    [{"fps": -1}, {"fps": True}, {"fps": 12.5}, {"noise_std": -0.1}, {"noise_std": True}, {"noise_std": float("inf")},
     {"aspect": "wide"}, {"aspect": "16:0"}, {"aspect": True}],
)  # fmt: skip
def test_facts_that_are_none_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        PromptTemplate(**wrong)
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        PromptTemplate().build(["x"], **{name: [value] if name == "aspect" else value})
