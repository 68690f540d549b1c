"""From a picture on disk to a float tensor in [-1, 1]; a mask moves along with its image.

Randomness comes from a generator that the caller gives, and every random choice draws the same numbers
whether or not it is switched on: turning flips on does not move the crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Size = int | tuple[int, int]
Scaling = Literal["bicubic", "adm"]


def height_width(size: Size | None) -> tuple[int, int] | None:
    """``size`` as (height, width).

    Raises:
        ValueError: sides that are not positive.
    """
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be a side or (height, width) in pixels, at least 1, got {size!r}")
    return int(sides[0]), int(sides[1])


def read_picture(path: str | Path) -> Image.Image:
    """The decoded picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as a picture; both name the file.
    """
    try:
        return picture_of(path, str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None


def picture_of(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """The decoded picture of a file, or of bytes out of an archive, which ``name`` tells in errors.

    Raises:
        ValueError: it cannot be read as a picture.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {name} cannot be read: {error}") from error


def picture_size(file: str | Path | IO[bytes], name: str) -> tuple[int, int]:
    """(height, width) of a picture from its header: nothing is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a picture; both name it.
    """
    try:
        with Image.open(file) as picture:
            return picture.height, picture.width
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {name} cannot be read: {error}") from error


def convert_channels(picture: Image.Image, channels: int | None, background: int = 255) -> Image.Image:
    """Grey (1), RGB (3) or RGBA (4) version of a picture.

    Transparent pictures are laid on a background of one grey level before they lose their alpha (the colour
    under transparent pixels means nothing); 16-bit grey is scaled to 8 bits.

    Args:
        picture: any mode that Pillow reads.
        channels: 1, 3, 4, or None to keep what the file has.
        background: grey level 0..255 under transparent pixels.
    """
    if channels is not None and channels not in MODES:
        raise ValueError(f"channels must be 1 (grey), 3 (RGB), 4 (RGBA) or None, got {channels!r}")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) // 257).astype(np.uint8))
    transparent = picture.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in picture.info
    mode = MODES[channels] if channels else _own_mode(picture, transparent)
    if transparent and mode != "RGBA":
        below = Image.new("RGBA", picture.size, (background, background, background, 255))
        picture = Image.alpha_composite(below, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _own_mode(picture: Image.Image, transparent: bool) -> str:
    if transparent:
        return "RGBA"
    return "L" if picture.mode in ("1", "L", "I", "F") else "RGB"


def read_image(path: str | Path, channels: int | None = 3, background: int = 255) -> Tensor:
    """Image file as uint8, shape (C, H, W); see `read_picture` and `convert_channels`."""
    return F.pil_to_tensor(convert_channels(read_picture(path), channels, background))


def read_mask(path: str | Path) -> Tensor:
    """Mask file (grey levels or palette indices are the class ids) as int64, shape (H, W).

    Raises:
        ValueError: the file has several channels, so that its values are colours and not ids; names the file.
    """
    ids = np.asarray(read_picture(path))
    if ids.ndim != 2:
        raise ValueError(f"mask {path} must have one channel (grey or palette) with class ids, got shape {ids.shape}")
    return torch.from_numpy(ids.astype(np.int64))


def to_signed(image: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape; float images are in [-1, 1] already and pass."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float()


def _covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape that covers ``size``."""
    ratio = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * ratio)), max(size[1], round(width * ratio))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image (C, H, W), scaled to cover ``size`` = (height, width), undistorted; antialiased bicubic."""
    target = _covering(*image.shape[-2:], size)
    if target == tuple(image.shape[-2:]):
        return image
    scaled = F.resize(image, list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return scaled if image.dtype == torch.uint8 else scaled.clamp(-1, 1)  # bicubic overshoots at edges


def resize_adm(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image (C, H, W) uint8, scaled to cover ``size`` as ADM, DiT and SiT prepare ImageNet.

    Halved by 2 x 2 means while the half still covers ``size``, the rest by bicubic interpolation: Pillow's
    filters, so that the pixels are those of the published runs.

    Raises:
        ValueError: a float image.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021).
    """
    if image.dtype != torch.uint8:
        raise ValueError(f"scaling='adm' needs images of 8 bits, got {image.dtype}: use scaling='bicubic'")
    picture = F.to_pil_image(image)
    while picture.height >= 2 * size[0] and picture.width >= 2 * size[1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    height, width = _covering(picture.height, picture.width, size)
    return F.pil_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask (H, W), scaled like `resize` with the nearest pixel: no new ids."""
    target = _covering(*mask.shape[-2:], size)
    if target == tuple(mask.shape[-2:]):
        return mask
    return F.resize(mask[None], list(target), interpolation=InterpolationMode.NEAREST_EXACT)[0]


@dataclass(frozen=True)
class ImageTransform:
    """Resizes the shorter side, crops, flips, scales to [-1, 1]; a mask takes the same way.

    Args:
        size: side, or (height, width); None keeps the size of the file.
        resize: side or (height, width) that the picture is scaled to cover before ``size`` is cropped from
            it, so that a random crop has room in square pictures too; None takes ``size``.
        crop: where the crop lies: ``"center"`` or ``"random"`` (the latter needs a generator, else center).
        flip: mirror left and right with probability 1/2 (needs a generator, else never).
        scaling: ``"bicubic"`` (antialiased), or ``"adm"`` (see `resize_adm`), with which a centre crop is that of
            the published ImageNet runs.

    Raises:
        ValueError: an unknown crop or scaling, a size that is not positive, or a resize below it.
    """

    size: Size | None = None
    resize: Size | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    scaling: Scaling = "bicubic"

    def __post_init__(self) -> None:
        size, scaled = height_width(self.size), height_width(self.resize)
        if scaled is not None and (size is None or scaled[0] < size[0] or scaled[1] < size[1]):
            raise ValueError(f"resize must be at least size={self.size} and needs it, got {self.resize}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got {self.crop!r}")
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {get_args(Scaling)}, got {self.scaling!r}")

    def __call__(self, item: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The item with ``image`` float32 (C, H, W) in [-1, 1] and, if it has one, ``mask`` int64 (H, W)."""
        top, left, mirror = self._draw(generator)
        item = dict(item)
        if (size := height_width(self.size)) is not None:
            cover = height_width(self.resize) or size
            scale = resize_adm if self.scaling == "adm" else resize
            if "image" in item:
                item["image"] = _crop(scale(item["image"], cover), size, top, left)
            if "mask" in item:
                item["mask"] = _crop(resize_mask(item["mask"], cover), size, top, left)
        if "mask" in item:
            item["mask"] = item["mask"].long()
        if mirror:
            item |= {name: item[name].flip(-1) for name in ("image", "mask") if name in item}
        if "image" in item:  # a request may have a mask alone
            item["image"] = to_signed(item["image"]).contiguous()
        return item

    def _draw(self, generator: torch.Generator | None) -> tuple[float, float, bool]:
        """Place of the crop in [0, 1]^2 and whether to mirror."""
        if generator is None:
            return 0.5, 0.5, False
        top, left, coin = torch.rand(3, generator=generator).tolist()
        if self.crop == "center":
            top = left = 0.5
        return top, left, self.flip and coin < 0.5


def _crop(image: Tensor, size: tuple[int, int], top: float, left: float) -> Tensor:
    """Cut of ``size`` whose corner lies at the fraction (top, left) of the room; the centre at 0.5."""
    y, x = (_corner(at, have - want) for at, have, want in zip((top, left), image.shape[-2:], size, strict=True))
    return image[..., y : y + size[0], x : x + size[1]]


def _corner(place: float, room: int) -> int:
    """One of the room + 1 places, all equally likely; the centre, rounded down, at 0.5."""
    return room // 2 if place == 0.5 else min(int(place * (room + 1)), room)
