"""Pictures of images above their reconstructions."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_flows.callbacks import ReconstructionGrid
from tests.callbacks.toy import Toy, data, trainer


class Half(Toy):
    """Gives images back at half their distance from black."""

    def reconstruct(self, x):
        assert not self.training
        return (x + 1) / 2 - 1


class Images(L.LightningDataModule):
    """Training data for the toy, and images to look at."""

    def __init__(self, key="image"):
        super().__init__()
        self.key = key

    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        x = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
        return DataLoader([{self.key: each} for each in x], batch_size=2)


def picture(tmp_path, **options):
    grid = ReconstructionGrid(every_n_epochs=None, **options)
    trainer(tmp_path, grid, max_steps=2, limit_val_batches=0).fit(Half(), datamodule=Images())
    (file,) = (tmp_path / "samples").iterdir()
    return np.asarray(Image.open(file).convert("L")).astype(float)


def test_rows_of_images_and_of_reconstructions_take_turns(tmp_path):
    shades = picture(tmp_path, n=5, nrow=3)
    assert shades.max() == 255
    tall, wide = shades.shape
    assert tall / 4 == pytest.approx(wide / 3, rel=0.2)  # four rows of three


def test_a_reconstruction_stands_below_its_image(tmp_path):
    shades = picture(tmp_path, n=4, nrow=4)
    middle = shades.shape[1] // 8 + np.arange(4) * (shades.shape[1] // 4)
    above, below = shades[shades.shape[0] // 4, middle], shades[3 * shades.shape[0] // 4, middle]
    assert np.allclose(below, above / 2, atol=2)
    assert above[3] > above[2] > above[1] > above[0]


def test_a_batch_without_images_is_named(tmp_path):
    grid = ReconstructionGrid(every_n_epochs=None)
    with pytest.raises(ValueError, match=r"no 'image', only \['latent'\]"):
        trainer(tmp_path, grid, max_steps=1, limit_val_batches=0).fit(Half(), datamodule=Images("latent"))
