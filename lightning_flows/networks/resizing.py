r"""Weights for other sizes: patches, channels, classes and grids of a network that was trained with others.

What becomes of one tensor. Which tensor is meant, a network says by its rules; see `resize_rules`.

Patches. Let :math:`B` be the matrix that resizes a flat patch of p x p pixels to one of q x q (bilinear). Then

.. math:: w' = (B^\top)^+ w, \qquad o' = B\, o

for the kernel of a patch embedding and for the output of a last layer: enlarged patches have the tokens that they had,
:math:`\langle w', B x\rangle = \langle w, x\rangle`, and give enlarged outputs. For smaller patches the kernel is the
least-squares fit over white images, and outputs are averaged over the new pixels.

Channels. From and to one channel (grey and colour), all channels share: a grey picture has the tokens that it had, and
every channel is given the mean of the old outputs. Further channels of several start at zero: they are neither read
nor written before they are trained. Dropping some of several channels is refused: nobody can say which.

References:
    FlexiViT: One Model for All Patch Sizes (Beyer, Izmailov, Kolesnikov, Caron, Kornblith, Zhai, Minderer,
    Tschannen, Alabdulmohsin, Pavetic, 2023): the kernel, by "pseudo-inverse resize".
    An Image is Worth 16x16 Words (Dosovitskiy et al., 2021), section 3.2: position tables by interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flows.networks.resize_rules import SizeMismatch

# ------------------------------------------------------------------ patches


@dataclass(frozen=True)
class Patch:
    """A patch of ``size`` x ``size`` pixels of ``channels`` channels, in ``heads`` outputs.

    Attributes:
        size: side p.
        channels: C.
        heads: outputs of C channels each; the first one is the prediction.
    """

    size: int
    channels: int
    heads: int = 1


def resize_patch_kernel(weight: Tensor, *, old: Patch, new: Patch) -> Tensor:
    """The kernel of a patch embedding for other patches and channels (pseudo-inverse resize).

    Args:
        weight: shape (D, C, p, p).
        old: the patch that it was trained on.
        new: the patch that is wanted.

    Returns:
        Shape (D, C', q, q); ``weight`` itself where nothing changes.

    Raises:
        ValueError: a weight of another shape than ``old`` says, or fewer channels (see `channel_weights`).
    """
    _expect(weight, (len(weight), old.channels, old.size, old.size))
    if (old.size, old.channels) == (new.size, new.channels):
        return weight
    pixels = torch.linalg.pinv(bilinear_matrix(old.size, new.size).t())  # (q q, p p)
    channels = channel_weights(old.channels, new.channels, "input")  # (C', C)
    kernel = torch.einsum("qp,kc,dcp->dkq", pixels, channels, weight.double().flatten(2))
    return kernel.unflatten(-1, (new.size, new.size)).to(_at_least_float32(weight))


def resize_patch_rows(rows: Tensor, *, old: Patch, new: Patch) -> Tensor:
    """Rows of a last Linear, (row in patch, column in patch, head, channel), for other patches, channels and heads.

    Heads beyond those of ``new`` are dropped: the first one is the prediction. Further heads start at zero.

    Args:
        rows: its weight, shape (p p heads C, D), or its bias, shape (p p heads C,).
        old: the patch that it was trained on.
        new: the patch that is wanted.

    Returns:
        Shape (q q heads' C', D) or (q q heads' C',); ``rows`` itself where nothing changes.

    Raises:
        ValueError: rows of another number than ``old`` says, or fewer channels (see `channel_weights`).
    """
    _expect(rows, (old.size**2 * old.heads * old.channels, *rows.shape[1:]))
    if old == new:
        return rows
    pixels = bilinear_matrix(old.size, new.size)  # (q q, p p)
    channels = channel_weights(old.channels, new.channels, "output")  # (C', C)
    heads = torch.eye(new.heads, old.heads, dtype=torch.float64)
    values = rows.double().reshape(old.size**2, old.heads, old.channels, -1)
    made = torch.einsum("qp,gh,kc,phcd->qgkd", pixels, heads, channels, values)
    return made.reshape(-1, *rows.shape[1:]).to(_at_least_float32(rows))


def bilinear_matrix(old: int, new: int) -> Tensor:
    """The matrix B that resizes a flat patch of old x old pixels, float64, shape (new new, old old).

    Bilinear with pixel centres at halves; where the patch becomes smaller, over the area of the new pixel.
    """
    pictures = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    return F.interpolate(pictures, size=(new, new), mode="bilinear", antialias=True).flatten(1).t()


# ------------------------------------------------------------------ channels


def channel_weights(old: int, new: int, side: str) -> Tensor:
    """What every new channel takes of the old ones, float64, shape (new, old).

    Args:
        old: channels of the weights.
        new: channels that are wanted.
        side: ``"input"`` or ``"output"`` of a network: an input that is shared by n channels is divided by n.

    Raises:
        ValueError: fewer channels, but more than one.
    """
    if old != new and 1 in (old, new):
        return torch.full((new, old), 1 / (new if side == "input" else old), dtype=torch.float64)
    if new < old:
        raise ValueError(f"{old} channels cannot become {new}: which ones to drop is not known")
    return torch.eye(new, old, dtype=torch.float64)


def resize_input_channels(
    weight: Tensor, *, old: tuple[int, int], new: tuple[int, int], pixels: tuple[int, int] = (1, 1)
) -> Tensor:
    """The kernel of a first convolution for other channels; those of a map that is new start at zero.

    Args:
        weight: shape (D, (C + S) n, k, k): channels of the sample, then those of a map, each with the n pixels of a
            patch (as `torch.nn.PixelUnshuffle` writes them).
        old: (C, S) of the weights.
        new: (C', S') that are wanted.
        pixels: n of the weights and as it is wanted, which must be the same.

    Returns:
        Shape (D, (C' + S') n, k, k); ``weight`` itself where nothing changes.

    Raises:
        ValueError: a weight of another shape than ``old`` says, or fewer channels (see `channel_weights`).
    """
    _expect(weight, (len(weight), sum(old) * pixels[0], *weight.shape[2:]))
    _same_patches(pixels)
    if old == new:
        return weight
    if new[1] < old[1]:
        raise ValueError(f"{old[1]} channels of a map cannot become {new[1]}: which ones to drop is not known")
    sample = channel_weights(old[0], new[0], "input")
    mixing = torch.block_diag(sample, torch.eye(new[1], old[1], dtype=torch.float64))  # (C' + S', C + S)
    apart = weight.double().unflatten(1, (-1, pixels[0]))  # (D, C + S, n, k, k)
    return torch.einsum("kc,dc...->dk...", mixing, apart).flatten(1, 2).to(_at_least_float32(weight))


def resize_output_channels(
    rows: Tensor, *, old: tuple[int, int], new: tuple[int, int], pixels: tuple[int, int] = (1, 1)
) -> Tensor:
    """Weight or bias of a last convolution for other channels; outputs beyond the prediction start at zero.

    Args:
        rows: shape (outputs n, D, k, k) or (outputs n,), each output with the n pixels of a patch; the first C outputs
            are the prediction.
        old: (C, outputs) of the weights.
        new: (C', outputs') that are wanted. Outputs beyond C are kept where C stays, as far as there is room.
        pixels: n of the weights and as it is wanted, which must be the same.

    Returns:
        Shape (outputs' n, ...); ``rows`` itself where nothing changes.

    Raises:
        ValueError: rows of another number than ``old`` says, or fewer channels (see `channel_weights`).
    """
    _expect(rows, (old[1] * pixels[0], *rows.shape[1:]))
    _same_patches(pixels)
    if old == new:
        return rows
    sample = channel_weights(old[0], new[0], "output")
    rest = torch.zeros(new[1] - new[0], old[1] - old[0], dtype=torch.float64)
    if old[0] == new[0]:
        rest.fill_diagonal_(1)
    mixing = torch.block_diag(sample, rest)  # (outputs', outputs)
    apart = rows.double().unflatten(0, (-1, pixels[0]))  # (outputs, n, ...)
    return torch.einsum("kc,c...->k...", mixing, apart).flatten(0, 1).to(_at_least_float32(rows))


# ------------------------------------------------------------------ classes and places


def resize_label_table(table: Tensor, *, old: tuple[int, bool], new: tuple[int, bool]) -> Tensor:
    """A table of class embeddings for further classes, or with another row for "no label" (the last one).

    Classes keep their rows. A further class, and a row for "no label" that was not there, start at the mean of the old
    classes; a row for "no label" that is not wanted is dropped.

    Args:
        table: shape (classes [+ 1], D).
        old: (classes, whether a row for "no label" follows) of the weights.
        new: the same, as it is wanted.

    Returns:
        Shape (classes' [+ 1], D); ``table`` itself where nothing changes.

    Raises:
        ValueError: a table of another length than ``old`` says, or fewer classes.
    """
    _expect(table, (sum(old), *table.shape[1:]))
    if old == new:
        return table
    if new[0] < old[0]:
        raise ValueError(f"{old[0]} classes cannot become {new[0]}: which ones to drop is not known")
    values = table.to(_at_least_float32(table))
    classes = values[: old[0]]
    mean = classes.double().mean(0, keepdim=True).to(values.dtype)
    parts = [classes, mean.expand(new[0] - old[0], -1)]
    if new[1]:
        parts.append(values[old[0] :] if old[1] else mean)
    return torch.cat(parts)


def resize_position_table(table: Tensor, *, old: tuple[int, int], new: tuple[int, int], extra: int = 0) -> Tensor:
    """A learned table of places for another grid, by bicubic interpolation.

    Args:
        table: shape (1, extra + height width, D), rows first, or (1, D, height, width).
        old: (height, width) of the weights.
        new: (height, width) that is wanted.
        extra: tokens before the grid, which keep their rows.

    Returns:
        The table of the new grid in the same layout; ``table`` itself where nothing changes.

    Raises:
        ValueError: a table of another shape than ``old`` says.
    """
    flat = table.dim() == 3
    shape = (1, extra + old[0] * old[1], table.shape[-1]) if flat else (1, *table.shape[1:2], *old)
    _expect(table, shape)
    if old == new:
        return table
    values = table.to(_at_least_float32(table))
    grid = values[:, extra:].transpose(1, 2).unflatten(2, old) if flat else values  # (1, D, height, width)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([values[:, :extra], grid.flatten(2).transpose(1, 2)], dim=1) if flat else grid


def _expect(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise SizeMismatch(f"its shape {tuple(tensor.shape)} is not {shape}, which the config of the weights says")


def _same_patches(pixels: tuple[int, int]) -> None:
    if pixels[0] != pixels[1]:
        raise ValueError(f"patches of {pixels[0]} pixels cannot become patches of {pixels[1]}")


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)  # files may hold 16 bits
