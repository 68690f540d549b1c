"""One config: whatever way an object is built, it records the same JSON."""

import copy
import functools
import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

from lightning_flows.store import Recorded, build, config_of, public_path

HERE = __name__


class Net(Recorded, torch.nn.Module):
    def __init__(self, dim: int = 3, *, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__()
        self.betas = betas
        self.linear = torch.nn.Linear(dim, dim)


class Wide(Net):
    def __init__(self, factor: int, inner: torch.nn.Module | None = None) -> None:
        super().__init__(dim=2 * factor)
        self.inner = inner


class Inherits(Net):
    pass


class Model(Recorded, pl.LightningModule):
    def __init__(
        self,
        network: torch.nn.Module,
        interval: tuple[float, float] = (0.0, 1.0),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network", "optimizer", "lr_scheduler"])
        self.network = network
        self.interval = interval
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler


class Derived(Model):
    def __init__(self, network: torch.nn.Module, extra: int = 1) -> None:
        super().__init__(network)
        self.extra = extra


class Data(Recorded, pl.LightningDataModule):
    def __init__(self, root: str | Path, batch_size: int = 8) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size


@dataclass(frozen=True)
class Shift:
    scale: float = 1.0
    inner: object = None


def entry(name, **init_args):
    return {"class_path": f"{HERE}.{name}", "init_args": init_args}


def test_defaults_of_our_classes_are_filled_in():
    assert Net().config == entry("Net", dim=3, betas=[0.9, 0.95])
    assert Net(5).config["init_args"]["dim"] == 5


def test_only_the_outermost_constructor_is_recorded():
    assert Wide(2, Net(4)).config == entry("Wide", factor=2, inner=Net(4).config)
    assert Inherits(7).config == entry("Inherits", dim=7, betas=[0.9, 0.95])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_the_record_survives_copies(duplicate):
    model = Wide(2, inner=Net(4))
    assert duplicate(model).config == model.config


def test_the_record_cannot_be_changed_from_outside():
    net = Net()
    net.config["init_args"]["dim"] = 99
    assert net.config["init_args"]["dim"] == 3


def test_recording_hides_no_signature():
    assert list(inspect.signature(Wide).parameters) == ["factor", "inner"]


def test_wrong_arguments_fail_as_in_any_class():
    with pytest.raises(TypeError, match="colour"):
        Net(colour=1)


def test_the_record_is_neither_a_parameter_nor_a_tensor_of_the_checkpoint():
    assert set(Net().state_dict()) == {"linear.weight", "linear.bias"}


def test_lightning_hparams_see_the_outermost_arguments():
    assert dict(Derived(Net(), extra=4).hparams)["extra"] == 4


def test_datamodules_record_paths_as_strings():
    assert Data(Path("a") / "b").config == entry("Data", root="a/b", batch_size=8)


def test_frozen_dataclasses_are_read_by_fields():
    assert config_of(Shift(2.0, Shift())) == entry("Shift", scale=2.0, inner=entry("Shift", scale=1.0, inner=None))


@pytest.mark.parametrize(
    ("cls", "path"),
    [
        (torch.optim.AdamW, "torch.optim.AdamW"),
        (torch.nn.Linear, "torch.nn.Linear"),
        (torch.optim.lr_scheduler.CosineAnnealingLR, "torch.optim.lr_scheduler.CosineAnnealingLR"),
        (Net, f"{HERE}.Net"),
    ],
)
def test_class_paths_are_public(cls, path):
    assert public_path(cls) == path


ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


@pytest.mark.parametrize(
    "given",
    [
        torch.optim.AdamW,
        functools.partial(torch.optim.AdamW, lr=1e-3),
        functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.999)),
        {"class_path": "torch.optim.AdamW"},
        {"class_path": "torch.optim.adamw.AdamW", "init_args": {"eps": 1e-8}},
    ],
)
def test_every_spelling_of_an_optimizer_is_one_config(given):
    assert config_of(given) == ADAMW


def test_what_differs_from_the_default_is_kept():
    partial = functools.partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))
    assert config_of(partial)["init_args"] == {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}


def local_function(parameters):
    return parameters


@pytest.mark.parametrize(
    "value",
    [
        lambda parameters: None,
        local_function,
        functools.partial(local_function, 1),
        torch.nn.Linear(1, 1),
        torch.zeros(2),
        torch.float32,
        {1: 2},
        {1, 2},
        float("nan"),
        float("inf"),
        b"bytes",
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(value):
    with pytest.raises(ValueError, match="argument 'inner'") as caught:
        Wide(1, inner=value)
    assert " at 0x" not in str(caught.value)


def test_numbers_of_other_libraries_become_plain_numbers():
    numpy = pytest.importorskip("numpy")
    recorded = config_of([numpy.float64(0.5), numpy.int64(3), True, None])
    assert recorded == [0.5, 3, True, None]
    assert [type(value) for value in recorded] == [float, int, bool, type(None)]


def from_cli(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    cli = LightningCLI(
        pl.LightningModule,
        subclass_mode_model=True,
        run=False,
        auto_configure_optimizers=False,
        save_config_callback=None,
        trainer_defaults={"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
        args=["-c", str(recipe)],
    )
    return cli.model


RECIPE = f"""
model:
  class_path: {HERE}.Model
  init_args:
    network: {{class_path: {HERE}.Net, init_args: {{dim: 4}}}}
    interval: [0.1, 0.9]
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 3e-4, betas: [0.9, 0.95]}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {{T_max: 10}}}}
"""


def test_the_command_line_and_python_record_the_same_config(tmp_path):
    by_hand = Model(
        Net(4),
        interval=(0.1, 0.9),
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95)),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10),
    )
    by_cli = from_cli(tmp_path, RECIPE)
    assert by_cli.config == by_hand.config
    assert json.loads(json.dumps(by_hand.config)) == by_hand.config


def test_the_command_line_and_python_agree_on_defaults(tmp_path):
    by_cli = from_cli(tmp_path, f"model: {{class_path: {HERE}.Model, init_args: {{network: {HERE}.Net}}}}")
    assert by_cli.config == Model(Net()).config


def test_a_module_of_the_command_line_is_rebuilt_from_its_config(tmp_path):
    model = from_cli(tmp_path, RECIPE)
    again = build(model.config, trust_remote_code=True)
    assert again.config == model.config
    optimizer = again.optimizer(again.parameters())
    assert optimizer.defaults["lr"] == 3e-4
    assert again.lr_scheduler(optimizer).T_max == 10
    assert again.interval == (0.1, 0.9)


class Holder(Recorded):
    def __init__(
        self,
        sizes: tuple[int, ...] = (1, 2),
        table: dict[str, list[tuple[int, int]]] | None = None,
        listed: list[int] | None = None,
        make: Callable[..., torch.nn.Module] = torch.nn.Identity,
        kind: type[torch.nn.Module] = torch.nn.ReLU,
    ) -> None:
        self.given = (sizes, table, listed, make, kind)


def test_lists_become_tuples_where_the_constructor_says_so():
    config = Holder((3, 4), {"a": [(1, 2)]}, [5], kind=torch.nn.GELU).config
    sizes, table, listed, make, kind = build(config, trust_remote_code=True).given
    assert (sizes, table, listed) == ((3, 4), {"a": [(1, 2)]}, [5])
    assert isinstance(make(), torch.nn.Identity)
    assert kind is torch.nn.GELU
