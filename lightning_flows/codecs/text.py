"""Text -> tokens: what every text encoder offers, frozen or trained.

A frozen one (`FrozenText`) is a plain object like a codec: optimizers, averages, checkpoints and published weights
do not see it, and its tokens can be cached with the latents. A trained one (`WordEncoder`) is an ordinary submodule
of the module that holds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_flows.codecs.prompts import PromptTemplate
from lightning_flows.flow.condition import Tokens
from lightning_flows.store import Recorded


class TextEncoder(Recorded, ABC):
    """Captions -> ``Tokens(values (B, L, D) float32, mask (B, L) bool)``.

    A caption longer than L tokens is cut; after a shorter one the mask is False and the values are exact zeros.

    Args:
        length: number L of tokens.
        template: of the prompts; None takes the captions as they are.

    Attributes:
        frozen: the same captions always give the same tokens, so that they may be kept (see `data.LatentWriter`).

    Raises:
        ValueError: no token.
    """

    frozen: ClassVar[bool]

    def __init__(self, length: int, template: PromptTemplate | None = None) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length, self.template = length, template

    @property
    @abstractmethod
    def size(self) -> int:
        """Width D of a token."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Tokens:
        """Tokens of texts to which nothing is added any more, see `encode`."""

    def encode(self, captions: Sequence[str], *, device: torch.device | str | None = None, **facts: Any) -> Tokens:
        """Tokens of captions.

        Args:
            captions: B texts.
            device: where the tokens are wanted: a frozen network follows. None: where the encoder is.
            facts: of these captions, for the template: see `PromptTemplate.build`.

        Returns:
            values (B, L, D), float32, and mask (B, L), bool.

        Raises:
            ValueError: no text, one in the place of a list of them, or facts without a template.
        """
        return self.embed(self.prompts(captions, **facts), device)

    def null(self, n: int = 1, *, device: torch.device | str | None = None, **facts: Any) -> Tokens:
        """Tokens of ``n`` empty captions, under the same template: what "no text" is; see `encode`."""
        prompts = self.prompts([""] * n, **facts)
        rows = {prompt: self.embed_null(prompt, device) for prompt in dict.fromkeys(prompts)}
        if len(rows) == 1:
            return Tokens(*(part.expand(n, *part.shape[1:]) for part in rows[prompts[0]]))
        return Tokens(*map(torch.cat, zip(*(rows[prompt] for prompt in prompts), strict=True)))

    def embed_null(self, prompt: str, device: torch.device | str | None = None) -> Tokens:
        """Tokens (1, L, D) of one null prompt."""
        return self.embed([prompt], device)

    def facts_of(self, batch: Any) -> dict[str, Any]:
        """What a batch tells of its data and the template writes: ``aspect``, where the template has one."""
        wanted = self.template is not None and self.template.aspect is not None
        return {"aspect": batch["aspect"]} if wanted and batch.get("aspect") is not None else {}

    def prompts(self, captions: Sequence[str], **facts: Any) -> list[str]:
        """Captions in the template; as they are where there is none."""
        if isinstance(captions, str):
            raise ValueError(f"captions must be a list of texts, got the text {captions!r}: give [{captions!r}]")
        if len(captions) == 0:
            raise ValueError("captions must be a list of at least one text, got an empty one")
        if self.template is not None:
            return self.template.build(captions, **facts)
        if facts:
            raise ValueError(f"{sorted(facts)} have no place in the prompts: give the text encoder a template")
        return list(captions)


def padded(values: Tensor, mask: Tensor) -> Tokens:
    """Tokens (B, L, D) in float32 with exact zeros, of whichever numbers, where the mask (B, L) is False."""
    mask = mask.bool()
    return Tokens(values.float().masked_fill(~mask[..., None], 0.0), mask)
