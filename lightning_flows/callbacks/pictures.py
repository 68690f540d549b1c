"""Tensors in [-1, 1] to pictures on disk: 8-bit images, contact sheets, files that are never half written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lightning_flows.store.weights import whole_file

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SMALLEST_CELL = 64  # pixels: smaller pictures are enlarged on contact sheets
GAP = 2  # pixels of white between the pictures of a contact sheet


def to_image(sample: Tensor) -> Image.Image:
    """8-bit picture of one sample.

    Args:
        sample: image, shape (C, H, W) with C in {1, 3, 4}, values in [-1, 1]; what lies outside is clipped.

    Raises:
        ValueError: another shape.
    """
    if sample.ndim != 3 or sample.shape[0] not in MODES:
        raise ValueError(f"sample must have shape (C, H, W) with C in {sorted(MODES)}, got {tuple(sample.shape)}.")
    levels = (sample.detach().float().cpu().nan_to_num(nan=-1.0) + 1.0) * 127.5
    pixels = levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)  # (H, W, C)
    return Image.fromarray((pixels[..., 0] if sample.shape[0] == 1 else pixels).numpy())


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange pictures row by row with white between them; small ones are enlarged by a whole factor.

    Args:
        images: at least one picture; unequal sizes are placed at the top left of equal cells.
        columns: pictures per row.

    Raises:
        ValueError: no picture, or fewer than one column.
    """
    if not images or columns < 1:
        raise ValueError(f"images must not be empty and columns at least 1, got {len(images)} and {columns}.")
    columns = min(columns, len(images))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    factor = max(1, -(-SMALLEST_CELL // max(width, height)))
    cell = (width * factor + GAP, height * factor + GAP)
    mode = _common_mode(images)
    sheet = Image.new(mode, (columns * cell[0] + GAP, -(-len(images) // columns) * cell[1] + GAP), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        large = image.convert(mode).resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(large, (column * cell[0] + GAP, row * cell[1] + GAP))
    return sheet


def write_png(image: Image.Image, path: Path) -> Path:
    """Write under a temporary name beside `path`, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def _common_mode(images: Sequence[Image.Image]) -> str:
    modes = {image.mode for image in images}
    return modes.pop() if len(modes) == 1 else "RGBA"
