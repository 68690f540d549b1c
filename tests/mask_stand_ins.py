"""Stand-ins of data with masks, and of torchvision's sets, each in the layout that a recipe reads.

A stand-in is ``(arguments of the data module, folder, side, channels) -> root``.
"""

import io
import pickle

import numpy as np
from PIL import Image

ITEMS = 6  # of a split
STORED = (0, 91, 181, 255)  # ids of COCO-Stuff: the first, one behind gaps, the last, and unlabelled


def pixels(n, side, channels, seed=0):
    """uint8 (n, side, side, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def picked(n, side, ids, seed=1):
    """uint8 (n, side, side) with each of ``ids`` somewhere."""
    masks = np.random.default_rng(seed).choice(np.asarray(ids, np.uint8), (n, side, side))
    masks[0].flat[: len(ids)] = ids
    return masks


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def masks_of(arguments, n, side):
    """Arrays of masks, and the table that the recipe names, as `data.Arrays` reads them; empty without masks."""
    if arguments.get("mask_classes") is None:
        return {}
    count, table = len(arguments["mask_classes"]), arguments.get("mask_ids")
    stored = table if isinstance(table, list) else range(count)
    arrays = {"masks": picked(n, side, range(min(len(stored), side * side)))}
    return {**arrays, table: np.arange(count, dtype=np.uint8)} if isinstance(table, str) else arrays


def packed(images):
    """Images (N, H, W, C) as JPEG files end to end, and where each begins."""
    files = []
    for image in images:
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return np.concatenate(files), np.cumsum([0, *map(len, files)])


def faces(arguments, folder, side, channels):
    """CelebAMask-HQ: images twice as large as masks, a file for each part, and CelebA's numbers for the division."""
    for number, image in enumerate(pixels(2 * ITEMS, 2 * side, channels)):
        save(folder / f"CelebA-HQ-img/{number}.jpg", image)
        for part in ("skin", "l_eye"):
            covered = 255 * picked(1, side, (0, 1), seed=number)[0]
            save(folder / f"CelebAMask-HQ-mask-anno/0/{number:05d}_{part}.png", covered)
    originals = [i if i < ITEMS else 170_000 + i for i in range(2 * ITEMS)]  # train, then validation
    rows = "".join(f"{i} {original} {original + 1:06d}.jpg\n" for i, original in enumerate(originals))
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx orig_file\n" + rows)
    return folder


def coco(arguments, folder, side, channels):
    """COCO-Stuff: pictures wider than high, with ids as they are stored."""
    for split in ("train2017", "val2017"):
        images, masks = pixels(ITEMS, 2 * side, channels), picked(ITEMS, 2 * side, STORED)
        for number, (image, mask) in enumerate(zip(images[:, :side], masks[:, :side], strict=True)):
            save(folder / f"images/{split}/{number:012d}.jpg", image)
            save(folder / f"stuffthingmaps/{split}/{number:012d}.png", mask)
    return folder


def mnist(arguments, folder, side, channels):
    """The idx files of MNIST."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(_idx(pixels(ITEMS, 28, 1)[..., 0]))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx(np.arange(ITEMS, dtype=np.uint8)))
    return folder


def _idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.tobytes()


def cifar10(arguments, folder, side, channels):
    """The pickled batches of CIFAR-10; see `unchecked_cifar10`."""
    images = pixels(ITEMS, 32, 3).transpose(0, 3, 1, 2).reshape(ITEMS, -1)
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch"):
        (place / name).write_bytes(pickle.dumps({"data": images, "labels": list(range(ITEMS))}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return folder


def unchecked_cifar10(monkeypatch):
    """Lets torchvision read the stand-in of CIFAR-10, whose checksums are not the published ones."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
