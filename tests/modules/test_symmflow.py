"""SymmFlow against a distribution whose exact network is known, its conditions, and what it refuses."""

import pytest
import torch

from lightning_flows.codecs import ClassPlane, JointSemantics, OneHot
from lightning_flows.flow import (
    Autoguidance,
    ClassifierFree,
    Condition,
    DormandPrince,
    EulerMaruyama,
    Midpoint,
    StepNoise,
    SymmetricMatching,
)
from tests.modules.pairs import LABELS, MASKS, ExactPairs, batch, preconditioned, semantics, symmflow
from tests.modules.tiny import Unconditional

# Two images. The first has label 0 in two of three pairs and label 2 in one, the second always label 1.
X = torch.tensor([[1.0, 0.2, -0.5, 0.7], [-1.0, 0.4, 0.9, -0.3]]).view(2, 1, 2, 2)
WHICH, LABEL = [0, 0, 0, 1], torch.tensor([0, 0, 2, 1])


def exact(drop=0.0, sigma_min=1e-4, **options):
    """The exact model of these pairs."""
    semantic = OneHot(3, per="image", weight=0.0)  # squared error alone
    codes = semantic.encode({"label": LABEL}, (2, 2))
    network = ExactPairs(X[WHICH].tolist(), codes.tolist(), drop, sigma_min)
    return symmflow(semantic, network, drop_rate=drop, **{"steps": 30, **options})


def condition(data=None, **present):
    """Masks and labels of a batch."""
    data = data or batch()
    return Condition(label=data["label"], spatial=data["mask"][:, None], present=present)


# ------------------------------------------------------------------ the exact model


def test_one_step_reads_the_mean_of_the_code_given_the_image():
    made = exact()
    found = made.read(X[[0, 1, 0]], seeds=[1, 2, 3])
    mean = torch.tensor([[2 / 3, 0, 1 / 3], [0, 1, 0], [2 / 3, 0, 1 / 3]])
    torch.testing.assert_close(found.code.mean((2, 3)), 2 * mean - 1, rtol=0, atol=2e-3)
    assert found.decoded["label"].labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(found.decoded["label"].scores, mean, rtol=0, atol=2e-3)
    assert found.nfe == 1
    assert made.network.calls == [3]


def test_many_steps_read_one_of_the_codes():
    """A probability flow ends at a code of the image, where one step ends at their mean."""
    found = exact().read(X[[0] * 30 + [1]], steps=60, seed=1)
    planes = found.code.mean((2, 3))
    assert (planes.abs() > 0.9).all()
    labels = found.decoded["label"].labels
    assert labels[-1] == 1
    assert {0, 2} == set(labels[:-1].tolist())
    assert (labels[:-1] == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.25)


@pytest.mark.parametrize(("label", "which"), [(0, 0), (1, 1), (2, 0)])
def test_the_image_of_a_label_is_drawn(label, which):
    drawn = exact().sample(Condition(label=torch.tensor([label] * 4)), seed=3)
    torch.testing.assert_close(drawn, X[[which] * 4], rtol=0, atol=5e-3)


def test_without_a_condition_images_come_at_their_own_rate():
    drawn = exact(drop=0.25).sample(n=60, seed=5)
    distance = (drawn[:, None] - X).abs().amax((2, 3, 4))  # (60, 2)
    assert (distance.amin(1) < 0.02).all()
    assert (distance.argmin(1) == 0).float().mean().item() == pytest.approx(0.75, abs=0.17)


def test_guidance_of_a_certain_label_draws_its_image():
    made = exact(drop=0.25, guidance=ClassifierFree(2.0))
    drawn = made.sample(Condition(label=torch.tensor([1, 0])), seed=1)
    torch.testing.assert_close(drawn, X[[1, 0]], rtol=0, atol=2e-2)
    assert set(made.network.calls) == {4}


def test_the_exact_network_is_where_the_loss_is_least():
    made = exact()
    data = {"image": X[WHICH * 2000], "label": LABEL.repeat(2000)}
    losses = made.losses(data, StepNoise(0)).loss
    (slope,) = torch.autograd.grad(losses.mean(), made.network.gain)
    assert slope.abs().max() < 0.01
    for gain in ((0.95, 1.0), (1.05, 1.0), (1.0, 0.95), (1.0, 1.05)):
        made.network.gain.data = torch.tensor(gain)
        assert made.losses(data, StepNoise(0)).loss.mean() > losses.mean()


# ------------------------------------------------------------------ conditions


@pytest.mark.parametrize("streams", [("label",), ("spatial",), ("label", "spatial"), ()])
def test_it_draws_from_what_it_is_given(streams):
    made, whole = symmflow(drop_rate=0.1), condition()
    given = Condition(**{name: getattr(whole, name) for name in streams}) if streams else None
    drawn = made.sample(given, n=5, seed=2)
    assert drawn.shape == (5, 1, 4, 4)
    absent = [name for name in whole.streams if name not in streams]
    absent = whole.absent(*absent) if absent else whole
    torch.testing.assert_close(drawn, made.sample(absent, seed=2))  # what is marked absent is not looked at
    others = [made.sample(whole, seed=2)] if len(streams) < 2 else [made.sample(n=5, seed=2)]
    assert not any(torch.allclose(drawn, other, atol=1e-3) for other in others)


def test_values_of_absent_rows_may_be_anything():
    made, label = symmflow(OneHot(3, per="image"), drop_rate=0.1), torch.tensor([0, -1])
    drawn = made.sample(Condition(label=label, present={"label": torch.tensor([True, False])}), seed=1)
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_sample_depends_on_its_own_seed_and_condition_alone(guidance):
    made, seeds = symmflow(drop_rate=0.1), [11, 12, 13, 14, 15]
    given = condition(label=torch.tensor([1, 0, 1, 0, 1]) > 0, spatial=torch.tensor([1, 1, 0, 0, 1]) > 0)
    whole = made.sample(given, seeds=seeds, guidance=guidance)
    torch.testing.assert_close(made.sample(given, seeds=seeds, batch_size=2, guidance=guidance), whole)
    for i, seed in enumerate(seeds):
        alone = made.sample(given[[i]], seeds=[seed], guidance=guidance)
        torch.testing.assert_close(alone, whole[[i]])


def test_guidance_without_any_condition_is_refused_where_it_is_asked_for():
    made = symmflow(drop_rate=0.1, guidance=ClassifierFree(2.0))
    assert torch.equal(made.sample(n=2, seed=1), symmflow(drop_rate=0.1).sample(n=2, seed=1))
    with pytest.raises(ValueError, match=r"guidance of scale 3.0 needs a condition with one of \('spatial', 'label'\)"):
        made.sample(n=2, guidance=3.0)


def test_a_number_replaces_the_scale_of_the_models_guidance():
    rule = ClassifierFree(4.0, interval=(0.0, 0.5))
    made, given = symmflow(drop_rate=0.1, guidance=rule), condition()
    assert torch.equal(made.sample(given, guidance=2.0), made.sample(given, guidance=ClassifierFree(2.0, (0.0, 0.5))))
    assert torch.equal(made.sample(given, guidance=1), symmflow(drop_rate=0.1).sample(given))
    assert not torch.allclose(made.sample(given), made.sample(given, guidance=1.0))


def test_masks_may_be_larger_than_the_model():
    made, mask = symmflow(OneHot(MASKS)), torch.randint(MASKS, (2, 1, 4, 4))
    large = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(made.sample(Condition(spatial=large)), made.sample(Condition(spatial=mask)))


def test_progress_and_calls_are_those_of_the_solver():
    told, made = [], symmflow(OneHot(LABELS, per="image"), solver=Midpoint())
    made.sample(Condition(label=torch.tensor([1])), steps=2, progress=lambda k, n: told.append((k, n)))
    assert told == [(1, 2), (2, 2)]
    adaptive = made.sample(Condition(label=torch.tensor([1])), solver=DormandPrince(1e-4, 1e-4))
    torch.testing.assert_close(
        made.sample(Condition(label=torch.tensor([1])), steps=60), adaptive, rtol=0.05, atol=0.05
    )


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, Condition(vector=torch.zeros(5, 2)), r"condition gives \['vector'\], but JointSemantics reads"),
        ({}, None, r"the condition must give \('spatial', 'label'\) for every sample"),
        ({}, condition().absent("label", where=torch.arange(5) == 2), "trained without objective.drop_rate"),
        ({}, Condition(label=batch()["label"]), "must give"),
        ({"guidance": 2.0}, condition(), "guidance needs a model that was trained with objective.drop_rate above 0"),
        ({"solver": EulerMaruyama()}, condition(), "solver must be deterministic .* got EulerMaruyama"),
        ({"steps": 0}, condition(), "steps must be"),
        ({}, Condition(label=batch()["label"], spatial=batch()["mask"]), r"integers \(B, 1, H, W\), got torch.int64"),
        ({}, Condition(label=batch()["label"], spatial=torch.zeros(5, 1, 4, 4)), "got torch.float32"),
        ({}, Condition(label=batch()["label"] + 2, spatial=batch()["mask"][:, None]), r"\['label'\] holds 4.*0 to 3"),
        (
            {},
            Condition(label=batch()["label"], spatial=torch.zeros(5, 1, 2, 2, dtype=torch.int64)),
            r"does not fit this model, whose state is \(1, 4, 4\): size must be at most the mask's \(2, 2\)",
        ),
    ],
)
def test_wrong_samples_are_named(options, given, message):
    with pytest.raises(ValueError, match=message):
        symmflow().sample(given, n=5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"read_steps": 0}, "read_steps must be at least 1, got 0"),
        ({"solver": EulerMaruyama()}, "solver must be deterministic"),
        ({"guidance": ClassifierFree(2.0)}, "guidance needs a model that was trained with objective.drop_rate"),
        ({"guidance": Autoguidance(Unconditional(), 2.0), "drop_rate": 0.1}, "cannot be Autoguidance"),
        ({"network": Unconditional()}, r"network must have shape \(C \+ 7, h, w\).*JointSemantics, got none"),
        ({"channels": 0}, r"network must have shape \(C \+ 7, h, w\)"),
        (
            {"network": preconditioned(codes=6, channels=2)},
            r"network\.codes must be 7, the planes of .*, got 6",
        ),
        ({"network": preconditioned(constant=5)}, r"network\.constant must be at most 4, got 5: .*JointSemantics"),
    ],
)
def test_wrong_models_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        symmflow(**options)


def test_labels_before_masks_and_dequantised_labels_are_not_constant():
    first = JointSemantics([OneHot(LABELS, per="image"), OneHot(MASKS)])
    for semantic in (first, JointSemantics([OneHot(MASKS), ClassPlane(LABELS)]), OneHot(MASKS)):
        network = preconditioned(codes=semantic.channels, constant=1)
        with pytest.raises(ValueError, match=r"network\.constant must be at most 0, got 1"):
            symmflow(semantic, network)
    assert semantics().constant == LABELS


def test_a_model_of_constant_planes_trains_draws_reads_and_goes_without_a_label():
    made = symmflow(network=preconditioned(constant=LABELS), drop_rate=0.5, read_rate=0.3)
    data = batch(16)
    losses = made.train().losses(data, StepNoise(0))
    losses.loss.mean().backward()
    grown = [p.grad for p in made.parameters()]
    assert losses.loss.isfinite().all()
    assert all(grad is not None and grad.isfinite().all() for grad in grown)
    given = condition(data)
    images = made.sample(given, seed=0)
    other = made.sample(Condition(label=(data["label"] + 1) % LABELS, spatial=given.spatial), seed=0)
    hidden = made.sample(given.absent("label"), seed=0, guidance=2.0)
    assert images.isfinite().all()
    assert hidden.isfinite().all()
    assert (images - other).abs().max() > 1e-3
    assert (images - hidden).abs().max() > 1e-3
    code = made.read(data["image"], seed=0).code[:, -LABELS:]
    torch.testing.assert_close(code, code[..., :1, :1].expand_as(code), atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_field_is_named():
    data = batch()
    del data["label"]
    with pytest.raises(ValueError, match=r"reads \('mask', 'label'\); the batch has no \['label'\]"):
        symmflow().losses(data, StepNoise(0))


def test_there_is_no_density_of_images_alone():
    with pytest.raises(ValueError, match="likelihood is that of the pair"):
        symmflow().log_prob(batch()["image"])


def test_defaults_are_those_of_the_paper():
    made = SymmetricMatching()
    assert (made.image_weight, made.path.sigma_min, made.read_rate, made.drop_rate) == (0.7, 1e-4, 0, 0)
    assert symmflow(semantics()).streams == ("spatial", "label")
