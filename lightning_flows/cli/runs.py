"""A run has one folder: where it lies, what it holds, and where its weights come from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path("runs")
ASSETS = Path(__file__).parent.parent / "_assets"
WEIGHTS = "model.safetensors"


def spelled_out(args: Sequence[str]) -> list[str]:
    """``args`` with ``--config=PATH`` as two arguments, so that `recipes_of` finds every recipe."""
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith(("--config=", "-c=")) else [arg])]


def recipes_of(args: Sequence[str]) -> list[int]:
    """Places in ``args`` that hold the path of a recipe (the values of ``-c`` and ``--config``)."""
    places = [i + 1 for i, arg in enumerate(args[:-1]) if arg in ("-c", "--config")]
    return places


def weights_alone(args: Sequence[str]) -> str | None:
    """Value of ``--weights`` where neither a recipe nor a model is named: then the weights say what the model is."""
    if recipes_of(args) or any(arg.partition("=")[0] == "--model" for arg in args):
        return None
    spelled = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--weights=") else [arg])]
    return spelled[spelled.index("--weights") + 1] if "--weights" in spelled[:-1] else None


def find_recipe(path: str) -> Path:
    """A recipe by its path, or by the same path among those bundled with the package.

    Raises:
        ValueError: neither exists.
    """
    for candidate in (Path(path), ASSETS / path, Path(__file__).parents[2] / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"the recipe {path} does not exist, neither here nor among those of the package")


def blocks_of(recipe: Path, names: Sequence[str]) -> dict[str, Any]:
    """Some blocks of a recipe by their dotted places, interpolations filled in; None for those that it lacks.

    Raises:
        ValueError: it is not YAML.
    """
    import yaml  # here: the small verbs do not wait for these
    from omegaconf import OmegaConf

    try:
        content: Any = OmegaConf.create(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not YAML: {error}") from error
    found = {name: OmegaConf.select(content, name) for name in names}
    return {n: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for n, v in found.items()}


def name_of(recipe: Path | None) -> str:
    """Name of a run by its recipe: the stem of the file, or the folder's name for a ``recipe.yaml`` beside weights."""
    if recipe is None:
        return "unnamed"
    return recipe.resolve().parent.name if recipe.stem == "recipe" else recipe.stem


def checkpoints_of(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    files = [path for path in (run / "checkpoints").glob("*.ckpt") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_mtime)


def newest_last(run: Path, *, resumable: bool = False) -> Path:
    """The newest ``last`` checkpoint of a run that is whole; where none is, the newest of the others.

    Args:
        run: its folder.
        resumable: training shall go on from it: files with weights alone are passed over.

    Raises:
        ValueError: the folder holds none, or none that can be used; names them.
    """
    from lightning_flows.strategies.checkpoint_io import checkpoints_in, first_usable  # here: loads lightning

    folder = run / "checkpoints"
    files = sorted(checkpoints_in(folder), key=lambda file: not file.stem.startswith("last"))  # stable: newest first
    found = first_usable(files, resumable=resumable)
    if found is None:
        raise ValueError(
            f"--ckpt_path last: {folder} holds no last.ckpt. Train first (lightning-flows fit), or name "
            "another run with --run_name"
        )
    return found


def newest_or_none(run: Path) -> str | None:
    """What ``--ckpt_path auto`` resumes: the newest checkpoint of a run that is whole; None for a run without any.

    Raises:
        ValueError: there are checkpoints, but none can be used; names them.
    """
    from lightning_flows.strategies.checkpoint_io import newest_checkpoint  # here: loads lightning

    found = newest_checkpoint(run / "checkpoints")
    return None if found is None else str(found)


def check_writable(folders: Iterable[str]) -> None:
    """Writes a small file into each local folder, and removes it: what cannot be written is said before the work.

    Raises:
        ValueError: a folder cannot be made, or no file in it; names the folder and the reason.
    """
    for folder in (Path(folder) for folder in folders if "://" not in folder):
        probe = folder / f".{os.getpid()}.probe"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(bytes(4096))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"the run's folder {folder} cannot be written: {error.strerror or error}. Name another one with "
                "--run_name NAME (of runs/NAME) or --trainer.default_root_dir FOLDER"
            ) from error


def refuse_overwriting(run: Path) -> None:
    """Stops a fresh fit where a run already is.

    Raises:
        ValueError: the folder holds checkpoints.
    """
    if checkpoints_of(run):
        raise ValueError(
            f"{run} already holds a run. Resume it with --ckpt_path last (or auto, which also starts one), or give "
            "the new one a name with --run_name NAME"
        )


def weights_beside(recipe: Path | None) -> Path | None:
    """Folder of the recipe if weights lie there, else None."""
    if recipe is None or not (recipe.parent / WEIGHTS).is_file():
        return None
    return recipe.parent
