"""The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels, 17 grey levels, no download."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_flows.data.base import FlowDataModule


class DigitItems(Dataset):
    """Images (1, 8, 8) float32 in [-1, 1] with their labels: grey level v of 0..16 becomes v / 8 - 1."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # here: slow to import, and nothing else needs it

        data = load_digits()
        self.images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8)
        self.labels = data.target.tolist()

    def __len__(self) -> int:
        """Number of digits: 1,797."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` and ``label``."""
        return {"image": self.images[index], "label": self.labels[index]}


class Digits(FlowDataModule):
    """Handwritten digits, 8 x 8 grey pixels, classes 0..9 (Alpaydin, Kaynak, 1998, in scikit-learn's copy).

    The set has no split of its own: by default a tenth each is set aside for validation and test
    (1,437 / 180 / 180 items), the same for every ``seed``.

    Args:
        val_fraction: part for validation.
        test_fraction: part for the test.
        **kwargs: see `FlowDataModule`.
    """

    levels = 17

    def __init__(self, *, val_fraction: float = 0.1, test_fraction: float = 0.1, **kwargs: Any) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        if self.channels not in (None, 1):
            raise ValueError(f"channels of Digits must be 1 or None (the digits are grey), got {self.channels}")

    def read(self, split: str) -> Dataset | None:
        """See `FlowDataModule.read`."""
        return DigitItems() if split == "train" else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(1, 8, 8), or (1, *size)."""
        return (1, *(self.size or (8, 8)))

    @property
    def classes(self) -> list[str]:
        """``"0"`` to ``"9"``."""
        return [str(digit) for digit in range(10)]
