"""A decoder trained on noisy latents: what stays frozen, the units of the noise, resuming, and that it learns."""

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_flows import from_pretrained
from lightning_flows.callbacks import EMA
from lightning_flows.cli import dispatch
from lightning_flows.codecs import AutoencoderKL
from lightning_flows.data import Digits
from lightning_flows.flow import SampleNoise, StepNoise, key
from lightning_flows.hub.convert import convert
from lightning_flows.modules import Adversary, KLAutoencoder, LatentFlowMatching, Perceptual, WarmupConstant, init_from
from lightning_flows.modules.autoencoder import kl_divergence
from lightning_flows.store import Recorded, build, check, config_of, load_tensors
from tests.modules.test_autoencoder import critic, data, network, trainer
from tests.modules.tiny import Maps, awake, batch, dit

NOISE = StepNoise(3, 5)
ENCODER = ("network.kl.encoder.", "network.kl.quant_conv.")


def model(*, scaling_factor=1.0, seed=0, **options):
    """An autoencoder with weights of its own, whose decoder is trained on noisy latents."""
    made = awake(network(scaling_factor=scaling_factor), seed)
    return KLAutoencoder(network=made, **{"trained": "decoder", "latent_noise": 0.3, **options})


def parts_of(state):
    """Tensors of what encodes, and those of what decodes."""
    frozen = {name: value.clone() for name, value in state.items() if name.startswith(ENCODER)}
    return frozen, {name: value.clone() for name, value in state.items() if name not in frozen}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


# ---- what is frozen


@pytest.mark.parametrize("adversarial", [False, True])
def test_what_encodes_stays_bit_for_bit(tmp_path, adversarial):
    made = model(adversary=critic(lecam=1e-3) if adversarial else None)
    x = batch(size=8)["image"]
    frozen, rest = parts_of(made.state_dict())
    latents, images = made.encode(x), made.reconstruct(x)
    run = trainer(tmp_path, steps=8, callbacks=[EMA(0.5)])
    run.fit(made, data())
    after, moved = parts_of(made.state_dict())
    assert run.global_step == 8
    assert same(after, frozen)
    changed = {name for name in moved if not torch.equal(moved[name], rest[name])}
    assert {name for name in moved if name.startswith("network.")} <= changed
    assert torch.equal(made.encode(x), latents)
    assert not torch.equal(made.reconstruct(x), images)


def test_optimizer_and_average_hold_the_decoder_alone():
    made = model()
    trained = {id(p) for group in made.configure_optimizers().param_groups for p in group["params"]}
    decoder = [made.network.kl.decoder, made.network.kl.post_quant_conv]
    assert trained == {id(p) for part in decoder for p in part.parameters()}
    assert {id(p) for p in made.parameters() if p.requires_grad} == trained


def test_the_encoder_stays_in_eval_mode():
    made = model()
    assert not any(part.training for encoder in made.network.encoder_parts for part in encoder.modules())
    made.eval().on_fit_start()  # as from `from_pretrained`
    assert made.network.kl.decoder.training
    assert not any(part.training for encoder in made.network.encoder_parts for part in encoder.modules())
    assert model(trained="all").train().network.kl.encoder.training


def test_the_encoder_works_in_float32_as_the_codec_does():
    x = batch(size=8)["image"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, whole = model().encode(x), model(trained="all").encode(x)
    assert torch.equal(inside, model().encode(x))
    assert not torch.equal(whole, inside)


def test_the_divergence_is_left_out():
    features, items = Perceptual(Maps(), weight=0.3), batch(size=8)
    made = model(reconstruction="squared", kl_weight=5.0, perceptual=[features, Perceptual(Maps(), weight=2.0)])
    loss, logs = made.losses(items, NOISE)
    y = made.reconstruct(items["image"], NOISE)
    pixels = (items["image"] - y).square().mean((1, 2, 3))
    assert logs.keys() == {"pixels", "perceptual_0", "perceptual_1"}
    assert torch.allclose(logs["perceptual_0"], features(items["image"], y), atol=1e-6)
    assert torch.allclose(loss, pixels + 0.3 * logs["perceptual_0"] + 2 * logs["perceptual_1"], atol=1e-5)


def test_maps_are_compared_as_they_are_without_unit_vectors():
    distance = Perceptual(Maps(), unit=False)
    x, y = torch.randn(2, 3, 1, 8, 8)
    with torch.no_grad():
        wanted = (distance.features(x) - distance.features(y)).square().mean((1, 2, 3))
    assert torch.allclose(distance(x, y), wanted, atol=1e-6)
    assert not torch.allclose(Perceptual(distance.features)(x, y), wanted, rtol=0.1)


def test_everything_may_be_trained_on_noisy_latents(tmp_path):
    made, items = model(trained="all", kl_weight=0.1), batch(size=8)
    frozen, _ = parts_of(made.state_dict())
    loss = made.losses(items, NOISE).loss
    x, (mean, log_variance) = items["image"], made.network.encode_moments(items["image"])
    pixels = (x - made.reconstruct(x, NOISE)).abs().mean((1, 2, 3))
    assert torch.allclose(loss, pixels + 0.1 * kl_divergence(mean, log_variance) / 64, atol=1e-6)
    trainer(tmp_path).fit(made, data())
    assert not any(torch.equal(value, made.state_dict()[name]) for name, value in frozen.items())


# ---- the noise


@pytest.mark.parametrize(("given", "sigma"), [(0.3, [0.3, 0.3]), ([0.5, 0.0], [0.5, 0.0])])
def test_the_noise_counts_in_units_of_the_scaled_latent(given, sigma):
    made = model(scaling_factor=0.2, latent_noise=given)
    u = torch.zeros(64, 2, 16, 16)
    added = made.noisy(u, NOISE) - u
    found = (0.2 * added).std((0, 2, 3))
    assert torch.allclose(found, torch.tensor(sigma), rtol=0.02)
    assert added.mean().abs() < 0.02
    expected = torch.tensor(sigma).view(-1, 1, 1) / 0.2 * NOISE.normal("latent_noise", like=u)
    assert torch.equal(added, expected)


def test_the_decoder_sees_what_a_flow_draws(tmp_path):
    """The codec and the flow, with scale, shift and statistics of their own, decode z + sigma noise the same."""
    source = KLAutoencoder(network=awake(network(scaling_factor=0.4, shift_factor=0.7)))
    codec = AutoencoderKL(str(source.save_pretrained(tmp_path)))
    flow = LatentFlowMatching(network=dit(in_channels=2), codec=codec)
    flow.latent_shift.copy_(torch.tensor([0.3, -0.2]).view(-1, 1, 1))
    flow.latent_scale.copy_(torch.tensor([2.0, 0.5]).view(-1, 1, 1))
    sigma = 0.3
    noise = (sigma / flow.latent_scale).flatten().tolist()
    made = from_pretrained(tmp_path, trained="decoder", latent_noise=noise)
    x = batch(size=8)["image"]
    u = source.encode(x)
    z = ((u - codec.shift) * codec.scale - flow.latent_shift) * flow.latent_scale
    drawn = z + sigma * NOISE.normal("latent_noise", like=z)
    images = codec.decode(drawn / flow.latent_scale + flow.latent_shift)
    assert torch.allclose(made.decode(made.noisy(u, NOISE)), images, atol=1e-5)
    assert not torch.allclose(made.decode(u), images, atol=1e-2)


def test_the_noise_is_keyed():
    made, x = model(), batch(size=8)["image"]
    torch.manual_seed(1)
    first = made.losses({"image": x}, StepNoise(0, 1)).loss
    torch.manual_seed(2)
    assert torch.equal(made.losses({"image": x}, StepNoise(0, 1)).loss, first)
    assert not torch.equal(made.losses({"image": x}, StepNoise(0, 2)).loss, first)
    one = made.reconstruct(x, SampleNoise(range(6)))
    assert torch.allclose(made.reconstruct(x[2:4], SampleNoise([2, 3])), one[2:4], atol=1e-5)
    u = torch.zeros(6, 2, 4, 4)
    assert not torch.allclose(made.noisy(u, NOISE), 0.3 * NOISE.normal("posterior", like=u))


@torch.no_grad()
def test_without_noise_the_latent_is_as_it_was():
    made, u = model(latent_noise=0.0).eval(), torch.randn(2, 2, 4, 4)
    assert made.noisy(u, NOISE) is u
    x = batch(size=8)["image"]
    assert torch.equal(made.reconstruct(x, NOISE), made.decode(made.encode(x, NOISE)))
    assert torch.equal(made.reconstruct(x), made.decode(made.encode(x)))


# ---- measuring


class Keep(L.Callback):
    def on_validation_end(self, trainer, pl_module):
        self.values = {name: value.item() for name, value in trainer.callback_metrics.items()}


def psnr(x, y):
    return (-10 * ((x - y.clamp(-1, 1)) / 2).square().mean().log10()).item()


def validated(made, folder):
    keep = Keep()
    trainer(folder, callbacks=[keep]).validate(made, data(), verbose=False)
    return keep.values


def test_validation_has_both_ratios_and_the_same_noise_each_time(tmp_path):
    made, items = model(latent_noise=2.0), data()
    first = validated(made, tmp_path)
    assert validated(made, tmp_path) == first
    items.setup("validate")
    x = next(iter(items.val_dataloader()))["image"]
    assert first["val/psnr"] == pytest.approx(psnr(x, made.reconstruct(x)), abs=1e-4)
    noisy = made.reconstruct(x, StepNoise(key("validation", 0), 0, 0))
    assert first["val/psnr_noisy"] == pytest.approx(psnr(x, noisy), abs=1e-4)
    assert "val/psnr_noisy" not in validated(model(latent_noise=0.0), tmp_path)


def test_a_test_gives_the_ratio_of_noisy_latents(tmp_path):
    made, items = model(latent_noise=2.0), data()
    run = trainer(tmp_path, limit_test_batches=1)
    run.test(made, items, verbose=False)
    found = next(iter(items.test_dataloader()))
    noise = SampleNoise([key("test", 0, int(i)) for i in found["index"]])
    wanted = psnr(found["image"], made.reconstruct(found["image"], noise))
    assert run.callback_metrics["test/psnr_noisy"].item() == pytest.approx(wanted, abs=1e-4)


def test_training_raises_the_ratio_from_noisy_latents(tmp_path):
    L.seed_everything(0)
    torch.manual_seed(0)
    start = KLAutoencoder(network=network(channels=(8, 16)), reconstruction="squared", optimizer=torch.optim.Adam)
    trainer(tmp_path, steps=150).fit(start, Digits(batch_size=32))
    start.save_pretrained(tmp_path)
    made = from_pretrained(tmp_path, trained="decoder", latent_noise=1.0)
    before = validated(made, tmp_path)
    trainer(tmp_path, steps=150).fit(made, Digits(batch_size=32))
    after = validated(made, tmp_path)
    assert after["val/psnr_noisy"] > before["val/psnr_noisy"] + 0.5


# ---- resuming


@pytest.mark.parametrize("adversarial", [False, True])
def test_k_and_k_steps_are_two_k(tmp_path, adversarial):
    def fresh():
        torch.manual_seed(0)
        adversary = critic(warmup_steps=3, lecam=0.1, lecam_decay=0.5) if adversarial else None
        return model(latent_noise=[0.3, 0.6], adversary=adversary, lr_scheduler=WarmupConstant)

    steps = 8 if adversarial else 4
    L.seed_everything(0)
    whole, half, resumed = fresh(), fresh(), fresh()
    trainer(tmp_path, steps=steps, callbacks=[EMA(0.9)]).fit(whole, data())
    save = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=steps // 2)
    trainer(tmp_path, steps=steps // 2, callbacks=[EMA(0.9), save]).fit(half, data())
    trainer(tmp_path, steps=steps, callbacks=[EMA(0.9)]).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert not same(parts_of(half.state_dict())[1], parts_of(whole.state_dict())[1])
    if adversarial:
        assert whole.adversary.real_mean != 0


# ---- from trained weights, to a codec


def recipe(**options):
    sizes = {"in_channels": 1, "latent_channels": 4, "channels": [16, 32, 64], "layers": 1, "norm_groups": 8}
    network = {"class_path": "lightning_flows.codecs.KLNetwork", "init_args": {**sizes, **options}}
    trained = {"network": network, "trained": "decoder", "latent_noise": 0.3}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}
    return {
        "model": {"class_path": "lightning_flows.modules.KLAutoencoder", "init_args": trained},
        "data": {"class_path": "lightning_flows.data.Digits", "init_args": {"batch_size": 8}},
        "trainer": {"max_steps": 2, **quiet, "callbacks": [{"class_path": "lightning_flows.callbacks.EMA"}]},
    }


def test_from_the_zoo_to_a_codec_with_the_same_latents(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy.yaml").write_text(yaml.safe_dump(recipe()))
    dispatch(["fit", "-c", "noisy.yaml", "--init_from", "kl-fashion-mnist"])
    dispatch(["export", "noisy", "out", "mit"])
    original, made = from_pretrained("kl-fashion-mnist"), from_pretrained(tmp_path / "out")
    frozen, decoder = parts_of(original.state_dict())
    after, moved = parts_of(made.state_dict())
    assert same(after, frozen)
    assert not same(moved, decoder)
    assert made.origin == str(tmp_path / "out")
    check_codecs(AutoencoderKL("kl-fashion-mnist"), AutoencoderKL(str(tmp_path / "out")), made)


def test_from_the_command_line_with_a_fresh_critic(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    given = recipe()
    discriminator = {"in_channels": 1, "hidden_size": 8, "depth": 1}
    given["model"]["init_args"]["adversary"] = {
        "class_path": "lightning_flows.modules.Adversary",
        "init_args": {
            "network": {"class_path": "lightning_flows.networks.PatchDiscriminator", "init_args": discriminator},
            "lecam": 1e-3,
        },
    }
    (tmp_path / "noisy.yaml").write_text(yaml.safe_dump(given))
    start = ["fit", "-c", "noisy.yaml", "--init_from", "kl-fashion-mnist"]
    with pytest.raises(SystemExit, match=r"adversary\.network"):
        dispatch(start)
    cli = dispatch([*start, "--reinit", "[adversary.*]"])
    assert cli.trainer.global_step == 2
    original = from_pretrained("kl-fashion-mnist").state_dict()
    assert same(parts_of(cli.model.state_dict())[0], parts_of(original)[0])


@torch.no_grad()
def check_codecs(former, latter, made):
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = SampleNoise(range(3))
    z = former.encode(x, noise)
    assert torch.equal(latter.encode(x, noise), z)
    assert torch.allclose(latter.decode(z), made.decode(z / latter.scale + latter.shift), atol=1e-5)
    assert not torch.allclose(latter.decode(z), former.decode(z), atol=1e-3)


def test_from_a_diffusers_folder_and_back(tmp_path):
    first = KLAutoencoder(network=awake(network(scaling_factor=0.18215)))
    theirs = convert("to-diffusers-vae", first.save_pretrained(tmp_path / "first"), tmp_path / "theirs")
    ours = convert("diffusers-vae", theirs, tmp_path / "ours")
    made = model(scaling_factor=0.18215, seed=7)
    init_from(made, ours)
    trainer(tmp_path, callbacks=[EMA(0.9)]).fit(made, data())
    folder = made.save_pretrained(tmp_path / "made")
    back = convert("to-diffusers-vae", folder, tmp_path / "back")
    old, new = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (theirs, back))
    names = [name for name in old if name.startswith(("encoder.", "quant_conv."))]
    assert names
    assert all(torch.equal(old[name], new[name]) for name in names)
    assert not torch.equal(old["decoder.conv_out.weight"], new["decoder.conv_out.weight"])
    for repo in (folder, back):
        check_codecs(AutoencoderKL(str(theirs)), AutoencoderKL(str(repo)), made.eval())


def test_weights_without_a_critic_begin_a_run_with_one(tmp_path):
    folder = model().save_pretrained(tmp_path)
    made = model(adversary=critic(lecam=1e-3), seed=7)
    with pytest.raises(ValueError, match=r"adversary\.real_mean"):
        init_from(made, folder)
    assert "adversary.fake_mean" in init_from(made, folder, reinit=["adversary.*"])
    assert same(parts_of(made.state_dict())[0], parts_of(model().state_dict())[0])


def test_the_config_is_one(tmp_path):
    made = model(latent_noise=[0.1, 0.2], perceptual=[Perceptual(Maps(), unit=False)], adversary=critic(lecam=1e-3))
    config = config_of(made)
    assert config["init_args"]["trained"] == "decoder"
    assert config["init_args"]["latent_noise"] == [0.1, 0.2]
    again = from_pretrained(made.save_pretrained(tmp_path), trust_remote_code=True)  # the tiny features of this test
    assert config_of(again) == config
    assert same(again.state_dict(), made.state_dict())
    plain = config_of(model(latent_noise=0.1))
    check(plain)
    assert config_of(build(plain)) == plain
    assert from_pretrained(
        tmp_path, trust_remote_code=True, trained="all"
    ).network.kl.encoder.conv_in.weight.requires_grad


# ---- LeCam


class Constant(Recorded, nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3), keepdim=True)


def images(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_lecam_by_hand():
    adversary = Adversary(Constant(), lecam=0.1, lecam_decay=0.75)
    real, fake = images(3.0, -1.0), images(0.5, -2.5)
    # Hinge: (0 + 2) / 2 of the images, (1.5 + 0) / 2 of the others. The means are 0: R = (9 + 0) / 2 + (0 + 6.25) / 2.
    assert adversary.critic_loss(real, fake) == pytest.approx((1 + 0.75) / 2 + 0.1 * (4.5 + 3.125))
    assert adversary.real_mean == pytest.approx(0.25 * 1.0)
    assert adversary.fake_mean == pytest.approx(0.25 * -1.0)
    # Now R = ((3 + 0.25)^2 + 0) / 2 + (0 + (0.25 + 2.5)^2) / 2.
    again = (3.25**2 + 2.75**2) / 2
    assert adversary.critic_loss(real, fake) == pytest.approx((1 + 0.75) / 2 + 0.1 * again)
    assert adversary.real_mean == pytest.approx(0.75 * 0.25 + 0.25)


def test_lecam_reaches_the_critic_and_neither_means_nor_images():
    adversary, x = critic(lecam=10.0), torch.randn(2, 1, 8, 8, requires_grad=True)
    plain = critic()
    plain.network.load_state_dict(adversary.network.state_dict())
    for each in (adversary, plain):
        each.critic_loss(x, x.flip(0)).backward()
    assert x.grad is None
    assert not adversary.real_mean.requires_grad
    pairs = zip(adversary.network.parameters(), plain.network.parameters(), strict=True)
    assert any(not torch.equal(a.grad, b.grad) for a, b in pairs)


def test_without_lecam_nothing_is_added_to_the_weights(tmp_path):
    assert not [name for name, _ in critic().named_buffers()]
    assert {name for name, _ in critic(lecam=1e-3).named_buffers()} == {"real_mean", "fake_mean"}
    model(adversary=critic()).save_pretrained(tmp_path)
    assert "adversary.real_mean" not in load_tensors(tmp_path / "model.safetensors")


# ---- mistakes


class Halves(Recorded, nn.Module):
    """A network that does not say what encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"trained": "encoder"}, "trained must be one of"),
        ({"latent_noise": -0.1}, "latent_noise must be finite and not negative"),
        ({"latent_noise": float("inf")}, "latent_noise"),
        ({"latent_noise": [0.1, 0.2, 0.3]}, "each of the 2 channels"),
        ({"latent_noise": []}, "latent_noise must be a number"),
        ({"network": Halves()}, "encoder_parts, got Halves"),
    ],
)
def test_bad_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        KLAutoencoder(**{"network": network(), "trained": "decoder", **options})


@pytest.mark.parametrize(("options", "word"), [({"lecam": -1.0}, "lecam must"), ({"lecam_decay": 1.0}, "lecam_decay")])
def test_bad_numbers_of_the_critic_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        critic(**options)
