"""Prompts with facts about the data around the caption, in the strings of the official STARFlow models.

Reference: STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (Gu et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_flows.codecs.aspect import width_to_height


@dataclass(frozen=True)
class PromptTemplate:
    r"""What is written around a caption, from the inside out: frame rate, noise level, aspect ratio, a chat's turns.

    ===========  =========================================================================
    ``fps``      ``A video with 16 fps:\n{}\n``, or for 0 ``An image:\n{}\n``
    noise level  ``Noise Level 300:\n{}``
    ``aspect``   ``{}\n in a 16:9 aspect ratio.\n``
    ``chat``     ``<start_of_turn>user\nPlease generate an image about: {}<end_of_turn>\n<start_of_turn>model\n``
    ===========  =========================================================================

    The null prompt of a model with a template is the template around an empty caption, not an empty text.

    Args:
        fps: frames per second; 0 for images; None leaves it out.
        noise_std: deviation of the noise that was added to the data, written in thousandths; None leaves it out.
        aspect: width to height, such as ``"16:9"`` (in YAML in quotation marks), of data that do not say it
            themselves (those in buckets do); None leaves it out.
        chat: put the text into the turn of a user, of whom a chat model is the partner.

    Raises:
        ValueError: an argument that is none of these.
    """

    fps: int | None = None
    noise_std: float | None = None
    aspect: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and (isinstance(self.fps, bool) or not isinstance(self.fps, int) or self.fps < 0):
            raise ValueError(f"fps must be a whole number >= 0 (0: an image) or None, got {self.fps!r}")
        if self.noise_std is not None and (isinstance(self.noise_std, bool) or not 0 <= self.noise_std < math.inf):
            raise ValueError(f"noise_std must be a finite number >= 0 or None, got {self.noise_std!r}")
        if self.aspect is not None:
            width_to_height(self.aspect, "aspect")

    def build(
        self,
        captions: Sequence[str],
        *,
        fps: int | None = None,
        noise_std: float | None = None,
        aspect: str | Sequence[str] | None = None,
    ) -> list[str]:
        """One prompt for each caption.

        Args:
            captions: texts; an empty one gives the null prompt.
            fps: of these captions; that of the template by default.
            noise_std: the same.
            aspect: the same; one for all, or one for each caption.

        Raises:
            ValueError: a fact that the template does not take, or another number of aspect ratios than of captions.
        """
        aspects = [aspect] * len(captions) if aspect is None or isinstance(aspect, str) else list(aspect)
        if len(aspects) != len(captions):
            raise ValueError(f"aspect must be one, or one for each of the {len(captions)} captions, got {aspects}")
        pairs = zip(captions, aspects, strict=True)
        return [self._with(fps=fps, noise_std=noise_std, aspect=ratio)._around(caption) for caption, ratio in pairs]

    def _with(self, **facts: float | str | None) -> PromptTemplate:
        """The template with facts of its own replaced by those that are given."""
        given = {name: value for name, value in facts.items() if value is not None}
        return replace(self, **given) if given else self  # type: ignore[arg-type]

    def _around(self, text: str) -> str:
        if self.fps is not None:
            text = f"{f'A video with {self.fps} fps' if self.fps else 'An image'}:\n{text}\n"
        if self.noise_std is not None:
            text = f"Noise Level {int(1000 * self.noise_std)}:\n{text}"
        if self.aspect is not None:
            text = f"{text}\n in a {self.aspect} aspect ratio.\n"
        if self.chat:
            kind = "a video" if self.fps else "an image"
            text = f"<start_of_turn>user\nPlease generate {kind} about: {text}<end_of_turn>\n<start_of_turn>model\n"
        return text
