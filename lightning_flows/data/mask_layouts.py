"""Well-known data sets of pictures with masks, in the folders in which they are published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_flows.codecs.semantic import IGNORE
from lightning_flows.data.folders import pictures
from lightning_flows.data.mask_ids import MaskIds
from lightning_flows.data.mask_names import ADE20K as ADE20K_NAMES
from lightning_flows.data.mask_names import CELEBAMASK_HQ, CITYSCAPES, COCO_STUFF
from lightning_flows.data.masks import PairedFolder
from lightning_flows.data.transforms import read_picture

COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of the list of 182, counted from 1: no picture has them
COCO_KEPT = [number - 1 for number in range(1, 183) if number not in COCO_GAPS]
COCO_IDS = {str(stored): new for new, stored in enumerate(COCO_KEPT)}
CITYSCAPES_KEPT = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids of the classes
CITYSCAPES_IDS = [CITYSCAPES_KEPT.index(label) if label in CITYSCAPES_KEPT else IGNORE for label in range(34)]
ADE20K_IDS = [IGNORE, *range(150)]

Split = Literal["train", "val", "test"]


class SplitFolders(PairedFolder):
    """Base of the layouts that have a folder of images and one of masks for each split, and no test masks.

    Args:
        root: folder of the data set.
        channels: 1, 3 or 4; image files are converted.
        test_split: the split that ``test`` and ``predict`` read; the masks of the test are not public.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no training images, or an image without its mask.
        ValueError: image and mask of different sizes, or an id that is not known; names the file.
    """

    folders: ClassVar[dict[str, tuple[str, str]]]  # of the images and of the masks, by split

    def __init__(self, root: str, *, channels: int | None = 3, test_split: Split = "val", **kwargs: Any) -> None:
        super().__init__(root, channels=channels, test_split=test_split, **kwargs)

    def places(self, split: str) -> tuple[Path, Path] | None:
        """See `PairedFolder.places`."""
        self.require_root()
        if split not in self.folders:
            return None
        images, masks = (self.root / name for name in self.folders[split])
        return (images, masks) if split == "train" or images.is_dir() else None


class COCOStuff(SplitFolders):
    """COCO-Stuff 2017 (Caesar, Uijlings, Ferrari, 2018): 171 classes in photographs, "thing and stuff" masks.

    The stored ids run to 181 with 11 gaps; here they are 0..170 in the same order, and 255 stays unlabelled.
    See `SplitFolders` for the arguments.
    """

    layout = """\
    {root}/images/train2017/000000000009.jpg          (and val2017)
    {root}/stuffthingmaps/train2017/000000000009.png  (and val2017)"""
    names = COCO_STUFF
    folders: ClassVar = {s: (f"images/{s}2017", f"stuffthingmaps/{s}2017") for s in ("train", "val")}

    def reader(self) -> MaskIds:
        """See `PairedFolder.reader`."""
        return MaskIds(COCO_IDS)


class ADE20K(SplitFolders):
    """The scene parsing benchmark on ADE20K (Zhou et al., 2017): 150 classes in photographs of scenes.

    The stored id 0 is unlabelled (here 255), class k is stored as k + 1. See `SplitFolders` for the arguments.
    """

    layout = """\
    {root}/images/training/ADE_train_00000001.jpg       (and validation; root is ADEChallengeData2016)
    {root}/annotations/training/ADE_train_00000001.png  (and validation)"""
    names = ADE20K_NAMES
    folders: ClassVar = {
        "train": ("images/training", "annotations/training"),
        "val": ("images/validation", "annotations/validation"),
    }

    def reader(self) -> MaskIds:
        """See `PairedFolder.reader`."""
        return MaskIds(ADE20K_IDS)


class Cityscapes(SplitFolders):
    """Cityscapes (Cordts et al., 2016): streets of 50 cities, the 19 classes that are scored, the rest unlabelled.

    Args:
        root: folder with ``leftImg8bit`` and ``gtFine``.
        stored: which files to read: ``"ids"``, the 34 ids of ``*_gtFine_labelIds.png`` (as published), or
            ``"train_ids"``, ``*_gtFine_labelTrainIds.png`` (as the authors' script makes them).
        channels: 1, 3 or 4; image files are converted.
        test_split: the split that ``test`` and ``predict`` read; the published masks of the test are empty.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no training images, or an image without its mask.
        ValueError: image and mask of different sizes, or an id that is not known; names the file.
    """

    layout = """\
    {root}/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png    (and val)
    {root}/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png     (or labelTrainIds; and val)"""
    names = CITYSCAPES
    folders: ClassVar = {s: (f"leftImg8bit/{s}", f"gtFine/{s}") for s in ("train", "val")}

    def __init__(
        self,
        root: str,
        *,
        stored: Literal["ids", "train_ids"] = "ids",
        channels: int | None = 3,
        test_split: Split = "val",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, channels=channels, test_split=test_split, **kwargs)
        if stored not in ("ids", "train_ids"):
            raise ValueError(f"stored must be 'ids' or 'train_ids', got {stored!r}")
        self.stored = stored

    def mask_of(self, image: Path) -> Path:
        """See `PairedFolder.mask_of`."""
        kind = "labelIds" if self.stored == "ids" else "labelTrainIds"
        return image.with_name(f"{image.name.removesuffix('_leftImg8bit')}_gtFine_{kind}")

    def reader(self) -> MaskIds:
        """See `PairedFolder.reader`."""
        return MaskIds(CITYSCAPES_IDS) if self.stored == "ids" else MaskIds(num_classes=len(CITYSCAPES))


class CelebAMaskHQ(PairedFolder):
    """CelebAMask-HQ (Lee, Liu, Wu, Luo, 2020): 30,000 faces of 1024 pixels, masks of 512 pixels, 19 classes.

    A mask comes in up to 18 files, one for each part of the face; they are painted one over the other in the authors'
    order (`mask_names.CELEBAMASK_HQ`) when an item is read. What no part covers is 0, background.

    Args:
        root: folder with ``CelebA-HQ-img`` and ``CelebAMask-HQ-mask-anno``.
        merged: folder in root with masks that were merged before, ``0.png`` with the ids 0..18 (quicker to read); None
            merges the parts.
        partition: ``"celeba"`` divides as CelebA itself by ``CelebA-HQ-to-CelebA-mapping.txt`` (24,183 / 2,993 /
            2,824 faces); None makes all of it training items: set some aside with ``val_fraction``.
        size: side or (height, width): images and masks differ in size, both are scaled to cover it.
        channels: 1, 3 or 4; image files are converted.
        **kwargs: see `FlowDataModule`.

    Raises:
        FileNotFoundError: no root, no images, an image without its mask, or no mapping; names the file.
        ValueError: a size of None, image and mask of different shapes, an unknown part or id, an image that the
            mapping lacks; names the file.
    """

    layout = """\
    {root}/CelebA-HQ-img/0.jpg
    {root}/CelebAMask-HQ-mask-anno/0/00000_skin.png     (a file a part; or root/MERGED/0.png with class ids)
    {root}/CelebA-HQ-to-CelebA-mapping.txt              (for partition: celeba)"""
    names = CELEBAMASK_HQ
    sizes_may_differ = True

    def __init__(
        self,
        root: str,
        *,
        merged: str | None = None,
        partition: Literal["celeba"] | None = None,
        size: int | tuple[int, int] = 512,
        channels: int | None = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size=None if kwargs.get("buckets") else size, channels=channels, **kwargs)
        if partition not in ("celeba", None):
            raise ValueError(f"partition must be 'celeba' or None, got {partition!r}")
        if self.size is None and self.buckets is None:
            raise ValueError("size is needed: images of CelebAMask-HQ are larger than their masks, got None")
        self.merged, self.partition = merged, partition

    def places(self, split: str) -> tuple[Path, Path] | None:
        """See `PairedFolder.places`."""
        self.require_root()
        if split != "train" and self.partition is None:
            return None
        return self.root / "CelebA-HQ-img", self.root / (self.merged or "CelebAMask-HQ-mask-anno")

    def images(self, split: str, folder: Path) -> list[Path]:
        """Image files of a split, by their number."""
        found = pictures(folder)
        if odd := [path for path in found if not path.stem.isdecimal()]:
            raise ValueError(f"image {odd[0]} must have a number for its name; expected\n{self.expected()}")
        found.sort(key=lambda path: int(path.stem))
        if self.partition is None:
            return found
        split_of = celeba_splits(self.root / "CelebA-HQ-to-CelebA-mapping.txt")
        if lost := [path for path in found if int(path.stem) not in split_of]:
            raise ValueError(f"image {lost[0]} is not in {self.root / 'CelebA-HQ-to-CelebA-mapping.txt'}")
        return [path for path in found if split_of[int(path.stem)] == split]

    def masks(self, images: Sequence[Path], images_at: Path, masks_at: Path) -> list[Path]:
        """The merged mask of each image, or where its parts lie without ``_PART.png``; see `PairedFolder.masks`."""
        if self.merged is not None:
            return super().masks(images, images_at, masks_at)
        parts = list(masks_at.glob("*/?????_*.png"))
        if unknown := [path for path in parts if path.stem[6:] not in CELEBAMASK_HQ[1:]]:
            raise ValueError(f"mask {unknown[0]} is of no known part; parts are {list(CELEBAMASK_HQ[1:])}")
        numbers = [int(path.stem) for path in images]
        wanted = [masks_at / str(number // 2000) / f"{number:05d}" for number in numbers]
        have = {(path.parent.name, path.name[:5]) for path in parts}
        if missing := [path for path in wanted if (path.parent.name, path.name) not in have]:
            raise FileNotFoundError(f"{missing[0]}_*.png does not exist ({len(missing)} images without)")
        return wanted

    def reader(self) -> Callable[[Path], Tensor]:
        """See `PairedFolder.reader`."""
        return merged_parts if self.merged is None else MaskIds(num_classes=len(CELEBAMASK_HQ))


def merged_parts(path: Path) -> Tensor:
    """One mask from the files of the parts of a face, those that there are, uint8, (H, W).

    Args:
        path: of the files without ``_PART.png``.

    Raises:
        FileNotFoundError: there is no part at all.
        ValueError: a broken file, or parts of different sizes; names the file.
    """
    mask: np.ndarray | None = None
    for place, part in enumerate(CELEBAMASK_HQ[1:], 1):
        file = path.with_name(f"{path.name}_{part}.png")
        if not file.is_file():
            continue
        covered = np.asarray(read_picture(file).convert("L")) > 0  # (H, W)
        mask = np.zeros(covered.shape, np.uint8) if mask is None else mask
        if covered.shape != mask.shape:
            raise ValueError(f"mask {file} and the other parts differ in size: {covered.shape} and {mask.shape}")
        mask[covered] = place
    if mask is None:
        raise FileNotFoundError(f"mask {path}_*.png does not exist")
    return torch.from_numpy(mask)


def celeba_splits(path: Path) -> dict[int, str]:
    """The split of each face of CelebA-HQ: that of its original in CelebA, whose number is in the second column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that does not begin with two numbers; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but partition='celeba' asks for it")
    splits: dict[int, str] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):  # line 1 names the columns
        words = line.split()
        if len(words) < 2 or not (words[0].isdecimal() and words[1].isdecimal()):
            raise ValueError(f"{path}:{place} must begin with two numbers, is {line!r}")
        number, original = int(words[0]), int(words[1])
        splits[number] = "train" if original < 162_771 else "val" if original < 182_638 else "test"
    return splits
