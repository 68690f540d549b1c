"""From the pixels of a mask to class ids: colours, tables of ids, and what is unlabelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_flows.codecs.semantic import IGNORE
from lightning_flows.data.transforms import read_mask, read_picture

UNKNOWN = -1

Ids = Mapping[str, int] | Sequence[int]
Palette = Sequence[Sequence[int]]


class MaskIds:
    """Reads mask files and gives their pixels the ids 0..K-1, and 255 where they are unlabelled.

    Args:
        ids: new id of each id in the files: a list (entry i is the new id of i) or a mapping with the ids as text keys,
            which a config can hold. The value 255 makes it unlabelled; 255 itself stays 255 where nothing else is said;
            any other id that is not there is an error. None keeps the ids.
        palette: RGB colours 0..255 of masks that are painted: a pixel of colour i has the id i (before ``ids``). None:
            grey levels or palette indices of the files are the ids.
        num_classes: number of classes K, at most 255; None takes the largest new id of ``ids``, or the number of
            colours, and without those checks nothing.

    Raises:
        ValueError: an argument that is out of range, a colour or key that is there twice.
    """

    def __init__(self, ids: Ids | None = None, palette: Palette | None = None, num_classes: int | None = None) -> None:
        self.table = None if ids is None else _table(ids)
        self.colours = None if palette is None else _colours(palette)
        self.num_classes = num_classes if num_classes is not None else self._counted()
        if self.num_classes is not None and not 1 <= self.num_classes <= IGNORE:
            raise ValueError(f"num_classes of masks must lie in 1..{IGNORE} (id 255 is unlabelled), got {num_classes}")

    def __call__(self, path: Path) -> Tensor:
        """The ids of a mask file, uint8 (int64 where they do not fit), (H, W).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, or holds an id or a colour that is not known; names the file.
        """
        where = f"mask {path}"
        return self.map(read_mask(path).numpy() if self.colours is None else self._painted(path, where), where)

    def map(self, mask: np.ndarray, where: str) -> Tensor:
        """New ids of a mask or of several, uint8 (int64 where they do not fit), of the same shape.

        Args:
            mask: ids as they are stored, integers of any shape.
            where: names the mask in errors.

        Raises:
            ValueError: an id that is not known.
        """
        if self.table is not None:
            mask = _looked_up(mask, self.table, where)
        if self.num_classes is not None:
            _check_range(mask, self.num_classes, where)
        small = mask.size == 0 or (mask.min() >= 0 and mask.max() < 256)
        return torch.from_numpy(mask.astype(np.uint8 if small else np.int64))

    def _painted(self, path: Path, where: str) -> np.ndarray:
        """Place of every pixel's colour in the palette, int64, (H, W)."""
        codes, places = self.colours  # type: ignore[misc]
        found = _codes(np.asarray(read_picture(path).convert("RGB")))  # (H, W)
        at = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        if (unknown := codes[at] != found).any():
            code = int(found[unknown][0])
            raise ValueError(f"{where} has the colour {[code >> 16, code >> 8 & 255, code & 255]}, not in palette")
        return places[at]

    def _counted(self) -> int | None:
        if self.table is not None:
            return int(self.table[self.table != IGNORE].max(initial=UNKNOWN)) + 1
        return None if self.colours is None else len(self.colours[0])


def _table(ids: Ids) -> np.ndarray:
    """New id of each stored id, int64, at least 256 entries; ``UNKNOWN`` where none is given."""
    pairs = [(int(old), int(new)) for old, new in (ids.items() if isinstance(ids, Mapping) else enumerate(ids))]
    if not pairs or len({old for old, _ in pairs}) < len(pairs):
        raise ValueError(f"ids must have a new id for each stored one, none of them twice, got {ids}")
    if min(old for old, _ in pairs) < 0 or not all(0 <= new <= IGNORE for _, new in pairs):
        raise ValueError(f"ids must map ids >= 0 to 0..{IGNORE}, got {ids}")
    table = np.full(max(256, *(old + 1 for old, _ in pairs)), UNKNOWN)
    table[IGNORE] = IGNORE
    for old, new in pairs:
        table[old] = new
    return table


def _colours(palette: Palette) -> tuple[np.ndarray, np.ndarray]:
    """Colours as sorted numbers and the place of each in the palette, int64, both (P,)."""
    colours = np.array(palette, dtype=np.int64)
    if colours.ndim != 2 or colours.shape[1] != 3 or colours.min() < 0 or colours.max() > 255:
        raise ValueError(f"palette must be a list of RGB colours, three numbers 0..255 each, got {palette}")
    codes = _codes(colours)
    if len(np.unique(codes)) < len(codes):
        raise ValueError(f"palette must have each colour once, got {palette}")
    order = codes.argsort()
    return codes[order], order


def _codes(colours: np.ndarray) -> np.ndarray:
    """RGB colours (..., 3) as one number each, int64 (...)."""
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    return red << 16 | green << 8 | blue


def _looked_up(mask: np.ndarray, table: np.ndarray, where: str) -> np.ndarray:
    beyond = (mask < 0) | (mask >= len(table))
    new = np.where(beyond, UNKNOWN, table[np.where(beyond, 0, mask)])
    if (unknown := new == UNKNOWN).any():
        raise ValueError(f"{where} holds id {mask[unknown].max()}, which is not in ids")
    return new


def _check_range(mask: np.ndarray, count: int, where: str) -> None:
    if (wrong := (mask != IGNORE) & ((mask < 0) | (mask >= count))).any():
        found = mask[wrong].max()
        raise ValueError(
            f"{where} holds class id {found}, but there are {count} classes (0..{count - 1}, 255 is unlabelled)"
        )
