"""Encoded pictures (JPEG, PNG, ...) laid end to end in one array: a few bytes each, decoded when they are read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightning_flows.data.transforms import convert_channels, picture_of, picture_size


class PackedPictures:
    """A sequence of pictures uint8 (C, H, W) that are kept encoded.

    Args:
        encoded: bytes of each picture.
        names: of each, for errors.
        channels: 1, 3 or 4; pictures are converted. None keeps what each has.
        background: grey level 0..255 under transparent pixels that lose their alpha.
    """

    def __init__(self, encoded: Sequence[bytes], names: Sequence[str], channels: int | None, background: int) -> None:
        self.encoded, self.names = list(encoded), list(names)
        self.channels, self.background = channels, background

    @classmethod
    def split(
        cls, data: np.ndarray, offsets: np.ndarray, path: Path, channels: int | None = None, background: int = 255
    ) -> PackedPictures:
        """The pictures of one file: picture i is ``data[offsets[i] : offsets[i + 1]]``.

        Args:
            data: uint8, (bytes,).
            offsets: integers that do not decrease, from 0 to the length of ``data``, (N + 1,).
            path: the file, for errors.
            channels: see `PackedPictures`.
            background: see `PackedPictures`.

        Raises:
            ValueError: arrays that do not fit together; names the file.
        """
        if not _fit(data, offsets):
            got = f"{data.dtype} {data.shape} and {offsets.dtype} {offsets.shape}"
            raise ValueError(f"packed pictures of {path} must be uint8 bytes and rising offsets from 0 on, got {got}")
        encoded = [data[start:stop].tobytes() for start, stop in itertools.pairwise(offsets.tolist())]
        return cls(encoded, [f"{i} of {path}" for i in range(len(encoded))], channels, background)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:
        """Picture uint8 (C, H, W).

        Raises:
            ValueError: it cannot be read; names its place and its file.
        """
        picture = picture_of(BytesIO(self.encoded[index]), self.names[index])
        return F.pil_to_tensor(convert_channels(picture, self.channels, self.background))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture, from its header."""
        return picture_size(BytesIO(self.encoded[index]), self.names[index])


def _fit(data: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether offsets (N + 1,) divide data (bytes,)."""
    if (
        data.ndim != 1
        or data.dtype != np.uint8
        or offsets.ndim != 1
        or len(offsets) < 2
        or offsets.dtype.kind not in "iu"
    ):
        return False
    places = offsets.astype(np.int64)
    return bool(places[0] == 0 and places[-1] == len(data) and (np.diff(places) >= 0).all())
