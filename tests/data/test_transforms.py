"""Pictures become tensors in [-1, 1]; a mask moves with its image and gets no new ids."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.data import ImageTransform
from lightning_flows.data.transforms import convert_channels, read_image, read_mask, resize, to_signed


def picture(mode, size=(6, 4)):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_grey_rgb_or_rgba(tmp_path, mode, channels):
    base = picture("RGBA" if mode in ("LA", "RGBA") else "RGB")
    suffix = "tif" if mode == "CMYK" else "png"
    base.convert(mode).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}", channels)
    assert image.shape == (channels, 4, 6)
    assert image.dtype == torch.uint8


def test_transparent_pixels_show_the_background_not_the_colour_below():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert convert_channels(clear, 3).getpixel((0, 0)) == (255, 255, 255)
    assert convert_channels(clear, 3, background=0).getpixel((0, 0)) == (0, 0, 0)
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert convert_channels(half, 3).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert convert_channels(half, None).mode == "RGBA"


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 1).flatten().tolist() == [0, 1, 128, 255]


def test_to_signed_reaches_both_ends():
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_signed(torch.tensor([0.25])).tolist() == [0.25]


@pytest.mark.parametrize(("size", "expected"), [(4, (4, 6)), ((8, 3), (8, 12)), ((2, 9), (6, 9))])
def test_resize_covers_the_size_and_keeps_the_shape(size, expected):
    image = torch.zeros(3, 6, 9, dtype=torch.uint8)
    assert resize(image, (size, size) if isinstance(size, int) else size).shape[1:] == expected


def test_resize_of_floats_stays_in_range():
    checks = torch.randint(0, 2, (1, 16, 16), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    assert resize(checks, (24, 24)).abs().max() <= 1


def grid(height, width):
    """An image whose first two channels are its coordinates, and the mask that numbers the pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {"image": torch.stack([y, x, y]).to(torch.uint8), "mask": y * width + x}


@pytest.mark.parametrize("seed", range(6))
def test_mask_goes_where_the_image_goes(seed):
    generator = torch.Generator().manual_seed(seed)
    transform = ImageTransform(size=(5, 4), resize=(7, 8), crop="random", flip=True)
    item = transform(grid(7, 8), generator)
    pixels = ((item["image"] + 1) * 127.5).round().long()
    assert item["image"].shape == (3, 5, 4)
    assert torch.equal(item["mask"], pixels[0] * 8 + pixels[1])


def test_random_crops_reach_every_place_and_flips_half_the_time():
    generator = torch.Generator().manual_seed(0)
    transform = ImageTransform(size=5, resize=7, crop="random", flip=True)
    corners = [tuple(transform(grid(7, 7), generator)["mask"][0, [0, -1]].tolist()) for _ in range(300)]
    places = {(min(pair) // 7, min(pair) % 7) for pair in corners}
    assert places == {(y, x) for y in range(3) for x in range(3)}
    assert 100 < sum(left > right for left, right in corners) < 200


def test_evaluation_crops_the_centre_and_never_flips():
    item = ImageTransform(size=3, resize=5, crop="random", flip=True)(grid(5, 5), None)
    assert item["mask"].tolist() == [[6, 7, 8], [11, 12, 13], [16, 17, 18]]


def test_switching_flips_on_does_not_move_the_crops():
    def crops(flip):
        transform = ImageTransform(size=3, resize=9, crop="random", flip=flip)
        return [transform(grid(9, 9), torch.Generator().manual_seed(s))["mask"].min().item() for s in range(9)]

    assert crops(True) == crops(False)


def test_scaled_mask_has_no_new_ids():
    mask = torch.randint(0, 2, (9, 9), generator=torch.Generator().manual_seed(0)) * 40
    item = ImageTransform(size=5)({"image": torch.zeros(3, 9, 9, dtype=torch.uint8), "mask": mask})
    assert set(item["mask"].unique().tolist()) <= {0, 40}
    assert item["mask"].dtype == torch.int64


def test_palette_mask_gives_its_indices_and_a_colour_mask_is_refused(tmp_path):
    mask = Image.fromarray(np.array([[0, 2], [1, 2]], np.uint8), "L").convert("P")
    mask.putdata([0, 2, 1, 2])
    mask.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0, 2], [1, 2]]
    picture("RGB").save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png must have one channel"):
        read_mask(tmp_path / "colour.png")


def test_broken_and_missing_images_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_image(tmp_path / "broken.png")
    picture("RGB", (64, 64)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:600])
    with pytest.raises(ValueError, match=r"half\.png cannot be read"):
        read_image(tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


def test_channels_must_be_known():
    with pytest.raises(ValueError, match="channels"):
        convert_channels(picture("RGB"), 2)


@pytest.mark.parametrize(("height", "width", "size"), [(97, 141, 16), (40, 33, 16), (31, 31, 16), (9, 7, 16)])
def test_adm_scaling_is_the_published_centre_crop(height, width, size):
    """Halve by boxes while the half covers, bicubic, centre: written out with Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    picture = picture.resize(tuple(round(side * ratio) for side in picture.size), Image.Resampling.BICUBIC)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    wanted = np.asarray(picture)[top : top + size, left : left + size]
    item = ImageTransform(size=size, scaling="adm")({"image": torch.from_numpy(pixels).permute(2, 0, 1)})
    assert torch.equal(item["image"], torch.from_numpy(wanted.copy()).permute(2, 0, 1).float() / 127.5 - 1)


def test_adm_scaling_moves_masks_along_and_needs_8_bits():
    with pytest.raises(ValueError, match="scaling must be one of"):
        ImageTransform(size=4, scaling="box")
    with pytest.raises(ValueError, match="scaling='adm' needs images of 8 bits"):
        ImageTransform(size=2, scaling="adm")({"image": torch.zeros(3, 8, 8)})
    mask = torch.arange(16).reshape(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    both = {"image": (mask * 10).to(torch.uint8)[None], "mask": mask}
    item = ImageTransform(size=4, scaling="adm")(both)
    assert torch.equal(((item["image"][0] + 1) * 12.75).round().long(), item["mask"])
