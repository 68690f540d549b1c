"""The judge of garments and the scores of its zoo entries, on small made-up images and untrained networks."""

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from benchmarks import zoo_fashion, zoo_kl, zoo_scores
from benchmarks.judges import fashion_cnn
from lightning_flows.flow import ClassifierFree, Dequantization, Euler, Midpoint
from lightning_flows.hub import figures
from lightning_flows.metrics import Frechet
from lightning_flows.metrics.reconstruction import PeakSignalToNoise
from lightning_flows.modules import LatentFlowMatching
from lightning_flows.networks import DiT, Sequential
from tests.benchmarks.tiny import SIZES, Halves, flow, images, pictures

SHORT = fashion_cnn.Recipe(epochs=2, batch_size=16, lr=0.05)


@pytest.fixture
def judge(monkeypatch):
    """An untrained network in the judge's place."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = fashion_cnn.Network().eval()
    found = fashion_cnn.Judge(network, 0.93, "digest")
    monkeypatch.setattr(fashion_cnn, "trained", lambda: found)
    return found


@pytest.fixture
def model():
    """A tiny flow in pixels, shape (1, 28, 28)."""
    return LatentFlowMatching(network=DiT(**SIZES, num_classes=10, label_dropout=0.1), solver=Midpoint(), steps=2)


# ------------------------------------------------------------------ the judge


def test_training_is_the_same_each_time_and_leaves_the_global_numbers_alone():
    pixels, labels = pictures(48)
    state = torch.get_rng_state()
    first, second = (fashion_cnn.train(pixels, labels, SHORT) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not first.training


def test_the_judge_is_trained_once_and_kept_with_its_accuracy(monkeypatch, tmp_path):
    asked = []
    splits = {"train": pictures(64), "test": pictures(30, seed=1)}
    monkeypatch.setattr(fashion_cnn, "_stored", lambda split: asked.append(split) or splits[split])
    monkeypatch.setattr(fashion_cnn, "RECIPE", SHORT)
    monkeypatch.setattr(fashion_cnn, "REQUIRED", 0.0)
    found = [fashion_cnn.trained.__wrapped__(tmp_path) for _ in range(2)]
    assert asked == ["train", "test"]
    assert found[0].accuracy == found[1].accuracy > 0.1
    assert found[0].digest == found[1].digest
    x = images(5)[0]
    assert torch.equal(found[0].network(x), found[1].network(x))
    monkeypatch.setattr(fashion_cnn, "REQUIRED", 1.01)
    with pytest.raises(RuntimeError, match=r"1\.01 are needed"):
        fashion_cnn.trained.__wrapped__(tmp_path)


def test_another_recipe_is_another_file(tmp_path):
    assert fashion_cnn.place(tmp_path) == fashion_cnn.place(tmp_path)
    assert fashion_cnn.place(tmp_path) != fashion_cnn.place(tmp_path, fashion_cnn.RECIPE._replace(seed=1))


def test_without_the_data_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(fashion_cnn.DATA, raising=False)
    with pytest.raises(ValueError, match="LIGHTNING_FLOWS_DATA is not set"):
        fashion_cnn.trained.__wrapped__(tmp_path)
    monkeypatch.setenv(fashion_cnn.DATA, str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no fashion_mnist/test\*\.npz"):
        fashion_cnn.garments("test")


def test_all_files_of_a_split_are_read(monkeypatch, tmp_path):
    pixels, labels = pictures(6)
    (tmp_path / "fashion_mnist").mkdir()
    for part in (0, 1):
        rows = slice(3 * part, 3 * part + 3)
        np.savez(
            tmp_path / f"fashion_mnist/train-0{part}.npz",
            images=pixels[rows, 0].numpy(), labels=labels[rows].numpy().astype(np.uint8),
        )  # fmt: skip
    monkeypatch.setenv(fashion_cnn.DATA, str(tmp_path))
    real = fashion_cnn.garments("train")
    assert torch.equal(real.images, images(6)[0])
    assert torch.equal(real.labels, labels)


def test_a_verdict_counts_what_is_taken_for_its_label(judge):
    x, _ = images(20)
    taken = judge.network(x).argmax(1)
    labels = torch.where(torch.arange(20) < 15, taken, (taken + 1) % 10)
    verdict = fashion_cnn.judge(x, labels)
    assert (verdict.accuracy, verdict.judge, verdict.count) == (0.75, 0.93, 20)
    assert "0.7500 of 20" in str(verdict)
    assert "0.9300" in str(verdict)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((3, 784), (3,)), ((3, 1, 28, 28), (2,)), ((0, 1, 28, 28), (0,)), ((1, 3, 28, 28), (1,))],
)
def test_wrong_shapes_are_named(judge, shape, labels):
    with pytest.raises(ValueError, match="images and labels must be"):
        fashion_cnn.judge(torch.zeros(shape), torch.zeros(labels))


def test_images_that_are_not_finite_are_refused(judge):
    with pytest.raises(ValueError, match="images must be finite"):
        fashion_cnn.judge(torch.full((1, 1, 28, 28), torch.nan), torch.zeros(1))


def test_samples_are_seen_as_they_would_be_in_a_file():
    x = images(4)[0]
    assert torch.equal(fashion_cnn.as_stored(x), x)
    near = (x + 0.002 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)).clamp(-1, 1)
    assert torch.equal(fashion_cnn.as_stored(near), x)
    assert torch.equal(fashion_cnn.as_stored(50 * torch.ones(1)), torch.ones(1))


def test_features_are_an_extractor(judge):
    x = images(6)[0]
    wanted = judge.network.features(x)
    assert wanted.shape == (6, 128)
    assert torch.allclose(fashion_cnn.features(x), wanted)
    metric = Frechet(fashion_cnn.extractor())
    assert metric.name == "frechet[fashion-cnn]"
    assert zoo_scores.frechet(x, x, fashion_cnn.extractor()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="images must be"):
        fashion_cnn.features(x[:, 0])


# ------------------------------------------------------------------ scores of samples


def test_calls_and_rows_are_counted_by_sample(model):
    labels = torch.arange(6)
    plain = zoo_scores.draw(model, labels, 3, {}, batch_size=4)
    assert (plain.calls, plain.rows, plain.images.shape) == (4, 4, (6, 1, 28, 28))
    whole = zoo_scores.draw(model, labels, 3, {}, batch_size=6)
    assert torch.allclose(plain.images, whole.images, atol=1e-5)
    guided = zoo_scores.draw(model, labels, 3, {"guidance": 2.0, "solver": Euler()})
    assert (guided.calls, guided.rows) == (2, 4)
    with pytest.raises(RuntimeError, match="26 network calls"):
        zoo_scores.draw(model, labels[:1], 3, {"steps": 13})
    assert not model.network._forward_hooks


def test_the_scale_of_the_model_counts_unless_another_is_asked(model):
    assert zoo_scores.scale_of(model, {}) == 1
    model.guidance = ClassifierFree(1.5)
    assert zoo_scores.scale_of(model, {}) == 1.5
    assert zoo_scores.scale_of(model, {"guidance": 1.0}) == 1


def test_a_normalizing_flow_is_called_once_and_once_more_where_noise_is_removed():
    model, labels = flow(), torch.arange(6)
    denoised = zoo_scores.draw(model, labels, 3, {"method": Sequential()}, batch_size=4)
    assert (denoised.calls, denoised.rows, denoised.passes) == (2, 2, 6)  # two blocks, three of four tokens
    plain = zoo_scores.draw(model, labels, 3, {"denoise": 0.0, "guidance": 2.0})
    assert (plain.calls, plain.rows, plain.images.shape) == (1, 1, (6, 1, 28, 28))


def test_the_setting_of_a_flow_names_how_it_is_inverted_and_no_solver(model):
    drawn = zoo_scores.Drawn(torch.zeros(2, 1, 28, 28), torch.zeros(2), 2, 2, 1.0, 8)
    own = zoo_scores.setting(model, drawn, {}, 0)
    assert list(own) == [
        "samples", "seed", "guidance_scale", "guidance", "solver", "steps", "nfe", "network_rows",
        "seconds_per_sample", "device", "threads",
    ]  # fmt: skip
    inverse = zoo_scores.setting(flow(), drawn, {}, 0)
    assert inverse.keys() - own.keys() == {"method", "denoise", "data_noise", "passes"}
    assert own.keys() - inverse.keys() == {"solver", "steps", "network_rows"}
    assert (inverse["method"][:9], inverse["denoise"], inverse["passes"]) == ("Automatic", 1.0, 8)
    assert inverse["data_noise"] == "GaussianNoise(deviation=0.1, weighted=False)"
    asked = zoo_scores.setting(flow(), drawn, {"method": Sequential(), "denoise": 0.5, "guidance": 3.0}, 0)
    assert (asked["method"], asked["denoise"], asked["guidance_scale"]) == ("Sequential()", 0.5, 3.0)
    assert zoo_scores.setting(flow(Dequantization()), drawn, {}, 0)["denoise"] == 0


def test_nearest_pixels_are_those_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    x, reference = (torch.randn(count, 1, 5, 5, generator=generator) for count in (40, 70))
    x[3] = reference[50]
    wanted = torch.cdist(x.flatten(1), reference.flatten(1)).min(1).values
    found = zoo_scores.nearest_pixels(x, reference, columns=32)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert found[3] == 0


def test_copies_of_training_images_are_seen():
    held_out = torch.full((50,), 4.0)
    found = zoo_fashion.copies(torch.cat([torch.zeros(1), torch.full((49,), 2.0)]), held_out)
    assert found["ratio"] == 0.5
    assert found["samples_q01"] < found["samples"]


def test_a_model_is_scored_against_real_images(judge, model):
    train, test = images(60)[0], images(40, seed=1)[0]
    real = zoo_fashion.reference(train, test, 20)
    assert len(real.some_train) == len(real.some_test) == 20
    values = zoo_fashion.score(model, real, {"guidance": 2.0}, per_class=2, judged=1)
    assert next(iter(values)) == "cnn_accuracy"
    assert (values["cnn_accuracy"]["samples"], values["cnn_accuracy"]["judge_accuracy"]) == (10, 0.93)
    ratio = values["frechet_ratio[fashion-cnn]"]
    assert ratio["value"] == pytest.approx(ratio["samples_to_test"] / ratio["train_to_test"])
    assert values["prdc[fashion-cnn]"]["value"].keys() == values["prdc[fashion-cnn]"]["train"].keys()
    for entry in values.values():
        assert (entry["nfe"], entry["network_rows"], entry["guidance_scale"]) == (4, 8, 2)
    assert "judge on real test images: 0.9300" in zoo_fashion.report(values)


def test_a_normalizing_flow_is_scored_guided_unguided_and_both_ways(judge):
    train, test = images(60)[0], fashion_cnn.Real(*images(40, seed=1))
    blocks = zoo_fashion.blocks_of(flow(), train, test, {"guidance": 2.0}, per_class=2)
    assert list(blocks) == ["fashion", "fashion_unguided", "invertibility"]
    scales = [block["cnn_accuracy"]["guidance_scale"] for block in blocks.values() if "cnn_accuracy" in block]
    assert scales == [2, 1]
    assert "denoise 1, scale 2.0" in zoo_fashion.report(blocks["fashion"])
    assert "| inverse_error |" in zoo_fashion.report(blocks["invertibility"])


def test_a_flow_matching_model_has_no_inverse_to_measure(judge, model):
    test = fashion_cnn.Real(*images(40, seed=1))
    assert list(zoo_fashion.blocks_of(model, images(60)[0], test, {}, per_class=2)) == ["fashion"]


def test_real_images_in_the_place_of_samples_score_one(judge):
    train, test = images(60)[0], images(40, seed=1)[0]
    real = zoo_fashion.reference(train, test, 20)
    drawn = zoo_scores.Drawn(real.some_train, torch.zeros(20, dtype=torch.long), 4, 4, 1.0)
    values = zoo_fashion.scores(drawn, real, 10)
    assert values["frechet_ratio[fashion-cnn]"]["value"] == pytest.approx(1)
    assert values["prdc[fashion-cnn]"]["value"] == real.shares
    assert values["nearest_training[pixels]"]["value"]["samples"] == 0


def test_labels_are_balanced_from_the_start():
    labels = zoo_fashion.labels_of(5)
    assert labels[:20].bincount().tolist() == [2] * 10
    assert labels.bincount().tolist() == [5] * 10


def test_a_block_leaves_the_others_alone(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"test": {"values": {"kid": {"value": 1.0}}}}))
    zoo_scores.write(file, "fashion", {"cnn_accuracy": {"value": 0.5}}, ("torchmetrics",))
    assert [figure.name for figure in figures(json.loads(file.read_text()))] == ["kid", "cnn_accuracy"]
    assert set(json.loads(file.read_text())["fashion"]["versions"]) == {"lightning-flows", "torch", "torchmetrics"}


# ------------------------------------------------------------------ scores of an autoencoder


def test_coding_depends_on_the_seed_alone(monkeypatch):
    x = images(7)[0]
    whole = zoo_kl.code(Halves(), x, seed=1)
    monkeypatch.setattr(zoo_kl, "_ROWS", 3)
    assert torch.equal(zoo_kl.code(Halves(), x, seed=1).latent, whole.latent)
    assert torch.equal(zoo_kl.code(Halves(), x).latent, x[..., :14])
    figures_ = zoo_kl.latent_figures(zoo_kl.code(Halves(), x).latent, whole.latent)
    assert figures_["posterior_std_0"] == pytest.approx(0.1, rel=0.1)
    assert figures_["mean_0"] == pytest.approx(x[..., :14].mean().item(), rel=1e-5)


def test_principal_components_are_those_of_scikit_learn():
    train, test = images(80)[0][..., :6, :6], images(9, seed=1)[0][..., :6, :6]
    machine = PCA(5, svd_solver="full").fit(train.flatten(1).double().numpy())
    wanted = machine.inverse_transform(machine.transform(test.flatten(1).double().numpy()))
    found = zoo_kl.principal_components(train, test, 5)
    assert np.allclose(found.flatten(1).numpy(), wanted, atol=1e-5)
    assert torch.allclose(zoo_kl.principal_components(train, test, 36), test, atol=1e-5)
    with pytest.raises(ValueError, match="count must be 1 to 36, got 37"):
        zoo_kl.principal_components(train, test, 37)


def test_psnr_pools_the_squared_error():
    real = torch.zeros(2, 1, 2, 2)
    found = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.4)])
    # -10 log10 of 0.02 in [0, 1], not a mean over images; what lies outside is clipped
    assert zoo_kl.paired(PeakSignalToNoise(), found, real) == pytest.approx(16.9897, abs=1e-3)
    assert zoo_kl.paired(PeakSignalToNoise(), 3 * torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)) == float("inf")


def test_an_autoencoder_is_scored_beside_principal_components(judge):
    train, test = images(60)[0], images(20, seed=1)[0]
    values = zoo_kl.scores(Halves(), train, test)
    assert next(iter(values)) == "psnr"
    assert values["psnr"]["value"] > values["psnr[sampled posterior]"]["value"]
    assert values["ssim"]["value"] > values["ssim[sampled posterior]"]["value"]
    assert values["frechet[fashion-cnn][pca-392]"]["train"] == 60
    assert values["latent"]["numbers"] == 392
    assert "| psnr[pca-392] |" in zoo_kl.report(values)
