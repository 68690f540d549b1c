"""fit, validate, test and predict: Lightning's command line with a run folder, named weights and fewer surprises."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_flows.callbacks
import lightning_flows.codecs
import lightning_flows.data
import lightning_flows.metrics
import lightning_flows.modules  # noqa: F401  (imported classes have short names)
from lightning_flows.callbacks import FailTogether, PredictionWriter, SamplingProgress
from lightning_flows.cli import evaluation, runs
from lightning_flows.cli.global_batch import check_global_batch
from lightning_flows.data import Requests
from lightning_flows.modules import Publishable, init_from
from lightning_flows.store import check, read_config, resolve
from lightning_flows.strategies import AtomicCheckpointIO
from lightning_flows.strategies.checkpoint_io import remove_leftovers

# Said by Lightning of itself or of choices that are made here; a reader of the log can do nothing about them.
KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*LightningCLI's args parameter is intended.*",
    ".*Checkpoint directory .* exists and is not empty.*",
)


ORIGIN = ("init_from", "reinit", "resize")  # options that say where a run began


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration into the run folder: ``config.yaml`` for fit, ``VERB.yaml`` for the others."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See `SaveConfigCallback.save_config`."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "config.yaml" if stage == "fit" else f"{getattr(stage, 'value', stage)}.yaml"
        if stage == "fit" and self.config.get("ckpt_path") is not None:
            self._keep_origin(folder / name)
        partial = folder / f".{name}.partial"
        self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=False)
        partial.replace(folder / name)

    def _keep_origin(self, former: Path) -> None:
        """A resumed run still began from the weights that it was started with; `export` names them."""
        if self.config.get("init_from") is None and former.is_file():
            for key, value in runs.blocks_of(former, ORIGIN).items():
                if value is not None:
                    self.config[key] = value


class FlowsCLI(LightningCLI):
    """LightningCLI with a run folder.

    Args:
        recipe: path of the last recipe on the command line, or None.
        kwargs: of LightningCLI.
    """

    def __init__(self, recipe: Path | None, **kwargs: Any) -> None:
        self.recipe = recipe
        super().__init__(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the run, beside those of model, data and trainer."""
        parser.add_argument("--run_name", type=str | None, default=None, help="The run's folder is runs/RUN_NAME.")
        parser.add_argument(
            "--global_batch",
            type=int | None,
            default=None,
            help="fit: samples in one optimizer step over all devices; a run with another number stops.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="fit: start a new run from these weights: a folder, a zoo id, org/name[@revision] or a checkpoint.",
        )
        parser.add_argument(
            "--reinit",
            type=list[str],
            default=[],
            help="fit --init_from: names or patterns of tensors that start afresh.",
        )
        parser.add_argument(
            "--resize",
            type=bool,
            default=False,
            help="fit --init_from: fit tensors to other patches, channels and classes where there is a rule.",
        )
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="validate, test, predict: published weights: a folder, a zoo id or org/name[@revision].",
        )
        evaluation.add_options(parser)

    def _parse_ckpt_path(self) -> None:
        # Lightning would lay the checkpoint's hyperparameters over the command line; the recipe says what is built.
        return

    @property
    def options(self) -> Namespace:
        """The options of the verb."""
        return self.config[self.subcommand]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.options.trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        """Settles the run's folder and the weights before anything is built."""
        options = self.options
        options.run_name = options.run_name or runs.name_of(self.recipe)
        if options.trainer.get("default_root_dir") is None:
            options.trainer.default_root_dir = str(runs.ROOT / options.run_name)
        given = options.get("ckpt_path")
        if given == "last":
            options.ckpt_path = str(runs.newest_last(self.folder, resumable=self.subcommand == "fit"))
        if self.subcommand == "fit":
            self._check_fit(options)
            if given == "auto":
                options.ckpt_path = runs.newest_or_none(self.folder)
        else:
            self._choose_weights(options)
        self._settle_trainer(options.trainer)

    def _check_fit(self, options: Namespace) -> None:
        if options.weights is not None:
            raise ValueError(
                "--weights is for validate, test and predict; to start a run from weights, use --init_from"
            )
        if options.ckpt_path not in (None, "auto") and options.init_from is not None:
            raise ValueError("--ckpt_path resumes a run and --init_from starts a new one: give one of them")
        if options.reinit and options.init_from is None:
            raise ValueError("--reinit names tensors of --init_from, which is not given")
        if options.resize and options.init_from is None:
            raise ValueError("--resize fits tensors of --init_from, which is not given")
        if options.ckpt_path is None and _first() and not options.trainer.fast_dev_run:
            runs.refuse_overwriting(self.folder)

    def _choose_weights(self, options: Namespace) -> None:
        if options.init_from is not None:
            raise ValueError("--init_from is for fit; validate, test and predict take --weights or --ckpt_path")
        if options.ckpt_path is not None and options.weights is not None:
            raise ValueError("--ckpt_path and --weights exclude each other")
        if options.ckpt_path == "auto":
            raise ValueError("--ckpt_path auto resumes or starts a fit; validate, test and predict take last or a file")
        if options.ckpt_path is None and options.weights is None:
            beside = runs.weights_beside(self.recipe)
            if beside is None:
                raise ValueError(
                    f"no weights: give --ckpt_path FILE (or last, of {self.folder}) or --weights FOLDER|ID|org/name, "
                    f"or a recipe that has {runs.WEIGHTS} beside it"
                )
            options.weights = str(beside)

    def _settle_trainer(self, trainer: Namespace) -> None:
        root = trainer.default_root_dir
        if trainer.get("logger") in (None, True):
            trainer.logger = False
            if self.subcommand == "fit":
                entry = {"class_path": "lightning_flows.cli.log.RunLog"}
                trainer.logger = Namespace(**entry, init_args=Namespace(save_dir=root, name="log"))
        callbacks = trainer.get("callbacks") or []
        for callback in callbacks:
            if callback["class_path"].endswith("ModelCheckpoint") and callback.init_args.get("dirpath") is None:
                callback.init_args.dirpath = str(Path(root) / "checkpoints")
        if self.subcommand == "predict":  # our training sampler knows its rank; requests are dealt by Lightning
            trainer.use_distributed_sampler = True

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, with the callbacks without which a verb would leave nothing behind."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        for callback in [*self._needed_callbacks(callbacks), FailTogether()]:
            if not any(_does_the_same(given, callback) for given in callbacks):
                callbacks.append(callback)
        config["callbacks"] = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        _install_checkpoint_io(trainer)
        return trainer

    def _needed_callbacks(self, given: list[L.Callback]) -> list[L.Callback]:
        if self.subcommand == "predict":
            return [PredictionWriter(), SamplingProgress()]
        if self.subcommand == "test":
            options = self.config_init[self.subcommand]
            return evaluation.usual_callbacks(options, self.model, self.datamodule, given)
        if self.subcommand == "fit":
            from lightning.pytorch.callbacks import ModelCheckpoint

            return [ModelCheckpoint(dirpath=self.folder / "checkpoints", save_last=True)]
        return []

    def after_instantiate_classes(self) -> None:
        """Loads weights into the model that the recipe describes; what does not fit is named in one sentence."""
        options = self.options
        if self.subcommand == "fit":
            check_global_batch(options.global_batch, self.trainer, self.datamodule)
        if self.subcommand != "fit":  # weights alone: Lightning would read the whole checkpoint, with worse words
            init_from(self.model, options.weights or options.ckpt_path)
            self.config_init[self.subcommand].ckpt_path = None
        elif options.ckpt_path is not None:
            init_from(self.model, options.ckpt_path)  # Lightning restores it again, together with the rest
        elif options.init_from is not None:
            init_from(self.model, options.init_from, reinit=options.reinit, resize=options.resize)
        if _first() and not options.trainer.fast_dev_run:
            self._prepare_folders()

    def _prepare_folders(self) -> None:
        """The folders that will be written, tried before the work begins; a killed run's half files are removed."""
        callbacks = self.trainer.checkpoint_callbacks if self.subcommand == "fit" else []
        checkpoints = [str(callback.dirpath) for callback in callbacks if callback.dirpath]
        runs.check_writable([self.options.trainer.default_root_dir, *checkpoints])
        for folder in checkpoints:
            remove_leftovers(folder)


def _first() -> bool:
    """Whether this is the process that looks after the run's folder."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _install_checkpoint_io(trainer: L.Trainer) -> None:
    """Atomic checkpoints, unless the recipe or its strategy brings another way of writing them."""
    if getattr(trainer.strategy, "_checkpoint_io", None) is None:
        with suppress(NotImplementedError, TypeError):  # strategies with a format of their own
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _does_the_same(given: L.Callback, needed: L.Callback) -> bool:
    """Whether a recipe has the callback already; an `Evaluation` of the validation is not one of the test."""
    return isinstance(given, type(needed)) and getattr(given, "on", None) == getattr(needed, "on", None)


def run(args: Sequence[str]) -> FlowsCLI:
    """Run a trainer verb.

    Args:
        args: verb and options.

    Raises:
        ValueError: what the command line says does not go together.
    """
    args, recipe = runs.spelled_out(args), None
    if args[0] != "fit" and (weights := runs.weights_alone(args)) is not None:
        args[1:1] = ["--config", _model_of(weights)]
    else:
        recipe = _settle_recipes(args)
    for known in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
    try:
        return FlowsCLI(
            recipe,
            args=args,
            model_class=Publishable,
            datamodule_class=Requests if args[0] == "predict" else L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=args[0] != "predict",
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"inference_mode": False, "use_distributed_sampler": False},
            parser_kwargs={"parser_mode": "omegaconf"},
        )
    except MisconfigurationException as error:  # of the trainer's own arguments
        raise ValueError(str(error)) from error


def _settle_recipes(args: list[str]) -> Path | None:
    """Puts files, or what is left of them for ``predict``, in the place of recipes in ``args``; the last one."""
    recipe = None
    for place in runs.recipes_of(args):
        recipe = runs.find_recipe(args[place])
        args[place] = _requests_instead(recipe) if args[0] == "predict" else str(recipe)
    return recipe


def _model_of(weights: str) -> str:
    """Text of a recipe with the model of published weights alone."""
    config = read_config(resolve(weights))
    check(config, Publishable)
    name = Path(weights).resolve().name if Path(weights).is_dir() else weights.rpartition("/")[2]
    return yaml.safe_dump({"run_name": name, "model": config}, sort_keys=False)


def _requests_instead(recipe: Path) -> str:
    """Text of a recipe whose data block, made for training, is left out (see `data.Requests`)."""
    content = yaml.safe_load(recipe.read_text()) or {}
    data = content.pop("data", None) or {}
    if isinstance(data, dict) and str(data.get("class_path", "")).endswith("Requests"):
        content["data"] = data.get("init_args", {})
    return yaml.safe_dump(content, sort_keys=False)
