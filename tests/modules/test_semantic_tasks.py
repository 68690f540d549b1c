"""Reading, inversion and editing with a SymmFlow."""

import pytest
import torch

from lightning_flows.codecs import LearnedColours, OneHot
from lightning_flows.flow import ClassifierFree, DormandPrince, EulerMaruyama, Heun, Midpoint, SampleNoise
from lightning_flows.modules import reading as reading_module
from tests.modules.pairs import LABELS, MASKS, batch, gentle, symmflow

SEEDS = [21, 22, 23, 24, 25]


def masks(**options):
    return symmflow(OneHot(MASKS), **options)


def labels(**options):
    return symmflow(OneHot(LABELS, per="image"), **options)


# ------------------------------------------------------------------ reading


def test_one_step_back_from_the_image_and_noise():
    made, image = symmflow(), batch()["image"]
    found = made.read(image, seeds=SEEDS)
    noise = SampleNoise(SEEDS).normal("semantic", torch.empty(5, 7, 4, 4))
    with torch.no_grad():
        velocity = made.network(torch.cat([image, noise], 1), torch.ones(()), None)
    torch.testing.assert_close(found.code, noise - velocity[:, 1:])
    torch.testing.assert_close(found.noise, image - velocity[:, :1])
    decoded = made.semantic.decode(found.code)
    assert torch.equal(found.decoded["mask"].labels, decoded["mask"].labels)
    assert torch.equal(found.decoded["label"].scores, decoded["label"].scores)
    assert (found.nfe, found.uncertainty) == (1, None)


def test_each_image_is_read_by_its_own_seed():
    made, image = symmflow(), batch()["image"]
    whole = made.read(image, seeds=SEEDS, votes=2)
    alone = made.read(image[[3]], seeds=[SEEDS[3]], votes=2)
    torch.testing.assert_close(alone.code, whole.code[[3]])
    torch.testing.assert_close(alone.uncertainty["mask"], whole.uncertainty["mask"][[3]])
    assert torch.equal(made.read(image, seed=4).code, made.read(image, seed=4).code)
    assert not torch.allclose(made.read(image, seed=4).code, made.read(image, seed=5).code)


def test_votes_are_averaged_and_their_disagreement_is_told():
    made, image, told = symmflow(), batch()["image"], []
    found = made.read(image, seeds=SEEDS, votes=3, steps=2, progress=lambda k, n: told.append((k, n)))
    codes = [made._read_once(image, SampleNoise(SEEDS), vote, 2, None, None).x[:, 1:].detach() for vote in range(3)]
    assert torch.equal(found.code, codes[0])
    assert not any(torch.allclose(codes[i], codes[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    for name, shape in (("mask", (5, 4, 4)), ("label", (5,))):
        scores = torch.stack([made.semantic.decode(code)[name].scores for code in codes])
        torch.testing.assert_close(found.decoded[name].scores, scores.mean(0))
        assert torch.equal(found.decoded[name].labels, scores.mean(0).argmax(1))
        torch.testing.assert_close(found.uncertainty[name], scores.var(0, correction=0).sum(1), rtol=1e-3, atol=1e-6)
        assert found.uncertainty[name].shape == shape
        assert (found.uncertainty[name] >= 0).all()
        assert (found.uncertainty[name] < 1).all()
    assert found.nfe == 6
    assert told == [(k, 6) for k in range(1, 7)]


@pytest.mark.parametrize("votes", [1, 3])
def test_scores_of_masks_can_be_left_out(votes):
    made, image = symmflow(), batch()["image"]
    whole, bare = (made.read(image, votes=votes, scores=scores) for scores in (True, False))
    assert torch.equal(bare.decoded["mask"].labels, whole.decoded["mask"].labels)
    assert bare.decoded["mask"].scores.shape == (5, 0, 4, 4)
    torch.testing.assert_close(bare.decoded["label"], whole.decoded["label"])
    assert (bare.uncertainty is None) == (votes == 1)
    if votes > 1:
        torch.testing.assert_close(bare.uncertainty, whole.uncertainty)


def test_a_step_keeps_scores_of_masks_only_where_they_are_few(monkeypatch):
    made, data = symmflow(), batch()
    few = made.reported(made.read_batch(data, 0, "read"), data)
    assert few["mask_scores"].shape == (5, MASKS, 4, 4)
    monkeypatch.setattr(reading_module, "MOST_SCORES", 5 * MASKS * 16 - 1)
    many = made.reported(made.read_batch(data, 0, "read"), data)
    assert set(few) - set(many) == {"mask_scores"}
    assert torch.equal(few["segmented"], many["segmented"])
    assert torch.equal(few["class_scores"], many["class_scores"])


def test_segment_and_classify_are_parts_of_a_reading():
    made, image = symmflow(), batch()["image"]
    found = made.read(image, seed=3, votes=2)
    assert torch.equal(made.segment(image, seed=3, votes=2).scores, found.decoded["mask"].scores)
    assert torch.equal(made.classify(image, seed=3, votes=2).labels, found.decoded["label"].labels)
    assert made.segment(image).labels.shape == (5, 4, 4)
    assert made.classify(image).scores.shape == (5, LABELS)


def test_reading_leaves_no_trace():
    made, image = symmflow().train(), batch()["image"].requires_grad_()
    found = made.read(image)
    assert made.network.training
    assert not found.code.requires_grad
    assert not found.decoded["mask"].scores.requires_grad
    torch.testing.assert_close(found.code, symmflow().eval().read(image.detach()).code)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.read(x, votes=0), "votes must be at least 1, got 0"),
        (lambda m, x: m.read(x, steps=0), "steps must be"),
        (lambda m, x: m.read(x, seeds=[1, 2]), "the number of samples disagrees"),
        (lambda m, x: m.read(x, seed=1, seeds=SEEDS), "exclude each other"),
        (lambda m, x: m.read(x[..., :2]), r"have latents of shape \(1, 4, 2\), those of the model have \(1, 4, 4\)"),
        (lambda m, x: m.read(x, solver=EulerMaruyama()), "solver must be deterministic"),
        (lambda m, x: m.classify(x), r"reads \['mask'\] from images, and no label"),
        (lambda m, x: labels().segment(x), r"reads \['label'\] from images, and no mask"),
        (lambda m, x: m.draw_from(x, x), r"code must have shape \(5, 3, 4, 4\), got \(5, 1, 4, 4\)"),
        (lambda m, x: m.draw_from(x[..., :2], x), r"noise must have shape \(5, 1, 4, 4\)"),
        (lambda m, x: labels().edit(x, batch()["mask"]), r"needs a model of masks, this one knows \['label'\]"),
        (lambda m, x: m.edit(x, batch()["mask"][:, :2]), r"mask must have shape \(5, 4, 4\).*got \(5, 2, 4\)"),
        (lambda m, x: m.edit(x, batch()["mask"], x > 0), r"region must have shape \(5, 4, 4\)"),
        (lambda m, x: m.edit(x, batch()["mask"], grow=-1), "grow must not be negative, got -1"),
        (lambda m, x: m.edit(x, batch()["mask"], label=torch.zeros(5).long()), r"knows \['mask'\] alone"),
        (lambda m, x: m.edit(x, batch()["mask"], guidance=2.0), "guidance needs a model that was trained with"),
        (lambda m, x: m.edit(x, batch()["mask"] + MASKS), r"fields\['mask'\] holds"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(masks(), batch()["image"])


def test_a_trained_code_reads_as_well():
    made = symmflow(LearnedColours(MASKS))
    assert made.segment(batch()["image"]).labels.shape == (5, 4, 4)


# ------------------------------------------------------------------ inversion


@pytest.mark.parametrize(("solver", "order"), [(None, 1), (Midpoint(), 2), (Heun(), 2)])
def test_an_image_is_drawn_again_from_what_was_read(solver, order):
    """The error falls by the order of the solver."""
    made, image, errors = gentle(masks(solver=solver)), batch()["image"], []
    for steps in (16, 32):
        found = made.read(image, steps=steps, seeds=SEEDS)
        errors.append((made.draw_from(found.noise, found.code, steps=steps) - image).abs().max().item())
    assert errors[1] < 0.05
    assert errors[0] / errors[1] > 0.75 * 2**order


# ------------------------------------------------------------------ editing


def repainted(made, image, steps=3):
    """What is read, with another class in one corner, and where."""
    mask = made.read(image, steps=steps, seeds=SEEDS).decoded["mask"].labels
    region = torch.zeros_like(mask, dtype=torch.bool)
    region[:, :2, :2] = True
    return torch.where(region, (mask + 1) % MASKS, mask), region


@pytest.mark.parametrize("solver", [None, Midpoint(), DormandPrince()])
@pytest.mark.parametrize("label", [None, torch.arange(5) % LABELS])
def test_an_edit_changes_the_region_alone(solver, label):
    made, image = gentle(symmflow(solver=solver)), batch()["image"]
    mask, region = repainted(made, image)
    edited = made.edit(image, mask, seeds=SEEDS, grow=0, label=label)
    redrawn = region[:, None]
    assert torch.equal(edited[~redrawn], image[~redrawn])
    assert not torch.isclose(edited[redrawn], image[redrawn]).any()
    assert torch.equal(edited, made.edit(image, mask, region, seeds=SEEDS, grow=0, label=label))


def test_the_region_grows_by_pixels_of_the_state():
    made, image = gentle(masks()), batch()["image"]
    mask, _ = repainted(made, image)
    changed = made.edit(image, mask, seeds=SEEDS, grow=1) != image
    assert changed[:, :, :3, :3].all()
    assert not changed[:, :, 3].any()
    assert not changed[:, :, :, 3].any()
    assert (made.edit(image, mask, seeds=SEEDS) != image).all()  # 2 pixels by default


def test_a_mask_that_is_not_repainted_changes_nothing():
    made, image = masks(), batch()["image"]
    mask = made.read(image, steps=3, seeds=SEEDS).decoded["mask"].labels
    assert torch.equal(made.edit(image, mask, seeds=SEEDS), image)
    assert torch.equal(made.edit(image, torch.full_like(mask, 255), seeds=SEEDS), image)


def test_unlabelled_pixels_of_an_edit_keep_what_is_read():
    made, image = gentle(masks()), batch()["image"]
    mask, region = repainted(made, image)
    silent = torch.where(region, mask, 255)
    assert torch.equal(made.edit(image, silent, seeds=SEEDS), made.edit(image, mask, seeds=SEEDS))


def test_an_edit_has_a_seed_a_label_and_guidance():
    made, image = gentle(symmflow(drop_rate=0.1)), batch()["image"]
    mask, region = repainted(made, image)
    plain = made.edit(image, mask, region, seeds=SEEDS)
    alone = made.edit(image[[2]], mask[[2]], region[[2]], seeds=[SEEDS[2]])
    torch.testing.assert_close(alone, plain[[2]])
    read = made.read(image, steps=3, seeds=SEEDS).decoded["label"].labels
    torch.testing.assert_close(made.edit(image, mask, region, seeds=SEEDS, label=read), plain)
    for options in ({"label": (read + 1) % LABELS}, {"guidance": 3.0}, {"seeds": [1, 2, 3, 4, 5]}):
        assert not torch.allclose(made.edit(image, mask, region, **{"seeds": SEEDS, **options}), plain, atol=1e-4)
    guided = made.edit(image, mask, region, seeds=SEEDS, guidance=3.0)
    assert torch.equal(made.edit(image, mask, region, seeds=SEEDS, guidance=ClassifierFree(3.0)), guided)


def test_an_edit_tells_its_progress_both_ways():
    made, image, told = masks(), batch()["image"], []
    made.edit(image, batch()["mask"], steps=2, progress=lambda k, n: told.append((k, n)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
