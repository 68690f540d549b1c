"""Two small sets of photos, made to look like Fashion-MNIST: one light thing on black, grey, 28 x 28.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.small_sets OUT

writes ``OUT/sign_digits28`` (hand signs of the digits 0 to 9: 1,862 for training, 200 others) and ``OUT/hats28`` (the
first 100 hats of ``clothing128``'s training split, the 23 others and the 14 of its validation split to test with) as
arrays that `lightning_flows.data.Arrays` reads.

Why not simply grey: an autoencoder of garments on exact black cannot show a photo. Of the grey photos of hands
``kl-fashion-mnist`` keeps 17.1 dB (99 % of the variance is lost), of their negatives 17.3, of the preparation below
28.1 (1.6 % is lost). It was chosen by these figures, on training images alone.
"""

from __future__ import annotations

import argparse
import io
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.judges.cnn import DATA, SIZE, folder_of
from lightning_flows.data.transforms import resize

HAT, TRAINED_HATS = 1, 100  # label in clothing128; how many of its training split are for training
_BORDER = 3  # pixels at each side that show the background


class Set(NamedTuple):
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def signs(split: str) -> Set:
    """The hand signs of ``train`` (1,862) or ``val`` (200), with their digits.

    Raises:
        ValueError: the environment variable ``LIGHTNING_FLOWS_DATA`` does not name the folder of the data sets.
    """
    photos, labels = _photos("sign_digits64", split)
    return Set(_as_pixels(skin(photos)), labels)


def hats(split: str) -> Tensor:
    """Hats (N, 1, 28, 28) uint8: ``train`` (100) or ``test`` (37).

    Raises:
        ValueError: as `signs`.
    """
    photos, labels = _photos("clothing128", "train")
    first = photos[labels == HAT]
    if split == "train":
        return _as_pixels(apart(first[:TRAINED_HATS]))
    photos, labels = _photos("clothing128", "val")
    return _as_pixels(apart(torch.cat([first[TRAINED_HATS:], photos[labels == HAT]])))


# ------------------------------------------------------------------ light on black


def skin(photos: Tensor) -> Tensor:
    """Hands on a grey wall, (N, 3, H, W) in [0, 1], as light on black, (N, 1, H, W): skin is redder than it is blue.

    The median of an image is wall and becomes black, shadows and dark corners too, which have no colour.
    """
    return levels(photos[:, :1] - photos[:, 2:], 0.5, 0.995)


def apart(photos: Tensor) -> Tensor:
    """Things on one cloth, (N, 3, H, W) in [0, 1], as light on black, (N, 1, H, W).

    A pixel is shown by how far its colour is from those of the border (Mahalanobis distance), and, where it is shown,
    as a negative, as Fashion-MNIST was made. About four in five hats come out well.
    """
    border = torch.ones(photos.shape[-2:], dtype=torch.bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    around = photos[:, :, border]  # (N, 3, M)
    middle = around.median(2, keepdim=True).values
    spread = (around - middle) @ (around - middle).transpose(1, 2) / around.shape[2] + 0.0015 * torch.eye(3)
    away = photos.flatten(2) - middle  # (N, 3, H W)
    distance = (away * torch.linalg.solve(spread, away)).sum(1).sqrt().unflatten(1, photos.shape[-2:])[:, None]
    padded = torch.nn.functional.pad(distance, (1, 1, 1, 1), mode="replicate")
    shown = levels(torch.nn.functional.avg_pool2d(padded, 3, 1), 0.3, 0.8)
    return shown * (1 - 0.6 * photos.mean(1, keepdim=True))


def levels(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` (N, 1, H, W) with two quantiles of each image at 0 and 1, clipped there."""
    flat = x.flatten(1)
    bottom, top = (flat.quantile(share, 1)[:, None, None, None] for share in (low, high))
    return ((x - bottom) / (top - bottom).clamp(min=1e-6)).clamp(0, 1)


# ------------------------------------------------------------------ files


def _photos(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Photos of a packed set, scaled to 28 x 28: (N, 3, 28, 28) in [0, 1], and labels (N,) int64."""
    folder = folder_of(name, "train.npz")
    files = sorted(folder.glob(f"{split}*.npz"))
    if not files:
        raise ValueError(f"{DATA}={folder.parent} holds no {name}/{split}*.npz")
    images, labels = [], []
    for file in files:
        with np.load(file) as packed:
            images += _decoded(packed["jpeg"], packed["offsets"])
            labels.append(packed["labels"].astype(np.int64))
    return torch.stack(images), torch.from_numpy(np.concatenate(labels))


def _decoded(jpeg: np.ndarray, offsets: np.ndarray) -> list[Tensor]:
    parts = (jpeg[a:b].tobytes() for a, b in pairwise(offsets))
    pictures = (np.array(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts)
    return [resize(torch.from_numpy(x).permute(2, 0, 1), (SIZE, SIZE)).float() / 255 for x in pictures]


def _as_pixels(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def write(out: Path) -> list[Path]:
    """Write both sets below a folder; the files."""
    kept = {f"sign_digits28/{split}.npz": signs(split) for split in ("train", "val")}
    for split in ("train", "test"):
        images = hats(split)
        kept[f"hats28/{split}.npz"] = Set(images, torch.zeros(len(images), dtype=torch.long))
    for name, (images, labels) in kept.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / name, images=images[:, 0].numpy(), labels=labels.numpy())
    return [out / name for name in kept]


def main() -> None:
    from benchmarks.common import show

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for file in write(parser.parse_args().out):
        show(str(file))


if __name__ == "__main__":
    main()
