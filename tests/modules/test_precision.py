"""Every precision of the Trainer trains, validates, samples and resumes; what must be float32 is float32."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import lightning_flows as lf
from lightning_flows.callbacks import EMA, SampleGrid
from lightning_flows.data import Digits
from lightning_flows.flow import SampleNoise
from lightning_flows.modules import LatentFlowMatching, WarmupConstant
from lightning_flows.networks import ADMUNet
from lightning_flows.networks.layers import TimestepEmbedder
from tests.modules.ddp_runs import BATCH, Rows
from tests.modules.test_resume import differences
from tests.modules.tiny import awake, dit

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
COMPUTES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.half}
LABELS = lf.Condition(label=torch.arange(4))


def network(kind):
    if kind == "dit":
        return dit(input_size=8, patch_size=4, num_classes=10)
    sizes = {"input_size": 8, "in_channels": 1, "hidden_size": 32, "channel_mult": (1,), "num_blocks": 1}
    return awake(ADMUNet(**sizes, attention_factors=(1,), num_heads=2, num_classes=10, label_dropout=0.2))


def build(kind="dit", **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    return LatentFlowMatching(network=network(kind), steps=2, optimizer=optimizer, standardize=1, **options)


def trainer(folder, precision, callbacks=(), **options):
    if precision == "16-mixed":  # a Trainer on the CPU would take bfloat16 for it
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    else:
        options["precision"] = precision
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, logger=False, max_epochs=-1, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[EMA(0.9), *callbacks, every], **options,
    )  # fmt: skip


def digits(batch_size=24):
    return Digits(batch_size=batch_size, val_fraction=0.02, test_fraction=0.8)


class Dtypes:
    """Dtypes that went through some parts of a network, by the name of the part."""

    def __init__(self, network):
        self.seen = {}
        self.handles = [network.register_forward_hook(self.note("network"))]
        for part in network.modules():
            if isinstance(part, TimestepEmbedder):
                self.handles.append(part.register_forward_hook(self.note("time")))
            if isinstance(part, nn.Linear) and part.out_features == 3 * part.in_features:
                self.handles.append(part.register_forward_hook(self.note("matrix product")))
            if part.__class__.__name__ == "DiTBlock":
                self.handles.append(part.adaLN_modulation.register_forward_hook(self.note("modulation")))

    def note(self, name):
        def hook(part, inputs, output):
            given = [value.dtype for value in inputs if isinstance(value, torch.Tensor)]
            self.seen.setdefault(name, set()).add((*given, output.dtype))

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


class Watch(L.Callback):
    """What a run computes with."""

    def on_train_start(self, trainer, module):
        self.dtypes = Dtypes(module.network)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss, self.weights = outputs["loss"].dtype, next(module.network.parameters()).dtype
        self.statistics = (module.latent_shift.dtype, module.latent_scale.dtype)
        self.average = {a.dtype for a in trainer.callbacks[0]._weights.average}

    def on_train_end(self, trainer, module):
        self.dtypes.remove()


@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_keeps_its_float32_islands(tmp_path, precision, kind):
    module, watch = build(kind), Watch()
    grid = SampleGrid(labels=[0, 1], n=2, every_n_steps=2, every_n_epochs=None)
    made = trainer(tmp_path, precision, [watch, grid], max_steps=4, val_check_interval=2)
    made.fit(module, digits())
    seen, narrow, mixed = watch.dtypes.seen, COMPUTES[precision], precision.endswith("mixed")
    assert all(found[-1] == narrow for found in seen.get("matrix product", ())) or kind == "unet"
    for given in seen["network"]:
        assert given[:2] == (torch.float32, torch.float32)  # the state of the solver (or x_t), and the time
    assert {given[0] for given in seen["time"]} == {torch.float32}
    if mixed:
        assert {given[-1] for part in ("time", "modulation") for given in seen.get(part, ())} == {torch.float32}
    assert watch.loss == torch.float32
    assert watch.weights == (narrow if precision == "bf16-true" else torch.float32)
    assert watch.average == {torch.float32}
    assert watch.statistics == (torch.float32, torch.float32)
    assert made.callback_metrics["val/loss"].isfinite()
    assert len(list((tmp_path / "samples").glob("*.png"))) > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_follow_those_of_float32(tmp_path, precision):
    class Losses(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.found.append(outputs["loss"].item())

    runs = {}
    for name in {"32-true", precision}:
        runs[name] = Losses()
        L.seed_everything(3, verbose=False)
        trainer(tmp_path / name, name, [runs[name]], max_steps=8, limit_val_batches=0).fit(build(), digits())
    torch.testing.assert_close(runs[precision].found, runs["32-true"].found, rtol=0.03, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_resumes_bit_for_bit(tmp_path, precision):
    for name, steps, start in (("whole", 4, None), ("rest", 4, tmp_path / "whole" / "step=2.ckpt")):
        L.seed_everything(3, verbose=False)
        trainer(tmp_path / name, precision, max_steps=steps, limit_val_batches=0).fit(
            build(), digits(), ckpt_path=start
        )
    whole, rest = (torch.load(tmp_path / name / "step=4.ckpt", weights_only=True) for name in ("whole", "rest"))
    for part in ("state_dict", "current_model_state", "optimizer_states", "averaging_state"):
        assert differences(whole[part], rest[part], part) == []
    scaler = "MixedPrecision"
    assert (scaler in whole) == (precision == "16-mixed")
    assert whole.get(scaler) == rest.get(scaler)


@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_solves_in_float32(kind, dtype):
    module = build(kind).eval()
    module.set_latent_statistics(torch.tensor([0.1234567]), torch.tensor([1.2345678]))
    expected, statistics = module.sample(LABELS, seed=1), module.latent_scale.clone()
    module.to(dtype)
    assert torch.equal(module.latent_scale, statistics)
    found = module.sample(LABELS, seed=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    noise = SampleNoise([1, 2, 3, 4])
    solution = module.generate(LABELS, noise)
    assert solution.x.dtype == torch.float32
    assert module.log_prob(found, LABELS, steps=1).dtype == torch.float32


# ------------------------------------------------------------------ accumulation


class InParts(LatentFlowMatching):
    """Micro-batch k of a step draws the k-th part of what the whole batch draws."""

    parts = 1

    def training_noise(self):
        step, part = divmod(self.trainer.fit_loop.epoch_loop.total_batch_idx, self.parts)
        return Rows(7, step, rank=part, rows=BATCH // self.parts)


class Steps(L.Callback):
    """What is counted in optimizer steps."""

    def __init__(self):
        self.rates, self.norms, self.updates = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.rates):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.updates.append(trainer.callbacks[0].updates)
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())


@pytest.mark.parametrize("parts", [2, 3])
def test_an_accumulated_batch_is_the_batch(tmp_path, parts):
    runs = {}
    for count in (1, parts):
        L.seed_everything(3, verbose=False)
        module, steps = (
            InParts(
                network=network("dit"),
                optimizer=functools.partial(torch.optim.SGD, lr=0.05),
                lr_scheduler=functools.partial(WarmupConstant, warmup_steps=4),
            ),
            Steps(),
        )
        module.parts = count
        options = {"accumulate_grad_batches": count, "max_steps": 6, "limit_val_batches": 0}
        folder = tmp_path / str(count)
        trainer(folder, "32-true", [steps], **options).fit(module, digits(BATCH // count))
        runs[count] = steps, torch.load(folder / "step=6.ckpt", weights_only=True)
    (one, whole), (many, accumulated) = runs[1], runs[parts]
    assert many.rates == one.rates
    assert many.updates == one.updates == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(many.norms, one.norms, rtol=1e-4, atol=1e-6)
    assert max(one.norms) <= 1 + 1e-5  # clipped, once a step
    assert min(one.norms) > 0.9
    for part in ("state_dict", "current_model_state"):
        torch.testing.assert_close(accumulated[part], whole[part], rtol=1e-5, atol=1e-5)
