"""Rows of images, masks, what is read and what is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from lightning_flows.callbacks import EMA, SymmetryGrid
from lightning_flows.codecs import JointSemantics, OneHot, RGBPalette
from lightning_flows.codecs.label_map import UNLABELLED, painted
from lightning_flows.flow import seeds_from
from tests.callbacks.toy import Toy, data, trainer
from tests.modules.pairs import LABELS, MASKS, batch, symmflow
from tests.modules.tiny import model

COLOURS = [[0, 0, 0], [250, 0, 0], [0, 250, 0]]


def items(n=6, without=()):
    every = {name: value for name, value in batch(n).items() if name not in without}
    return DataLoader([{name: value[i] for name, value in every.items()} for i in range(n)], batch_size=4)


def sheets(folder, made, loader=None, callbacks=(), **options):
    """The pictures of every sheet that a fit writes, see `cells`."""
    grid = SymmetryGrid(**options)
    run = trainer(folder, *callbacks, grid, max_steps=2)
    run.fit(made, loader or items(), items())
    found = {file.name: np.asarray(Image.open(file)) for file in sorted((folder / "samples").iterdir())}
    return {name: cells(sheet, grid.nrow) for name, sheet in found.items()}


def cells(sheet, columns, side=4):
    """Pictures of 4 x 4 pixels, which the sheet enlarges to 64: (rows, columns, 4, 4, 3)."""
    large, gap = 64, 2
    rows = (sheet.shape[0] - gap) // (large + gap)
    assert sheet.shape == (rows * (large + gap) + gap, columns * (large + gap) + gap, 3)
    cut = [
        [sheet[gap + r * 66 : gap + r * 66 + 64, gap + c * 66 : gap + c * 66 + 64] for c in range(columns)]
        for r in range(rows)
    ]
    return np.array(cut)[:, :, 8 :: large // side, 8 :: large // side]


def pixels(images):
    """What a sheet shows of images (n, C, H, W): (n, H, W, 3)."""
    shown = ((images.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1)
    return shown.movedim(1, -1).numpy()


def test_a_row_shows_image_mask_reading_and_drawing(tmp_path):
    made = symmflow(JointSemantics([RGBPalette(COLOURS), OneHot(LABELS, per="image")]))
    (sheet,) = sheets(tmp_path, made, n=5, seed=3, every_n_epochs=None).values()
    truth, seeds = batch(6), seeds_from(3, 5)
    first = {name: value[:5] for name, value in truth.items()}
    read = made.read(first["image"], seeds=seeds).decoded["mask"].labels
    drawn = made.sample(made.condition_of(first), seeds=seeds)
    assert sheet.shape[:2] == (5, 4)
    assert np.array_equal(sheet[:, 0], pixels(first["image"]))
    assert np.array_equal(sheet[:, 1], np.array(COLOURS)[first["mask"].numpy()])
    assert np.array_equal(sheet[:, 2], np.array(COLOURS)[read.numpy()])
    assert np.abs(sheet[:, 3] - pixels(drawn)).max() <= 1


def test_items_are_spread_over_the_data_and_are_the_first_of_a_stream(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(items(7).dataset)

    truth = pixels(batch(7)["image"])
    for name, loader, places in (("rows", items(7), [0, 2, 4]), ("stream", DataLoader(Stream(), 4), [0, 1, 2])):
        grid = SymmetryGrid(n=3, every_n_epochs=None)
        trainer(tmp_path / name, grid, max_steps=2).fit(symmflow(), items(), loader)
        (file,) = (tmp_path / name / "samples").iterdir()
        assert np.array_equal(cells(np.asarray(Image.open(file)), 4)[:, 0], truth[places])


def test_without_masks_a_row_shows_image_and_drawing(tmp_path):
    made = symmflow(OneHot(LABELS, per="image"))
    (sheet,) = sheets(tmp_path, made, n=3, every_n_epochs=None).values()
    shown = {name: value[::2] for name, value in batch(6).items()}
    assert sheet.shape[:2] == (3, 2)
    assert np.array_equal(sheet[:, 0], pixels(shown["image"]))
    assert np.abs(sheet[:, 1] - pixels(made.sample(made.condition_of(shown), seeds=seeds_from(0, 3)))).max() <= 1


def test_looks_are_taken_when_sample_grid_takes_them_and_with_the_average(tmp_path):
    made = symmflow(OneHot(MASKS))
    found = sheets(tmp_path, made, callbacks=[EMA(0.9, warmup=False)], n=2, every_n_steps=1, every_n_epochs=None)
    assert list(found) == ["step-000001.png", "step-000002.png"]
    assert np.array_equal(found["step-000001.png"][:, :2], found["step-000002.png"][:, :2])  # the same items
    shown = {name: value[::3] for name, value in batch(6).items()}
    drawn = made.sample(made.condition_of(shown), seeds=seeds_from(0, 2))  # after the fit, the module holds the average
    assert np.abs(found["step-000002.png"][:, 3] - pixels(drawn)).max() <= 1


def test_fewer_items_than_asked_for_are_shown(tmp_path):
    (sheet,) = sheets(tmp_path, symmflow(OneHot(MASKS)), n=20, every_n_epochs=None).values()
    assert len(sheet) == 6


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SymmetryGrid: Toy reads no masks or labels: use SampleGrid"):
        trainer(tmp_path, SymmetryGrid(), max_steps=1).fit(Toy(), data())
    with pytest.raises(ValueError, match="LatentFlowMatching reads no masks"):
        trainer(tmp_path, SymmetryGrid(), max_steps=1).fit(model(), items())


@pytest.mark.parametrize(
    ("options", "message"), [({"n": 0}, "n must be at least 1"), ({"filename": "x.png"}, "filename must contain")]
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SymmetryGrid(**options)


def test_data_without_items_is_named(tmp_path):
    grid = SymmetryGrid(every_n_epochs=None)
    with pytest.raises(ValueError, match=r"the batch has no \['mask', 'label'\]"):
        trainer(tmp_path, grid, max_steps=1).fit(symmflow(), items(), DataLoader([], 4))


def test_items_without_images_are_named(tmp_path):
    made = symmflow(OneHot(MASKS))
    run = trainer(tmp_path, SymmetryGrid(every_n_epochs=None), max_steps=1)
    with pytest.raises(ValueError, match=r"must hold 'image', got \['index', 'label', 'mask'\]"):
        run.fit(made, items(), items(without=("image",)))


def test_unlabelled_pixels_have_their_own_colour():
    found = painted(torch.tensor([[[0, 1], [2, 255]]]), [tuple(colour) for colour in COLOURS])
    assert found.shape == (1, 3, 2, 2)
    shown = pixels(found)[0]
    assert shown.tolist() == [[COLOURS[0], COLOURS[1]], [COLOURS[2], list(UNLABELLED)]]
