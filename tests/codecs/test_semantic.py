"""What holds for every semantic codec: it reads what it wrote, at any size, under any noise of its own."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch

from lightning_flows.codecs import (
    IGNORE,
    AnalogBits,
    ClassPlane,
    JointSemantics,
    LearnedColours,
    OneHot,
    RGBPalette,
    SemanticCodec,
)
from lightning_flows.flow.noise import SampleNoise, StepNoise, generator_of
from lightning_flows.store import build, config_of

MASKS = {
    "one-hot": lambda: OneHot(19, temperature=1.0),
    "one-hot-2": lambda: OneHot(2, temperature=0.5),
    "bits": lambda: AnalogBits(19),
    "bits-full": lambda: AnalogBits(8, temperature=1.0),
    "bits-255": lambda: AnalogBits(255),
    "celebamask": lambda: RGBPalette("celebamask-hq", beta=10.0),
    "coco": lambda: RGBPalette("coco-stuff", beta=6.0),
    "colours": lambda: RGBPalette([(0, 0, 0), (255, 0, 0), (0, 255, 0), (90, 90, 90)]),
    "learned": lambda: LearnedColours(19),
    "learned-2d": lambda: LearnedColours(7, channels=2, weight=1.0),
}
LABELS = {
    "plane": lambda: ClassPlane(10),
    "plane-2": lambda: ClassPlane(2, beta=1.0),
    "plane-1000": lambda: ClassPlane(1000, temperature=0.1),
    "one-hot": lambda: OneHot(10, per="image", temperature=2.0),
    "one-hot-300": lambda: OneHot(300, per="image", temperature=1.0),
    "bits": lambda: AnalogBits(10, per="image"),
    "learned": lambda: LearnedColours(10, per="image", channels=4),
}
every_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
every_label = pytest.mark.parametrize("make", LABELS.values(), ids=LABELS)
every_codec = pytest.mark.parametrize(
    "make", [*MASKS.values(), *LABELS.values()], ids=[f"mask-{n}" for n in MASKS] + [f"label-{n}" for n in LABELS]
)


def all_classes(codec, side=16):
    """Every class of a codec: in two masks, or as one label each."""
    (key,) = codec.keys
    count = codec.num_classes[key]
    if key == "label":
        return {"label": torch.arange(count)}
    return {"mask": (torch.arange(2 * side * side) % count).reshape(2, side, side)}


# ---- round trips


@every_codec
@pytest.mark.parametrize("noisy", [False, True])
def test_what_is_written_is_read(make, noisy):
    codec = make()
    (key,) = codec.keys
    fields = all_classes(codec)
    count = len(fields[key])
    y = codec.encode(fields, (16, 16), SampleNoise(range(count)) if noisy else None)
    assert y.shape == (count, codec.channels, 16, 16)
    assert y.dtype == torch.float32
    assert y.requires_grad is False
    labels, scores = codec.decode(y)[key]
    assert torch.equal(labels, fields[key])
    assert labels.dtype == torch.int64
    assert scores.dtype == torch.float32
    assert scores.shape == (count, codec.num_classes[key], *labels.shape[1:])
    torch.testing.assert_close(scores.sum(1), torch.ones(labels.shape))
    assert torch.equal(scores.argmax(1), labels)


@every_mask
def test_masks_of_blocks_survive_the_size_of_a_latent(make):
    codec = make()
    small = all_classes(codec, side=8)["mask"]
    mask = small.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (2, 32, 32)
    y = codec.encode({"mask": mask}, (8, 8), SampleNoise([0, 1]))
    assert y.shape == (2, codec.channels, 8, 8)
    assert torch.equal(codec.decode(y)["mask"].labels, small)
    torch.testing.assert_close(codec.encode({"mask": mask}, (8, 8)), codec.encode({"mask": small}, (8, 8)))


def test_a_mask_is_read_at_the_size_of_the_image():
    codec, mask = OneHot(3), torch.zeros(1, 32, 24, dtype=torch.long)
    mask[:, :, 12:], mask[:, 20:] = 1, 2
    y = codec.encode({"mask": mask}, (8, 6))
    labels, scores = codec.decode(y, (32, 24))["mask"]
    assert torch.equal(labels, mask)  # borders on the grid of the latent stay where they are
    assert scores.shape == (1, 3, 32, 24)


def test_planes_are_interpolated_between_the_centres_of_pixels():
    y = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).reshape(1, 2, 1, 2)  # class 0 beside class 1
    scores = OneHot(2).decode(y, (2, 4))["mask"].scores[0, 1]
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(2, 4), atol=2e-6, rtol=0)


def test_planes_of_a_smaller_size_are_means_over_areas():
    mask = torch.randint(0, 5, (2, 12, 8), generator=generator_of("mask"))
    y = OneHot(5).encode({"mask": mask}, (3, 2))
    share = torch.stack([(mask == k).float().reshape(2, 3, 4, 2, 4).mean((2, 4)) for k in range(5)], 1)
    torch.testing.assert_close(y, 2 * share - 1)
    uneven = OneHot(5).encode({"mask": mask[:, :8]}, (3, 3))  # 8 is no multiple of 3
    assert uneven.shape == (2, 5, 3, 3)
    torch.testing.assert_close(uneven.sum(1), torch.full((2, 3, 3), -3.0))


@every_label
def test_the_mean_of_the_planes_is_read(make):
    codec = make()
    fields = all_classes(codec)
    y = codec.encode(fields, (6, 4))
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    noise = torch.randn(y.shape, generator=generator_of("bumps"))
    noise = noise - noise.mean((2, 3), keepdim=True)  # large bumps that cancel
    assert torch.equal(codec.decode(y + noise, (99, 1))["label"].labels, fields["label"])


# ---- what is nobody's


@pytest.mark.parametrize("name", ["one-hot", "bits", "celebamask", "colours", "learned"])
def test_unlabelled_pixels_are_zero_and_count_as_such(name):
    codec = MASKS[name]()
    mask = torch.ones(1, 4, 4, dtype=torch.long)
    one = codec.encode({"mask": mask}, (4, 4))[0, :, 0, 0]
    mask[0, :2, :2] = IGNORE
    mask[0, 2, 2] = IGNORE
    y = codec.encode({"mask": mask}, (4, 4))
    assert (y[0, :, :2, :2] == 0).all()
    pooled = codec.encode({"mask": mask}, (2, 2))[0]
    torch.testing.assert_close(pooled[:, 1, 1], 0.75 * one)
    assert (pooled[:, 0, 0] == 0).all()


def test_unlabelled_pixels_of_coco_have_a_colour_and_a_class_of_their_own():
    codec = RGBPalette("coco-stuff")
    y = codec.encode({"mask": torch.tensor([[[IGNORE, 171, 170]]])}, (1, 3))
    assert ((y[0, :, 0].T + 1) * 127.5).round().tolist() == [[250] * 3, [250] * 3, [200, 200, 100]]
    assert codec.decode(y)["mask"].labels.tolist() == [[[171, 171, 170]]]


def test_255_is_an_ordinary_label():
    codec = OneHot(300, per="image")
    assert codec.decode(codec.encode({"label": torch.tensor([255])}, (1, 1)))["label"].labels.item() == 255


# ---- dequantisation


@pytest.mark.parametrize("make", [MASKS["celebamask"], LABELS["plane"]], ids=["palette", "plane"])
def test_the_noise_of_a_sample_depends_on_its_own_seed(make):
    codec = make()
    (key,) = codec.keys
    ids = torch.ones((3, 4, 4) if key == "mask" else (3,), dtype=torch.long)
    together = codec.encode({key: ids}, (4, 4), SampleNoise([5, 6, 7]))
    alone = codec.encode({key: ids[1:2]}, (4, 4), SampleNoise([6]))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    spread = together - codec.encode({key: ids}, (4, 4))
    assert spread.abs().max() <= codec.width / 2
    assert len(spread.unique()) > spread.numel() / 2  # every pixel and plane has its own


@pytest.mark.parametrize(
    ("codec", "width"), [(RGBPalette("celebamask-hq", beta=10.0), 10 / 127.5), (ClassPlane(10, beta=4.0), 2 / 9)]
)
def test_the_noise_is_uniform_of_the_published_width(codec, width):
    (key,) = codec.keys
    ids = torch.ones((1, 256, 256) if key == "mask" else (1,), dtype=torch.long)
    spread = codec.encode({key: ids}, (256, 256), StepNoise(0)) - codec.encode({key: ids}, (256, 256))
    assert spread.max() - spread.min() == pytest.approx(width, rel=0.01)
    assert spread.mean().item() == pytest.approx(0, abs=0.005 * width)
    assert spread.std().item() == pytest.approx(width / 12**0.5, rel=0.01)


def test_mask_label_and_image_do_not_share_their_noise():
    from lightning_flows.flow import dequantize

    parts = [RGBPalette("celebamask-hq"), ClassPlane(10)]
    fields = {"mask": torch.ones(1, 8, 8, dtype=torch.long), "label": torch.tensor([1])}
    noise = StepNoise(3)
    mask, label = (p.encode(fields, (8, 8), noise) - p.encode(fields, (8, 8)) for p in parts)
    image = dequantize(torch.zeros(1, 3, 8, 8), 256, noise)
    drawn = torch.stack([mask[0, 0].flatten(), label[0, 0].flatten(), image[0, 0].flatten()])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.4  # 64 numbers each


@pytest.mark.parametrize("name", ["one-hot", "bits", "learned"])
def test_other_codes_add_no_noise(name):
    codec = MASKS[name]()
    fields = all_classes(codec)
    assert torch.equal(codec.encode(fields, (16, 16), StepNoise(0)), codec.encode(fields, (16, 16)))


# ---- precision, devices and gradients


@every_codec
def test_planes_lie_where_the_fields_do(make):
    codec = make()
    fields = {key: ids.to("meta") for key, ids in all_classes(codec).items()}
    (count,) = {len(ids) for ids in fields.values()}
    y = codec.encode(fields, (8, 8), SampleNoise(range(count)))
    assert y.is_meta
    for decoded in codec.decode(y).values():
        assert decoded.labels.is_meta
        assert decoded.scores.is_meta


@every_codec
def test_autocast_changes_nothing(make):
    codec = make()
    fields = all_classes(codec)
    y = codec.encode(fields, (8, 8), StepNoise(1)) + 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = codec.encode(fields, (8, 8), StepNoise(1)) + 0.3
        inside = codec.decode(y)
    assert torch.equal(again, y)
    (key,) = codec.keys
    outside = codec.decode(y)[key]
    assert torch.equal(inside[key].scores, outside.scores)
    assert torch.equal(codec.decode(y.bfloat16())[key].scores, codec.decode(y.bfloat16().float())[key].scores)


@pytest.mark.parametrize("name", ["celebamask", "coco", "one-hot", "bits"])
def test_a_model_in_16_bits_keeps_exact_colours(name):
    codec = MASKS[name]()
    fields = all_classes(codec)
    assert torch.equal(MASKS[name]().bfloat16().encode(fields, (16, 16)), codec.encode(fields, (16, 16)))
    assert not list(codec.state_dict())


@every_codec
def test_scores_are_the_softmax_of_squared_distances(make):
    codec = make()
    (key,) = codec.keys
    size = (3, 3) if key == "mask" else (1, 1)
    y = torch.rand(2, codec.channels, *size, generator=generator_of("y")) * 1.6 - 0.8
    y.requires_grad_()
    distance = (y[:, None] - codec.table()[:, :, None, None]).square().sum(2)  # (B, K, h, w)
    wanted = (-distance / codec.temperature).softmax(1)
    _, scores = codec.decode(y)[key]
    torch.testing.assert_close(scores.reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), y)
    (expected,) = torch.autograd.grad(wanted[:, 0].sum(), y)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    assert expected.abs().max() > 0


# ---- configs and copies


@every_codec
def test_a_config_builds_the_same_codec(make):
    codec = make()
    again = build(config_of(codec), SemanticCodec)
    assert config_of(again) == config_of(codec)
    fields = all_classes(codec)
    y = codec.encode(fields, (8, 8), StepNoise(2))
    for other in (again, copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert torch.equal(other.encode(fields, (8, 8), StepNoise(2)), y)


@every_codec
def test_a_codec_of_the_meta_device_gets_its_numbers(make):
    codec = make()
    with torch.device("meta"):
        late = make()
    late.to_empty(device="cpu")
    late.load_state_dict(codec.state_dict())
    fields = all_classes(codec)
    assert torch.equal(late.encode(fields, (8, 8)), codec.encode(fields, (8, 8)))


# ---- errors


@dataclass
class Bad:
    call: object
    message: str


MASK = torch.zeros(2, 8, 8, dtype=torch.long)
BAD = {
    "missing": Bad(lambda: OneHot(3).encode({"label": MASK}, (8, 8)), r"fields must hold 'mask', got only \['label'\]"),
    "high": Bad(
        lambda: OneHot(3).encode({"mask": MASK + 3}, (8, 8)), r"'mask'\] holds 3, but allowed are 0 to 2 and 255"
    ),
    "negative": Bad(lambda: OneHot(3).encode({"mask": MASK - 1}, (8, 8)), "holds -1"),
    "label": Bad(
        lambda: ClassPlane(3).encode({"label": torch.tensor([0, 255])}, (1, 1)), "255, but allowed are 0 to 2$"
    ),
    "axes": Bad(lambda: OneHot(3).encode({"mask": MASK[0]}, (8, 8)), r"must be integers \(B, H, W\).*\(8, 8\)"),
    "dtype": Bad(lambda: OneHot(3).encode({"mask": MASK.float()}, (8, 8)), "float32"),
    "label axes": Bad(lambda: ClassPlane(3).encode({"label": MASK}, (8, 8)), r"must be integers \(B,\)"),
    "larger": Bad(lambda: OneHot(3).encode({"mask": MASK}, (16, 16)), r"size must be at most the mask's \(8, 8\)"),
    "aspect": Bad(lambda: OneHot(3).encode({"mask": MASK}, (4, 2)), r"of its aspect, got \(4, 2\)"),
    "smaller": Bad(lambda: OneHot(3).decode(torch.zeros(1, 3, 8, 8), (4, 4)), r"at least the planes' \(8, 8\)"),
    "other": Bad(lambda: OneHot(3).decode(torch.zeros(1, 3, 8, 8), (16, 8)), r"aspect, got \(16, 8\)"),
    "channels": Bad(
        lambda: OneHot(3).decode(torch.zeros(1, 4, 8, 8)), r"y must be .*\(B, 3, h, w\), got .*\(1, 4, 8, 8\)"
    ),
    "integers": Bad(lambda: OneHot(3).decode(torch.zeros(1, 3, 8, 8, dtype=torch.long)), "got torch.int64"),
    "learned": Bad(lambda: LearnedColours(3).extra_loss(torch.zeros(2, 4, 8, 8), {"mask": MASK}), "y must be"),
    "classes": Bad(lambda: OneHot(1), "num_classes must be at least 2, for masks at most 255, got 1"),
    "too many": Bad(lambda: AnalogBits(256), "for masks at most 255, got 256"),
    "plane": Bad(lambda: ClassPlane(1), "num_classes must be at least 2, got 1"),
    "per": Bad(lambda: OneHot(3, per="row"), "per must be 'pixel' or 'image', got 'row'"),
    "temperature": Bad(lambda: OneHot(3, temperature=0.0), "temperature=0.0"),
    "beta": Bad(lambda: ClassPlane(3, beta=0.0), "beta must be positive, got 0.0"),
    "palette beta": Bad(lambda: RGBPalette("coco-stuff", beta=-1.0), "beta must not be negative, got -1.0"),
    "palette": Bad(lambda: RGBPalette("coco"), r"palette must be one of \['celebamask-hq', 'coco-stuff'\].*'coco'"),
    "colour": Bad(lambda: RGBPalette([(0, 0, 0), (0, 0, 256)]), r"0\.\.255, got \(0, 0, 256\)"),
    "short": Bad(lambda: RGBPalette([(0, 0), (1, 1)]), r"three integers.*\(0, 0\)"),
    "twice": Bad(lambda: RGBPalette([(1, 2, 3), (0, 0, 0), (1, 2, 3)]), r"\(1, 2, 3\) more than once"),
    "one colour": Bad(lambda: RGBPalette([(1, 2, 3)]), "num_classes must be at least 2"),
    "line": Bad(lambda: LearnedColours(3, channels=1), "channels must be at least 2, got 1"),
    "weight": Bad(lambda: LearnedColours(3, weight=-1.0), "weight must not be negative, got -1.0"),
    "joint": Bad(lambda: JointSemantics([OneHot(3), AnalogBits(3)]), r"parts must be codecs of different fields"),
    "no part": Bad(lambda: JointSemantics([]), "parts must be codecs"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=bad.message):
        bad.call()


def test_small_integers_are_taken_as_they_lie_in_a_cache():
    mask = torch.tensor([[[0, 255], [2, 1]]], dtype=torch.uint8)
    assert torch.equal(OneHot(3).encode({"mask": mask}, (2, 2)), OneHot(3).encode({"mask": mask.long()}, (2, 2)))
