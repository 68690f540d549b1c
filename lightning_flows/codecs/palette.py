r"""Masks as pictures: each class is a colour, as in SymmFlow.

.. math:: y = \frac{\text{colour}_k}{127.5} - 1 + \frac{\beta}{127.5} (u - \tfrac12), \qquad
          \hat k = \arg\min_k \lVert \operatorname{clamp}(y, -1, 1) - c_k \rVert.

Reference: Symmetrical Flow Matching: Unified Image Generation, Segmentation, and Classification with Score-Based
Generative Models (Caetano, Viviers, de With, van der Sommen, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from lightning_flows.codecs.code_table import CodeTable, sharp

Colour = tuple[int, int, int]
_HALF = 127.5

CELEBAMASK_HQ: tuple[Colour, ...] = (  # background, skin, nose, ... cloth
    (0, 0, 0),
    (204, 0, 0),
    (76, 153, 0),
    (204, 204, 0),
    (51, 51, 255),
    (204, 0, 204),
    (0, 255, 255),
    (255, 204, 204),
    (102, 51, 0),
    (255, 0, 0),
    (102, 204, 0),
    (255, 255, 0),
    (0, 0, 153),
    (0, 0, 204),
    (255, 51, 153),
    (0, 204, 204),
    (0, 51, 0),
    (255, 153, 51),
    (0, 204, 0),
)
_CUBE: tuple[Colour, ...] = tuple(product(range(0, 251, 50), repeat=3))  # 216 colours in lexicographic order
COCO_STUFF: tuple[Colour, ...] = (*_CUBE[:171], _CUBE[-1])  # 171 classes, and what nobody labelled
PALETTES = {"celebamask-hq": CELEBAMASK_HQ, "coco-stuff": COCO_STUFF}
_UNLABELLED = {"coco-stuff": 171}  # class whose colour unlabelled pixels take


class RGBPalette(CodeTable):
    """Three planes: the colour of each pixel's class in [-1, 1].

    The mean of two colours may be the colour of a third class: at borders (averaged pixels) and where a one-step
    estimate hesitates. `OneHot` has no such trap; this is the published code, and the one that an image autoencoder
    takes (`ThroughAutoencoder`).

    Args:
        palette: ``"celebamask-hq"`` (19 classes), ``"coco-stuff"`` (171 classes and, as class 171, unlabelled; id 255
            is painted and read like it), or a list of colours (R, G, B) in 0..255. Outside ``"coco-stuff"``, pixels
            with id 255 are 0 in all planes.
        beta: full width of the dequantisation noise in grey levels; the published models use 10 (CelebAMask-HQ) and 6
            (COCO-Stuff).
        temperature: tau of the scores; None: an eighth of the least squared distance of two colours.

    Raises:
        ValueError: an unknown palette, colours that are none or that occur twice, a negative ``beta``; see `CodeTable`.
    """

    def __init__(
        self, palette: str | Sequence[Sequence[int]], *, beta: float = 15.0, temperature: float | None = None
    ) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        colours = _colours(palette)
        rows = torch.tensor(colours, device="cpu").float() / _HALF - 1  # (K, 3)
        tau = temperature if temperature is not None or len(rows) < 2 else sharp(rows)
        super().__init__(len(rows), 3, temperature=1.0 if tau is None else tau, width=beta / _HALF)
        self._colours = list(colours)
        self._table = rows
        self._unlabelled = _UNLABELLED.get(palette) if isinstance(palette, str) else None

    def colours(self, key: str = "mask") -> list[Colour]:
        """See `SemanticCodec.colours`: those of the palette."""
        return list(self._colours)

    def table(self) -> Tensor:
        """See `CodeTable.table`."""
        return self._table

    def unlabelled(self) -> Tensor:
        """See `CodeTable.unlabelled`."""
        return super().unlabelled() if self._unlabelled is None else self._table[self._unlabelled]

    def reading(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """See `CodeTable.reading`; clamped to [-1, 1]."""
        return super().reading(y, size).clamp(-1, 1)


def _colours(palette: str | Sequence[Sequence[int]]) -> list[Colour]:
    if isinstance(palette, str):
        if palette not in PALETTES:
            raise ValueError(f"palette must be one of {sorted(PALETTES)} or a list of colours, got {palette!r}")
        return list(PALETTES[palette])
    colours = [tuple(colour) for colour in palette]
    for colour in colours:
        if len(colour) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in colour):
            raise ValueError(f"palette must hold colours of three integers in 0..255, got {colour}")
    if twice := sorted({colour for colour in colours if colours.count(colour) > 1}):
        raise ValueError(f"palette holds the colour {twice[0]} more than once")
    return colours
