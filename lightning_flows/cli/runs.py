"""A run has one folder: where it lies, what it holds, and where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
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


def newest_last(run: Path) -> Path:
    """The newest ``last`` checkpoint of a run.

    Raises:
        ValueError: the folder holds none.
    """
    found = [path for path in checkpoints_of(run) if path.stem.startswith("last")]
    if not found:
        raise ValueError(
            f"--ckpt_path last: {run / 'checkpoints'} holds no last.ckpt. Train first (lightning-flows fit), or name "
            "another run with --run_name"
        )
    return found[-1]


def refuse_overwriting(run: Path) -> None:
    """Stops a fresh fit where a run already is.

    Raises:
        ValueError: the folder holds checkpoints.
    """
    if checkpoints_of(run):
        raise ValueError(
            f"{run} already holds a run. Resume it with --ckpt_path last, or give the new one a name with "
            "--run_name NAME"
        )


def weights_beside(recipe: Path | None) -> Path | None:
    """Folder of the recipe if weights lie there, else None."""
    if recipe is None or not (recipe.parent / WEIGHTS).is_file():
        return None
    return recipe.parent
