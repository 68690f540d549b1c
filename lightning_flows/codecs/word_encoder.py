"""A small trainable text encoder that needs no vocabulary, no download and no network: hashed words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import nn

from lightning_flows.codecs.prompts import PromptTemplate
from lightning_flows.codecs.text import TextEncoder, padded
from lightning_flows.flow.condition import Tokens

_WORD = re.compile(r"\w+|[^\w\s]")
_INIT = 0.1  # deviation of the positions at the start: a word is at first itself (deviation 1), wherever it stands


class WordEncoder(TextEncoder, nn.Module):
    r"""Token l of a text is ``table[hash(word_l)] + position[l]``.

    Words are lower-cased, punctuation is split off, and each is sent to one of ``buckets`` rows by a hash that is
    the same on every machine. Two words may share a row; with :math:`V` words in use the expected share of words
    that do is about :math:`1 - e^{-V / \text{buckets}}`, so take some ten times as many buckets as words. A text
    without a word is the last row of the table, the learned null token.

    It is trained with the network that reads its tokens. Order beyond the learned positions, and the meaning of
    words together, are left to that network.

    Args:
        size: width D of a token.
        length: number L of tokens.
        buckets: rows of the table for words.
        template: of the prompts; None takes the captions as they are.

    Raises:
        ValueError: an argument that is not positive.
    """

    frozen = False

    def __init__(
        self, size: int = 128, *, length: int = 16, buckets: int = 4096, template: PromptTemplate | None = None
    ) -> None:
        super().__init__(length, template)
        for name, value in (("size", size), ("buckets", buckets)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.buckets = buckets
        self.table = nn.Embedding(buckets + 1, size)
        self.position = nn.Parameter(_INIT * torch.randn(length, size))

    @property
    def size(self) -> int:
        """See `TextEncoder.size`."""
        return self.table.embedding_dim

    def embed(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Tokens:
        """See `TextEncoder.embed`; differentiable in the table and the positions."""
        rows = [self.rows(prompt) for prompt in prompts]
        padding = [0] * self.length
        ids = torch.tensor([(row + padding)[: self.length] for row in rows], dtype=torch.long).reshape(-1, self.length)
        count = torch.tensor([len(row) for row in rows], dtype=torch.long)
        mask = torch.arange(self.length) < count[:, None]  # (B, L)
        own = self.position.device
        tokens = padded(self.table(ids.to(own)) + self.position, mask.to(own))  # (B, L, D)
        return tokens if device is None else Tokens(*(part.to(device) for part in tokens))

    def forward(self, captions: Sequence[str]) -> Tokens:
        """The same as `encode`."""
        return self.encode(captions)

    def rows(self, text: str) -> list[int]:
        """Rows of the table, at most L, for the words of a text; that of the null token where it has none."""
        words = _WORD.findall(text.lower())[: self.length]
        return [_hash(word) % self.buckets for word in words] or [self.buckets]


def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
