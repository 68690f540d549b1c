"""LearningRates: the rate of every parameter, schedules over all groups, resuming."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_flows.callbacks import Freeze, LearningRates
from lightning_flows.modules import KLAutoencoder, WarmupCosine
from lightning_flows.networks import ADMUNet, EDMUNet
from lightning_flows.networks.parts import depths
from lightning_flows.store import config_of
from tests.callbacks.test_ema import equal
from tests.callbacks.toy import Toy, data, trainer
from tests.modules.test_autoencoder import critic, network
from tests.modules.tiny import batch, dit, model
from tests.networks.test_unet import TINY as UNETS

ADAM = functools.partial(torch.optim.AdamW, lr=0.01)
SGD = functools.partial(torch.optim.SGD, lr=0.01)


def flow(**options):
    return model(dit(depth=3), **{"optimizer": ADAM, **options})


def loader(n=4):
    items = [{name: value[i] for name, value in batch(n).items()} for i in range(n)]
    return DataLoader(items, batch_size=4)


class Rates(Callback):
    """Rate of every parameter, by name, at the start of the fit; rates of the groups at every step."""

    def __init__(self):
        self.steps, self.decayed = [], {}

    def on_train_start(self, trainer, pl_module):
        named = {id(p): name for name, p in pl_module.named_parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.by_name = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
        self.decayed = {named[id(p)]: group.get("weight_decay") for group in groups for p in group["params"]}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def rates(folder, made, *callbacks, loader=None, **options):
    found = Rates()
    trainer(folder, *callbacks, found, **{"max_steps": 1, **options}).fit(made, loader or globals()["loader"]())
    return found


def test_the_first_pattern_that_fits_gives_the_factor(tmp_path):
    factors = {"network.blocks.1.attn.*": 0.5, "network.blocks.*": 0.1, "network.final_layer.linear.bias": 2.0}
    made = flow()
    found = rates(tmp_path, made, LearningRates(factors))
    for name, parameter in made.named_parameters():
        in_attention, in_blocks = name.startswith("network.blocks.1.attn."), name.startswith("network.blocks.")
        wanted = 0.5 if in_attention else 0.1 if in_blocks else 2.0 if "linear.bias" in name else 1.0
        assert found.by_name[name] == pytest.approx(0.01 * wanted), name
        assert found.decayed[name] == (0.01 if parameter.dim() > 1 else 0.0)  # AdamW's default, or none


@pytest.mark.parametrize("factors", [None, {"network.blocks.1.*": 0.1}])
def test_depth_lowers_the_rate_towards_the_input(tmp_path, factors):
    made = flow()
    found = rates(tmp_path, made, LearningRates(factors, depth_decay=0.5))
    for name, _ in made.named_parameters():
        part, _, rest = name.removeprefix("network.").partition(".")
        power = {"blocks": 3 - int(rest[0]) if part == "blocks" else 0, "final_layer": 0}.get(part, 4)
        factor = 0.1 if factors and name.startswith("network.blocks.1.") else 1.0
        assert found.by_name[name] == pytest.approx(0.01 * factor * 0.5**power), name


@pytest.mark.parametrize("cls", [ADMUNet, EDMUNet])
def test_depths_of_a_u_net_follow_the_data(cls):
    made = cls(**UNETS[cls], num_classes=3)
    found, blocks = depths(made)
    assert {found[name] for name in found if name.startswith(("t_embedder", "y_embedder", "stem"))} == {0}
    assert found["out_conv.weight"] == found["out_norm.weight"] == blocks + 1
    inner = [depth for name, depth in found.items() if name.startswith(("encoder", "middle", "decoder"))]
    assert inner == sorted(inner)
    assert set(inner) == set(range(1, blocks + 1))


def test_a_schedule_scales_every_group(tmp_path):
    schedule = functools.partial(WarmupCosine, total_steps=8, warmup_steps=2)
    options = {"max_steps": 6, "max_epochs": -1}
    plain = rates(tmp_path, flow(lr_scheduler=schedule), **options)
    scaled = rates(tmp_path, flow(lr_scheduler=schedule), LearningRates(depth_decay=0.5), **options)
    factors = [group / scaled.steps[1][-1] for group in scaled.steps[1]]
    assert sorted(set(factors)) == pytest.approx([0.0625, 0.125, 0.25, 0.5, 1.0])
    for one, several in zip(plain.steps, scaled.steps, strict=True):
        assert several == pytest.approx([one[0] * factor for factor in factors])


def test_a_factor_scales_the_step(tmp_path):
    moves = []
    for factor in (1.0, 0.25):
        made = flow(optimizer=SGD)
        before = made.network.blocks[0].mlp.fc1.weight.detach().clone()
        rates(tmp_path, made, LearningRates({"network.blocks.0.*": factor}))
        moves.append(made.network.blocks[0].mlp.fc1.weight.detach() - before)
    torch.testing.assert_close(moves[1], 0.25 * moves[0], atol=1e-7, rtol=1e-3)
    assert moves[0].abs().max() > 0


def test_the_attribute_does_the_same_without_a_callback(tmp_path):
    made, by_hand = flow(), flow()
    by_hand.learning_rates = {"network.blocks.*": 0.1}
    with_callback = rates(tmp_path, made, LearningRates({"network.blocks.*": 0.1}))
    assert rates(tmp_path, by_hand).by_name == with_callback.by_name
    assert made.learning_rates is None  # it belonged to the run
    assert config_of(made) == config_of(by_hand) == config_of(flow())
    by_hand.learning_rates = {"network.block.*": 0.1}
    with pytest.raises(ValueError, match=r"learning_rates=\['network.block.\*'\] names no parameter"):
        by_hand.configure_optimizers()


def test_without_factors_the_groups_are_what_they_were():
    first, second = flow().configure_optimizers().param_groups
    assert "name" not in first
    assert "lr_factor" not in second


def test_a_resumed_run_equals_one_that_did_not_stop(tmp_path):
    def callbacks():
        return [LearningRates({"network.final_layer.*": 3.0}, depth_decay=0.7), Freeze(["network.t_embedder.*"])]

    def start():
        return flow(lr_scheduler=functools.partial(WarmupCosine, total_steps=6))

    whole, half, rest = start(), start(), start()
    trainer(tmp_path, *callbacks(), max_steps=4).fit(whole, loader())
    save = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=2, filename="x")
    trainer(tmp_path, *callbacks(), save, max_steps=2).fit(half, loader())
    ckpt = tmp_path / "c" / "x.ckpt"
    trainer(tmp_path, *callbacks(), max_steps=4).fit(rest, loader(), ckpt_path=ckpt)
    assert equal(dict(rest.state_dict()), dict(whole.state_dict()))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer(tmp_path, max_steps=4).fit(start(), loader(), ckpt_path=ckpt)


def test_groups_have_names_in_the_log(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    logger = CSVLogger(tmp_path, name="log")
    callbacks = [LearningRates({"network.blocks.*": 0.5}), monitor]
    trainer(tmp_path, *callbacks, max_steps=1, logger=logger).fit(flow(), loader())
    assert {"lr-AdamW/x1", "lr-AdamW/x1/vectors", "lr-AdamW/x0.5", "lr-AdamW/x0.5/vectors"} == set(monitor.lrs)


def test_both_optimizers_of_an_autoencoder_know_the_factors(tmp_path):
    made = KLAutoencoder(network=network(), adversary=critic(), optimizer=ADAM)
    factors = {"network.kl.decoder.*": 0.1, "adversary.*": 0.5}
    found = rates(tmp_path, made, LearningRates(factors), loader=DataLoader([{"image": torch.zeros(1, 8, 8)}] * 2))
    for name, rate in found.by_name.items():
        wanted = 0.1 if name.startswith("network.kl.decoder.") else 0.5 if name.startswith("adversary.") else 1.0
        assert rate == pytest.approx(0.01 * wanted), name
    assert len({*found.by_name.values()}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "give factors"), ({"depth_decay": 0.0}, "must lie in"), ({"depth_decay": 1.1}, "must lie in")],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRates(**arguments)


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        (
            flow,
            {"factors": {"network.block.*": 0.1}},
            r"LearningRates.factors=\['network.block.\*'\] names no parameter",
        ),
        (flow, {"factors": {"network.*": 0.0}}, "must be positive, got 0.0"),
        (Toy, {"depth_decay": 0.5}, "Toy has none"),
        (Toy, {"factors": {"net.*": 0.5}}, "Toy.configure_optimizers does not read self.learning_rates"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_fit_starts(tmp_path, made, arguments, message):
    module = made()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LearningRates(**arguments), max_steps=1).fit(module, data())
    assert getattr(module, "learning_rates", None) is None
