"""Training on cached latents is training on the images: the same losses and weights, and no other codec."""

import functools

import lightning as L
import pytest
import torch
from torch.utils.data import Subset

from lightning_flows.callbacks import Evaluation
from lightning_flows.codecs import AutoencoderKL, Codec, Identity, Posterior, WordEncoder
from lightning_flows.data import CachedLatents, Digits, LatentFormat, LatentWriter
from lightning_flows.data.digits import DigitItems
from lightning_flows.flow import Losses as FlowLosses
from lightning_flows.flow import StepNoise
from lightning_flows.metrics import Frechet, Pixels
from lightning_flows.modules import GenerativeModule
from tests.modules.tiny import dit, model


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    import diffusers

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2,
        scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vae")
    network.save_pretrained(path)
    return str(path)


class FewDigits(Digits):
    """96 digits for training, 12 for validation, 9 for the test."""

    def __init__(self, **kwargs) -> None:
        super().__init__(val_fraction=0.0, test_fraction=0.0, **kwargs)

    def read(self, split):
        return Subset(DigitItems(), {"train": range(96), "val": range(96, 108), "test": range(108, 117)}[split])


def digits():
    return FewDigits(batch_size=16, flip=True, seed=4)


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    writer = LatentWriter(AutoencoderKL(vae), digits(), folder, LatentFormat("float32", flip=True), batch_size=64)
    for split in ("train", "val", "test"):
        writer.write(split)
    return str(folder)


def build(codec, **options):
    torch.manual_seed(1)
    network = dit(in_channels=2, num_classes=10)
    # no Adam: it makes steps of full length out of gradients that are zero but for round-off (biases of keys)
    sgd = functools.partial(torch.optim.SGD, lr=0.03, momentum=0.9)
    return model(network, codec=codec, optimizer=sgd, standardize=2, **options)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def fit(quiet_trainer, module, data, **options):
    losses = Losses()
    trainer = quiet_trainer(**{"max_steps": 12, "check_val_every_n_epoch": 2, "callbacks": [losses], **options})
    trainer.fit(module, datamodule=data)
    return losses.values, trainer


def test_run_on_cached_latents_equals_the_run_on_images(vae, latents, quiet_trainer, monkeypatch):
    live, cached = build(AutoencoderKL(vae)), build(AutoencoderKL(vae))
    start = {name: value.clone() for name, value in live.state_dict().items()}
    expected, live_trainer = fit(quiet_trainer, live, digits())
    monkeypatch.setattr(AutoencoderKL, "network", None)  # nothing is encoded any more
    found, trainer = fit(quiet_trainer, cached, CachedLatents(latents, batch_size=16, seed=4, verify=True))
    assert len(found) == 12
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert live.latent_scale.min() != 1
    for name, value in live.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    assert all(
        (value - start[name]).abs().max() > 1e-4 for name, value in live.state_dict().items() if "qkv.b" not in name
    )
    val = (float(t.callback_metrics["val/loss"]) for t in (live_trainer, trainer))
    assert next(val) == pytest.approx(next(val), rel=1e-5)


def test_posterior_is_drawn_anew_in_each_step(vae, latents):
    batch = next(iter(CachedLatents(latents, batch_size=4).train_dataloader()))
    made = build(AutoencoderKL(vae))
    a, b = (made.latent_of(batch, StepNoise(0, step)) for step in (1, 2))
    assert not torch.equal(a, b)
    expected = batch["latent"] + batch["latent_std"] * StepNoise(0, 1).normal("posterior", like=a)
    torch.testing.assert_close(a, expected)
    mode = build(AutoencoderKL(vae, posterior="mode"))
    assert torch.equal(mode.latent_of(batch, StepNoise(0, 1)), batch["latent"])


def test_model_that_takes_the_mode_may_use_latents_with_deviations(vae, latents, quiet_trainer):
    live, cached = (build(AutoencoderKL(vae, posterior="mode")) for _ in range(2))
    expected, _ = fit(quiet_trainer, live, digits(), max_steps=2)
    found, _ = fit(quiet_trainer, cached, CachedLatents(latents, batch_size=16, seed=4), max_steps=2)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_latents_of_another_codec_are_refused_with_both_named(vae, latents, quiet_trainer, verb):
    data = CachedLatents(latents, batch_size=4, test_split="val")
    with pytest.raises(ValueError, match=r"encoded by .*\"scale\": null.* codec is .*\"scale\": 2\.0"):
        getattr(quiet_trainer(max_steps=1), verb)(build(AutoencoderKL(vae, scale=2.0)), datamodule=data)
    with pytest.raises(ValueError, match=r"encoded by .*AutoencoderKL.* codec is .*Identity"):
        getattr(quiet_trainer(max_steps=1), verb)(build(Identity()), datamodule=data)


def test_latents_of_another_shape_are_refused(vae, latents, quiet_trainer):
    small = model(dit(in_channels=2, input_size=2), codec=AutoencoderKL(vae))
    with pytest.raises(ValueError, match=r"latents have shape \(2, 4, 4\), but those of the model \(2, 2, 2\)"):
        quiet_trainer(max_steps=1).fit(small, datamodule=CachedLatents(latents))


def test_test_compares_with_what_the_latents_decode_to(vae, latents, quiet_trainer, tmp_path):
    made, data = build(AutoencoderKL(vae)), CachedLatents(latents, batch_size=9)
    batch = next(iter(data.test_dataloader()))
    out = made.eval().test_step(batch, 0)
    torch.testing.assert_close(out["real"], AutoencoderKL(vae).decode(batch["latent"]))
    assert out["sample"].shape == out["real"].shape == (9, 1, 8, 8)
    evaluation = Evaluation(metrics=[Frechet(Pixels(size=2))], on="test")
    quiet_trainer(callbacks=[evaluation], inference_mode=False).test(made, datamodule=data, verbose=False)
    assert (tmp_path / "metrics.json").is_file()


def test_a_batch_of_neither_kind_is_named():
    with pytest.raises(ValueError, match="no 'image', only \\['label'\\]"):
        model().losses({"label": torch.zeros(2)}, StepNoise(0, 0))


def test_any_codec_draws_from_what_was_kept():
    class Wide(Codec):
        posterior = decode = latent_shape = None

    mean, std = torch.zeros(2, 3), torch.ones(2, 3)
    drawn = Wide().draw(Posterior(mean, std), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert Wide().draw(Posterior(mean, None), torch.Generator()) is mean
    assert Wide().draw(Posterior(mean, std)) is mean


# ---- tokens


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_tokens_of_another_text_encoder_are_refused_with_both_named(quiet_trainer, verb):
    data = Captions(WordEncoder(6, length=4).config)
    with pytest.raises(ValueError, match=r"tokens were encoded by .*\"length\": 4.* text encoder is .*\"length\": 5"):
        getattr(quiet_trainer(max_steps=1), verb)(Written(WordEncoder(6, length=5)), datamodule=data)


@pytest.mark.parametrize("text", [WordEncoder(6, length=4), None])
def test_tokens_of_the_same_encoder_pass_and_those_that_nobody_reads(quiet_trainer, text):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(Written(text), datamodule=Captions(WordEncoder(6, length=4).config))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(Written(text), datamodule=Captions(None))
    assert trainer.global_step == 1


class Captions(L.LightningDataModule):
    """Says of its tokens what `CachedLatents` says."""

    def __init__(self, text) -> None:
        super().__init__()
        self.text = text

    def train_dataloader(self):
        return torch.utils.data.DataLoader([torch.ones(2)], batch_size=1)

    val_dataloader = test_dataloader = train_dataloader


class Written(GenerativeModule):
    """Nothing but a parameter and a text encoder."""

    generate = log_prob = None

    def __init__(self, text=None) -> None:
        super().__init__()
        self.network, self.text = torch.nn.Linear(2, 1), text

    def losses(self, batch, noise):
        return FlowLosses(self.network(batch).square().mean(1), {})
