"""A SymmFlow in training: keyed losses, trained codes, latents, evaluation, saving, and runs that were interrupted."""

import functools
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_flows.callbacks import EMA, Evaluation
from lightning_flows.codecs import (
    AutoencoderKL,
    JointSemantics,
    KLNetwork,
    LearnedColours,
    OneHot,
    RGBPalette,
    ThroughAutoencoder,
)
from lightning_flows.data import Shapes
from lightning_flows.flow import Condition, StepNoise, Stratified, SymmetricMatching
from lightning_flows.metrics import AskedMask, Calibration, LabelAccuracy, MeanIoU
from lightning_flows.modules import SymmFlow, WarmupCosine, from_pretrained
from lightning_flows.store import config_of, save_folder
from tests.modules import test_resume as resumed
from tests.modules.pairs import LABELS, MASKS, batch, symmflow
from tests.modules.tiny import dit

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")


def learned():
    """A trained code of masks beside labels."""
    return JointSemantics([LearnedColours(MASKS), OneHot(LABELS, per="image")])


def loader(n=8, size=4):
    data = batch(n, size=size)
    return DataLoader([{name: value[i] for name, value in data.items()} for i in range(n)], batch_size=4)


# ------------------------------------------------------------------ losses


def test_every_draw_of_a_step_is_keyed():
    made, data = symmflow(learned(), drop_rate=0.3, read_rate=0.3).train(), batch()
    first, again = made.losses(data, StepNoise(0, 7)), made.losses(data, StepNoise(0, 7))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.logs["t"], again.logs["t"])
    assert not torch.equal(first.loss, made.losses(data, StepNoise(0, 8)).loss)
    assert set(first.logs) == {"t", "loss_image", "loss_semantic", "loss_extra"}
    parts = 0.7 * first.logs["loss_image"] + 0.3 * (first.logs["loss_semantic"] + first.logs["loss_extra"])
    torch.testing.assert_close(first.loss.detach(), parts)


def test_codes_are_hidden_in_training_alone():
    made, data, noise = symmflow(drop_rate=0.6), batch(40), StepNoise(0)
    hidden = made.train().losses(data, noise).logs["loss_semantic"] == 0
    assert hidden.float().mean().item() == pytest.approx(0.36, abs=0.2)  # mask and label, each by itself
    assert not (made.eval().losses(data, noise).logs["loss_semantic"] == 0).any()


def test_hidden_codes_teach_the_anchors_nothing():
    """Of a hidden code the network sees noise alone: no gradient comes from what it makes of that."""
    semantic = LearnedColours(MASKS, weight=1.0)
    made, data = symmflow(semantic, drop_rate=0.999).train(), batch()
    found = made.losses(data, StepNoise(0))
    assert (found.logs["loss_semantic"] == 0).all()
    with torch.no_grad():
        clean = semantic.extra_loss(semantic.encode(data, (4, 4)), data)
    torch.testing.assert_close(found.logs["loss_extra"], clean)
    gradients = torch.autograd.grad((found.loss - 0.7 * found.logs["loss_image"]).sum(), made.network.parameters())
    plain = made.objective(
        made.network, data["image"], semantic.encode(data, (4, 4)), StepNoise(0), torch.ones(5, 3) > 0
    )
    images = torch.autograd.grad(plain.losses.loss.sum(), made.network.parameters())
    for one, other in zip(gradients, images, strict=True):
        torch.testing.assert_close(one, other)


class Raw(Callback):
    """The trained anchors, before the average takes their place."""

    def on_train_batch_end(self, trainer, module, *_):
        self.anchors = module.semantic.parts[0].anchors.detach().clone()


def test_anchors_are_trained_averaged_and_saved(tmp_path, quiet_trainer):
    made, raw = symmflow(learned(), optimizer=functools.partial(torch.optim.AdamW, lr=0.05)), Raw()
    start = made.semantic.parts[0].anchors.detach().clone()
    callbacks = [EMA(0.9, warmup=False), raw]
    quiet_trainer(max_steps=4, max_epochs=-1, limit_val_batches=0, callbacks=callbacks).fit(made, loader())
    average = made.semantic.parts[0].anchors.detach()
    assert not torch.equal(average, start)
    assert (average - start).norm() < 0.9 * (raw.anchors - start).norm()  # it lags behind
    again = from_pretrained(made.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.semantic.parts[0].anchors, average)
    given = Condition(label=batch()["label"], spatial=batch()["mask"][:, None])
    assert torch.equal(again.sample(given, seed=2), made.eval().sample(given, seed=2))
    torch.testing.assert_close(again.read(batch()["image"]).decoded, made.read(batch()["image"]).decoded)
    assert config_of(again) == config_of(made)


# ------------------------------------------------------------------ latents


@pytest.fixture
def autoencoder(tmp_path):
    """Images (3, 8, 8) <-> latents (2, 4, 4)."""
    torch.manual_seed(0)
    network = KLNetwork(latent_channels=2, channels=(4, 4), layers=1, norm_groups=2, scaling_factor=0.5)
    config = {"class_path": "lightning_flows.modules.KLAutoencoder", "init_args": {"network": config_of(network)}}
    save_folder(tmp_path / "ae", config, {f"network.{name}": value for name, value in network.state_dict().items()})
    return AutoencoderKL(str(tmp_path / "ae"))


@pytest.mark.parametrize("through", [False, True])
def test_masks_of_images_and_codes_of_the_size_of_latents(tmp_path, autoencoder, through):
    mask = ThroughAutoencoder(RGBPalette([[0, 0, 0], [255, 0, 0], [0, 255, 0]]), autoencoder) if through else OneHot(3)
    semantic = JointSemantics([mask, OneHot(LABELS, per="image")])
    made, data = symmflow(semantic, channels=2, codec=autoencoder, drop_rate=0.1), batch(channels=3, size=8)
    made.set_latent_statistics(torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0]))
    assert made.shape == (2, 4, 4)
    assert made.losses(data, StepNoise(0)).loss.shape == (5,)
    found = made.read(data["image"])
    assert found.decoded["mask"].labels.shape == (5, 8, 8)
    assert found.noise.shape == (5, 2, 4, 4)
    assert made.sample(made.condition_of(data)).shape == (5, 3, 8, 8)
    assert made.sample(Condition(label=data["label"])).shape == (5, 3, 8, 8)  # the mask's size is that of the images
    assert made.sample(n=2).shape == (2, 3, 8, 8)
    region = torch.zeros(5, 8, 8, dtype=torch.bool)
    region[:, :2, :2] = True
    changed = made.edit(data["image"], data["mask"], region, grow=1) != data["image"]
    assert changed[:, :, :4, :4].all()  # a cell of the latent, and one more around it
    assert not changed[:, :, 4:].any()
    assert not changed[:, :, :, 4:].any()
    again = from_pretrained(made.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.sample(made.condition_of(data)), made.eval().sample(made.condition_of(data)))
    assert not any("codec" in name for name in made.state_dict())


def test_cached_latents_are_read_as_they_are(autoencoder):
    made = symmflow(OneHot(MASKS), channels=2, codec=autoencoder).eval()
    data = batch(channels=3, size=8)
    cached = {"latent": autoencoder.encode(data["image"]), "mask": data["mask"], "index": data["index"]}
    one, other = made.read_batch(data, 0, "read"), made.read_batch(cached, 0, "read")
    torch.testing.assert_close(other.code, one.code)
    assert other.decoded["mask"].labels.shape == (5, 8, 8)
    torch.testing.assert_close(made.losses(cached, StepNoise(0)).loss, made.losses(cached, StepNoise(0)).loss)


# ------------------------------------------------------------------ steps and evaluation


def dark(x):
    """A rule that sees class 0 where an image is dark, else 1."""
    return (x[:, 0] > 0).long()


def metrics():
    asked = AskedMask(MASKS, dark)
    return [MeanIoU(MASKS), LabelAccuracy(LABELS), Calibration(5, of="mask"), Calibration(5), asked]


@pytest.mark.parametrize("on", ["test", "validation"])
def test_steps_feed_the_metrics_of_both_directions(tmp_path, quiet_trainer, on):
    made = symmflow()
    trainer = quiet_trainer(callbacks=[Evaluation(metrics(), on=on)])
    (trainer.test if on == "test" else trainer.validate)(made, loader(), verbose=False)
    stage = json.loads((tmp_path / "metrics.json").read_text())["test" if on == "test" else "val"]
    values = {name: entry["value"] for name, entry in stage["values"].items()}
    truth = batch(8)
    read = [
        made.eval().read_batch({k: v[part] for k, v in truth.items()}, 0, "read") for part in (slice(4), slice(4, 8))
    ]
    labels = torch.cat([one.decoded["label"].labels for one in read])
    assert values["accuracy"] == pytest.approx((labels == truth["label"]).float().mean().item())
    mask, found = truth["mask"], torch.cat([one.decoded["mask"].labels for one in read])
    iou = [((mask == k) & (found == k)).sum() / ((mask == k) | (found == k)).sum() for k in range(MASKS)]
    assert values["miou"]["mean"] == pytest.approx(torch.stack(iou).mean().item())
    drawn = torch.cat([made.test_step({k: v[i : i + 4] for k, v in truth.items()}, 0)["sample"] for i in (0, 4)])
    asked = [((mask == k) & (dark(drawn) == k)).sum() / ((mask == k) | (dark(drawn) == k)).sum() for k in range(MASKS)]
    assert values["asked_miou"]["mean"] == pytest.approx(torch.stack(asked).mean().item())
    assert set(values) >= {"calibration", "calibration[mask]"}


def test_a_look_at_readings_draws_nothing(tmp_path, quiet_trainer, monkeypatch):
    made = symmflow()
    monkeypatch.setattr(SymmFlow, "generate", lambda *_, **__: pytest.fail("drawn"))
    quiet_trainer(callbacks=[Evaluation(metrics()[:4], on="validation")]).validate(made, loader(), verbose=False)
    assert "miou" in json.loads((tmp_path / "metrics.json").read_text())["val"]["values"]


def test_a_test_step_tells_what_both_directions_cost():
    made = symmflow(read_steps=2).eval()
    found = made.test_step(batch(), 0)
    assert (found["nfe"], found["read_nfe"]) == (3, 2)
    assert found["read_seconds"] > 0
    assert found["sample"].shape == found["real"].shape
    assert torch.equal(found["label"], batch()["label"])


def test_validation_has_the_same_noise_every_time(quiet_trainer):
    made, found = symmflow(learned(), drop_rate=0.3), []
    for _ in range(2):
        trainer = quiet_trainer()
        trainer.validate(made, loader(), verbose=False)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert found[0] == found[1]
    assert set(found[0]) == {"val/loss", "val/loss_image", "val/loss_semantic", "val/loss_extra"}


# ------------------------------------------------------------------ interrupted runs


def build():
    semantic = JointSemantics([LearnedColours(6), OneHot(5, per="image")])
    sizes = {"input_size": 8, "patch_size": 4, "in_channels": 3 + semantic.channels}
    return SymmFlow(
        network=dit(num_classes=None, label_dropout=0.0, **sizes),
        semantic=semantic,
        objective=SymmetricMatching(times=Stratified(), read_rate=0.2, drop_rate=0.2),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=12, warmup_steps=3),
        standardize=1,
    )


def shapes(workers):
    """As many pictures as the tests of resuming count on."""
    batch_size = 90 // resumed.BATCHES
    return Shapes(size=8, n_train=90, n_val=20, n_test=0, batch_size=batch_size, flip=True, num_workers=workers)


@pytest.mark.parametrize("stop", [2, resumed.STEPS[1]])
def test_k_steps_and_k_more_are_2k_steps(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(resumed, "build", build)
    monkeypatch.setattr(resumed, "digits", shapes)
    state = torch.get_rng_state()
    whole = resumed.run(tmp_path / "whole", 2 * stop)
    first = resumed.run(tmp_path / "first", stop)
    rest = resumed.run(tmp_path / "rest", 2 * stop, ckpt_path=resumed.step(tmp_path / "first", stop))
    torch.set_rng_state(state)
    assert any("anchors" in name for name in whole[1]["state_dict"])
    resumed.assert_same_end(whole, first, rest)


def test_anchors_that_are_trained_are_refused_where_only_the_network_is_spread():
    made = symmflow(learned())
    with pytest.raises(ValueError, match=r"fsdp2.*semantic.*anchors.*strategy='ddp'"):
        made.shard(None)
