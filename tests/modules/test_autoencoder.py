"""Training an autoencoder: the loss term by term, two optimizers in turn, resuming, saving."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_flows import from_pretrained
from lightning_flows.callbacks import EMA
from lightning_flows.codecs import KLNetwork
from lightning_flows.data import Digits
from lightning_flows.flow import StepNoise
from lightning_flows.modules import Adversary, KLAutoencoder, Perceptual, TimmFeatures, WarmupConstant
from lightning_flows.modules.autoencoder import kl_divergence
from lightning_flows.networks import PatchDiscriminator
from lightning_flows.store import Recorded, build, check, config_of
from tests.modules.tiny import Maps, batch

NOISE = StepNoise(0)


def network(**changed):
    sizes = {"in_channels": 1, "latent_channels": 2, "channels": (4, 8), "layers": 1, "norm_groups": 2}
    return KLNetwork(**(sizes | changed))


def critic(**options):
    return Adversary(PatchDiscriminator(in_channels=1, hidden_size=4, depth=1, norm_groups=2), **options)


def model(**options):
    return KLAutoencoder(network=network(), **options)


def trainer(folder, steps=2, **options):
    quiet = {
        "logger": False,
        "max_epochs": -1,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(default_root_dir=folder, max_steps=steps, limit_val_batches=1, **(quiet | options))


def data():
    return Digits(batch_size=8)


def test_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 3, 2, 4, 4)
    mine = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    truth = torch.distributions.kl_divergence(mine, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_divergence(mean, log_variance), truth, rtol=1e-4)


@pytest.mark.parametrize(("reconstruction", "power"), [("absolute", 1), ("squared", 2)])
def test_the_loss_is_the_sum_of_its_terms(reconstruction, power):
    features = Perceptual(Maps(), weight=0.3)
    made, items = model(reconstruction=reconstruction, kl_weight=0.1, perceptual=features), batch(size=8)
    loss, logs = made.losses(items, NOISE)
    x = items["image"]
    mean, log_variance = made.network.encode_moments(x)
    y = made.decode(mean + (0.5 * log_variance).exp() * NOISE.normal("posterior", like=mean))
    pixels = (x - y).abs().pow(power).mean((1, 2, 3))
    assert torch.allclose(logs["pixels"], pixels, atol=1e-6)
    assert torch.allclose(logs["kl"], kl_divergence(mean, log_variance) / 64, atol=1e-6)
    assert torch.allclose(loss, pixels + 0.1 * logs["kl"] + 0.3 * features(x, y), atol=1e-6)
    assert loss.shape == (6,)


def test_encode_gives_the_mean_or_a_draw():
    made, x = model(), batch(size=8)["image"]
    mean, log_variance = made.network.encode_moments(x)
    assert torch.equal(made.encode(x), mean)
    drawn = made.encode(x, NOISE)
    assert torch.allclose((drawn - mean) / (0.5 * log_variance).exp(), NOISE.normal("posterior", like=mean), atol=1e-4)
    assert made.latent_shape((1, 8, 8)) == tuple(mean.shape[1:])


def test_training_lowers_the_error(tmp_path):
    made, items = model(kl_weight=1e-3, optimizer=torch.optim.Adam), data()
    before = made.losses(batch(size=8), NOISE).loss.mean().item()
    trainer(tmp_path, steps=40).fit(made, items)
    items.setup("fit")
    images = next(iter(items.val_dataloader() or items.train_dataloader()))
    assert made.losses(images, NOISE).loss.mean().item() < before


def test_frozen_features_are_no_part_of_the_module():
    features = Perceptual(Maps())
    made = model(perceptual=features)
    assert not [name for name, _ in made.named_parameters() if not name.startswith("network.")]
    features(*batch(size=8)["image"].chunk(2))
    assert all(not p.requires_grad for p in features.network().parameters())
    assert made.state_dict().keys() == model().state_dict().keys()


class Watch(L.Callback):
    def on_train_start(self, trainer, pl_module):
        self.start = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def changed(self, pl_module, prefix):
        state = pl_module.state_dict()
        return any(not torch.equal(self.start[name], state[name]) for name in state if name.startswith(prefix))


def test_both_take_turns(tmp_path):
    made, watch = model(adversary=critic(gradient_clip_val=1.0), lr_scheduler=WarmupConstant), Watch()
    run = trainer(tmp_path, steps=4, callbacks=[watch])
    run.fit(made, data())
    assert run.global_step == 4  # two of each
    assert watch.changed(made, "network.")
    assert watch.changed(made, "adversary.")


def test_the_critic_sleeps_before_its_start(tmp_path):
    made, watch = model(adversary=critic(start_step=100)), Watch()
    run = trainer(tmp_path, steps=2, callbacks=[watch])
    run.fit(made, data())
    assert watch.changed(made, "network.")
    assert not watch.changed(made, "adversary.")


def test_a_sleeping_critic_changes_nothing(tmp_path):
    states = []
    for adversary in (None, critic(start_step=100)):
        L.seed_everything(0)
        torch.manual_seed(0)
        made = KLAutoencoder(network=network(), adversary=adversary)
        torch.manual_seed(1)
        for parameter in made.network.parameters():
            nn.init.normal_(parameter, std=0.1)
        trainer(tmp_path, steps=3).fit(made, data())
        states.append(made.network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_strength_rises_after_the_start():
    adversary = critic(weight=0.8, start_step=10, warmup_steps=4)
    assert [adversary.strength(step) for step in (0, 9, 10, 11, 13, 50)] == pytest.approx([0, 0, 0.2, 0.4, 0.8, 0.8])


def test_the_balanced_term_weighs_as_much_as_the_reconstruction():
    made, adversary, x = model(), critic(), batch(size=8)["image"]
    y = made.network(x)
    loss, last = (x - y).abs().mean(), made.network.last_layer
    term = adversary.term(y, loss, last)
    (wanted,) = torch.autograd.grad(loss, last, retain_graph=True)
    (found,) = torch.autograd.grad(term, last)
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-2)


def test_hinge_losses():
    class Constant(Recorded, nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True)

    adversary = Adversary(Constant(), balance=False)
    real, fake = torch.full((2, 1, 4, 4), 3.0), torch.full((2, 1, 4, 4), 0.5)
    assert adversary.critic_loss(real, fake) == pytest.approx((0 + 1.5) / 2)
    assert adversary.term(fake, torch.tensor(0.0), torch.zeros(1)) == pytest.approx(-0.5)


@pytest.mark.parametrize("adversarial", [False, True])
def test_k_and_k_steps_are_two_k(tmp_path, adversarial):
    def fresh():
        torch.manual_seed(0)
        return model(adversary=critic(warmup_steps=3) if adversarial else None, lr_scheduler=WarmupConstant)

    steps = 8 if adversarial else 4
    L.seed_everything(0)
    whole = fresh()
    trainer(tmp_path, steps=steps, callbacks=[EMA(0.9)]).fit(whole, data())
    half = fresh()
    save = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=steps // 2)
    trainer(tmp_path, steps=steps // 2, callbacks=[EMA(0.9), save]).fit(half, data())
    resumed = fresh()
    trainer(tmp_path, steps=steps, callbacks=[EMA(0.9)]).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


def test_saved_and_loaded_again(tmp_path):
    made = model(adversary=critic(), perceptual=Perceptual(TimmFeatures("resnet18", pretrained=False)))
    made.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    x = batch(size=8)["image"]
    assert type(again) is KLAutoencoder
    assert torch.equal(again.reconstruct(x), made.reconstruct(x))
    config = config_of(made)
    check(config)
    assert config_of(build(config)) == config


def test_test_step_gives_pairs_and_latents(tmp_path):
    made, items = model().eval(), batch(size=8)
    outputs = made.test_step(items, 0)
    assert torch.equal(outputs["latent"], made.encode(items["image"]))
    assert outputs["sample"].abs().max() <= 1
    assert torch.equal(outputs["sample"], made.reconstruct(items["image"]).clamp(-1, 1))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"reconstruction": "cubic"}, "reconstruction"), ({"kl_weight": -1.0}, "kl_weight")],
)
def test_bad_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        model(**options)
    with pytest.raises(ValueError, match="warmup_steps"):
        critic(warmup_steps=-1)


def test_it_does_not_sample():
    with pytest.raises(ValueError, match="does not sample"):
        model().predict_step({"id": ["a"]}, 0)


def test_a_batch_without_images_is_named():
    with pytest.raises(ValueError, match=r"no 'image', only \['latent'\]"):
        model().losses({"latent": torch.zeros(1, 2, 4, 4)}, NOISE)
