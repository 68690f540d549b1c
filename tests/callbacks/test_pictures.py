import pytest
import torch
from PIL import Image

from lightning_flows.callbacks.pictures import contact_sheet, to_image, write_png


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_choose_the_mode_and_ends_of_the_range_the_levels(channels, mode):
    sample = torch.tensor([-1.0, 0.0, 1.0, 7.0, float("nan")]).reshape(1, 1, 5).expand(channels, 2, 5)
    image = to_image(sample)
    assert (image.mode, image.size) == (mode, (5, 2))
    assert list(image.getchannel(0).tobytes())[:5] == [0, 128, 255, 255, 0]


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (1, 3, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="sample must have shape"):
        to_image(torch.zeros(shape))


def test_small_pictures_are_enlarged_by_a_whole_factor_and_kept_apart():
    black, white = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    sheet = contact_sheet([black, white, black], columns=2)
    assert sheet.size == (2 * (64 + 2) + 2, 2 * (64 + 2) + 2)
    assert [sheet.getpixel(p) for p in ((0, 0), (2, 2), (65, 65), (66, 10), (70, 10), (2, 68))] == [
        255,
        0,
        0,
        255,
        255,
        0,
    ]


def test_large_pictures_keep_their_size_and_unequal_kinds_meet_in_one_sheet():
    sheet = contact_sheet([Image.new("L", (100, 80)), Image.new("RGB", (64, 90), "red")], columns=5)
    assert sheet.size == (2 * 102 + 2, 90 + 4)
    assert sheet.getpixel((110, 10)) == (255, 0, 0, 255)
    assert sheet.getpixel((190, 10)) == (255, 255, 255, 255)


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    class Broken(Image.Image):
        def save(self, path, **_):
            path.write_bytes(b"half")
            raise OSError("disk full")

    path = tmp_path / "a.png"
    write_png(Image.new("L", (2, 2), 9), path)
    with pytest.raises(OSError, match="disk full"):
        write_png(Broken(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(path).getpixel((0, 0)) == 9


@pytest.mark.parametrize(("count", "columns"), [(0, 1), (1, 0)])
def test_empty_sheet_is_refused(count, columns):
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([Image.new("L", (2, 2))] * count, columns)
