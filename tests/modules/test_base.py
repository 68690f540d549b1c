"""What every generative model promises: seeds, modes, groups and steps."""

import functools
import json

import pytest
import torch

from lightning_flows.flow import Condition, EulerMaruyama, Midpoint, SampleNoise, StepNoise, key, seeds_from
from lightning_flows.modules import WarmupCosine
from lightning_flows.modules.base import evaluation
from lightning_flows.modules.publishable import parameter_groups, run_seed
from lightning_flows.store import config_of
from tests.modules.tiny import ToGaussian, Unconditional, batch, dit, model

LABEL = torch.tensor([2, 0, 1, 1, 2])


# ---------------------------------------------------------------------- counts and seeds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"condition": Condition(label=LABEL), "n": 3},
            "number of samples disagrees.*'n': 3, 'condition': 5",
        ),
        ({"n": 3, "seeds": [1, 2]}, "number of samples disagrees.*'n': 3, 'seeds': 2"),
        ({"condition": Condition(label=LABEL), "seeds": [1]}, "'condition': 5, 'seeds': 1"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"seeds": []}, "must be at least 1, got 0"),
        ({"seed": 1, "seeds": [1]}, "seed and seeds exclude each other"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_counts_that_disagree_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        model().sample(**options)


@pytest.mark.parametrize(
    ("options", "n"),
    [({}, 1), ({"n": 4}, 4), ({"seeds": [1, 2, 3]}, 3), ({"seeds": torch.tensor([1, 2])}, 2)],
)
def test_the_number_of_samples_is_that_of_whatever_is_given(options, n):
    assert model().sample(**options).shape == (n, 1, 4, 4)
    assert model().sample(Condition(label=LABEL)).shape == (5, 1, 4, 4)


def test_one_seed_stands_for_the_seeds_derived_from_it():
    made = model()
    assert torch.equal(made.sample(n=3, seed=4), made.sample(seeds=seeds_from(4, 3)))
    assert torch.equal(made.sample(n=3), made.sample(n=3, seed=0))
    assert not torch.equal(made.sample(n=3, seed=4), made.sample(n=3, seed=5))


@pytest.mark.parametrize("solver", [Midpoint(), EulerMaruyama()], ids=["ode", "sde"])
def test_a_sample_depends_on_its_own_seed_and_condition_only(solver):
    made, seeds = model(solver=solver), [11, 12, 13, 14, 15]
    together = made.sample(Condition(label=LABEL), seeds=seeds)
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = made.sample(Condition(label=LABEL[order]), seeds=[seeds[i] for i in order])
    torch.testing.assert_close(mixed, together[order], rtol=1e-5, atol=1e-5)
    for i in range(5):
        alone = made.sample(Condition(label=LABEL[i : i + 1]), seeds=seeds[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[4]).abs().max() > 0.1  # one label, two seeds


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_chunks_of_any_batch_size_are_the_same_samples(size):
    made = model()
    whole = made.sample(Condition(label=LABEL), seed=3)
    chunks = made.sample(Condition(label=LABEL), seed=3, batch_size=size)
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)


def test_sampling_draws_nothing_from_the_global_stream():
    state = torch.get_rng_state()
    model_state = model()
    torch.set_rng_state(state)
    model_state.sample(n=2, solver=EulerMaruyama())
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_hears_every_step():
    calls = []
    model().sample(n=3, batch_size=2, steps=4, progress=lambda *step: calls.append(step))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2


# ---------------------------------------------------------------------- modes


def test_sampling_runs_in_eval_mode_and_restores_every_part():
    made = model(ToGaussian())
    made.train()
    made.network.eval()
    made.sample(n=1)
    assert made.training
    assert not made.network.training
    made.network.train()
    made.sample(n=1)
    assert made.network.training
    assert not any(made.network.modes)


def test_modes_are_restored_after_an_error():
    made, modes = model().train(), []

    def broken():
        with evaluation(made):
            modes.extend(part.training for part in made.modules())
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert not any(modes)
    assert all(part.training for part in made.modules())


def test_samples_carry_no_graph():
    assert not model().sample(n=1).requires_grad


# ---------------------------------------------------------------------- steps


def test_requests_are_answered_by_id():
    made = model().eval()
    request = {"id": ["a", "b"], "seed": torch.tensor([5, 6]), "label": torch.tensor([1, 2])}
    answer = made.predict_step(request, 0)
    assert answer["id"] == ["a", "b"]
    assert torch.equal(answer["sample"], made.sample(Condition(label=request["label"]), seeds=[5, 6]))


def test_a_network_without_labels_is_asked_without():
    made = model(Unconditional(), shape=(1, 4, 4))
    answer = made.predict_step({"id": ["a"], "seed": torch.tensor([5])}, 0)
    assert torch.equal(answer["sample"], made.sample(seeds=[5]))
    with pytest.raises(ValueError, match="requests give 'label', but Unconditional reads no condition at all"):
        made.predict_step({"id": ["a"], "seed": torch.tensor([5]), "label": torch.tensor([1])}, 0)


def test_a_test_sample_belongs_to_its_item_whatever_the_batch():
    made, data = model().eval(), batch(6)
    whole = made.test_step(data, 0)
    part = made.test_step({name: value[3:5] for name, value in data.items()}, 7)
    torch.testing.assert_close(part["sample"], whole["sample"][3:5], rtol=1e-5, atol=1e-5)
    assert torch.equal(whole["real"], data["image"])
    assert whole["nfe"] == 6
    assert whole["label"].tolist() == data["label"].tolist()
    seeds = [key("test", run_seed(), i) for i in range(6)]
    assert torch.equal(whole["sample"], made.sample(Condition(label=data["label"]), seeds=seeds))


def test_a_batch_without_images_says_what_it_has():
    with pytest.raises(ValueError, match=r"no 'image', only \['label'\]"):
        model().losses({"label": LABEL}, StepNoise(0))


def test_validation_repeats_its_noise_and_training_does_not(quiet_trainer):
    """Two epochs over one batch with a learning rate of zero: losses differ by their noise alone."""
    seen = {"train": [], "val": []}
    made = model(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    losses = made.losses

    def record(data, noise):
        found = losses(data, noise)
        seen["train" if made.training else "val"].append(found.loss.tolist())
        return found

    made.losses = record
    items = [{name: value[0] for name, value in batch(1).items()}] * 2
    loader = torch.utils.data.DataLoader(items, batch_size=2)
    quiet_trainer(max_epochs=2).fit(made, loader, loader)
    assert seen["val"][0] == seen["val"][1]
    assert seen["train"][0] != seen["train"][1]


def test_the_noise_of_a_run_has_the_key_of_its_seed(monkeypatch):
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    assert run_seed() == 42


# ---------------------------------------------------------------------- optimizer


def test_matrices_are_decayed_and_vectors_are_not():
    made = model(dit(qk_norm=True))
    matrices, vectors = parameter_groups(made)
    assert all(p.dim() > 1 for p in matrices["params"])
    assert all(p.dim() <= 1 for p in vectors["params"])
    assert vectors["weight_decay"] == 0.0
    assert "weight_decay" not in matrices
    count = len(matrices["params"]) + len(vectors["params"])
    assert count == len(list(made.parameters()))


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    made = model()
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    (group,) = parameter_groups(made)
    assert all(p.requires_grad for p in group["params"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(made.requires_grad_(False))


def test_the_scheduler_is_stepped_with_the_optimizer():
    made = model(
        optimizer=functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.3),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=10, warmup_steps=5),
    )
    settings = made.configure_optimizers()
    assert settings["lr_scheduler"]["interval"] == "step"
    assert [group["weight_decay"] for group in settings["optimizer"].param_groups] == [0.3, 0.0]
    assert [group["lr"] for group in settings["optimizer"].param_groups] == [0.1, 0.1]
    assert isinstance(model().configure_optimizers(), torch.optim.AdamW)


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_a_lambda_is_refused_when_the_model_is_made(name):
    with pytest.raises(ValueError, match=f"argument '{name}' is function .*lambda.*functools.partial"):
        model(**{name: lambda parameters: torch.optim.SGD(parameters, lr=0.1)})


def test_hyperparameters_are_the_config_in_json():
    made = model(optimizer=functools.partial(torch.optim.Adam, lr=0.5), solver=EulerMaruyama())
    hparams = json.loads(json.dumps(dict(made.hparams)))
    hparams.pop("_instantiator")
    assert {"class_path": hparams.pop("_class_path"), "init_args": hparams} == config_of(made)


def test_seeds_of_samples_stay_the_same_between_versions():
    """The noise of a published sample: SampleNoise(seeds), purpose 'source'."""
    made = model(ToGaussian(std=1.0))  # the flow of N(0, 1) to itself moves nothing on the way back
    x0 = SampleNoise([7]).normal("source", torch.empty(1, 1, 2, 2))
    torch.testing.assert_close(made.sample(seeds=[7], steps=200), x0, rtol=1e-3, atol=1e-3)


def test_a_request_that_the_network_cannot_read_is_refused():
    request = {"id": ["a"], "seed": torch.tensor([0]), "caption": ["a shoe"]}
    with pytest.raises(ValueError, match=r"requests give 'caption', but DiT reads \['label'\]"):
        model().predict_step(request, 0)
