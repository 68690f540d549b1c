"""The card of a model: what it is, how to use it, and every figure beside what it was measured with.

A card is a README.md with a header that the Hub reads (library, licence, data, base model, results) and a
body that people read. A figure without its counts, extractor, seed, solver and network calls cannot be
compared with another one, so the table has a column for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_flows.hub.semantic_cards import semantic_tasks, semantic_usage, semantics
from lightning_flows.store import entries, write_text

CARD = "README.md"
METRICS = "metrics.json"
LIBRARY = "lightning_flows"
_COLUMNS = {
    "real": "real",
    "samples": "samples",
    "extractor": "extractor",
    "guidance_scale": "guidance",
    "solver": "solver",
    "steps": "steps",
    "method": "inverse",
    "denoise": "denoise",
    "nfe": "network calls",
    "passes": "passes",
    "seed": "seed",
    "device": "hardware",
    "seconds_per_sample": "s/sample",
}


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        name: of the metric, such as ``kid`` or ``frechet[digits]``.
        value: the number.
        setting: what it was measured with: counts, extractor, seed, solver, network calls, ...
    """

    name: str
    value: float
    setting: Mapping[str, Any] = field(default_factory=dict)


def figures(metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Figure]:
    """Figures of a ``metrics.json``.

    Args:
        metrics: what the callback `Evaluation` writes (``{"test": {"values": {name: entry}}}``), a mapping of
            names to entries or numbers, or a list of entries with a ``name``. An entry holds ``value`` and
            its setting.

    Returns:
        The numbers, in order; entries whose value is null are left out, a value of several numbers gives
        several.
    """
    return [figure for name, entry in _named(metrics or {}) for figure in _numbers(name, entry)]


def card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    licence: str,
    model_id: str = "model",
    summary: str = "",
    data: str | Sequence[str] = (),
    split: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    command: str | None = None,
    task: str | None = None,
    dtype: str = "float32",
) -> str:
    """Text of a model card.

    Args:
        config: config of the model.
        metrics: see `figures`.
        licence: of the weights, an identifier of the Hub such as ``apache-2.0``; it must agree with the
            data's.
        model_id: zoo id, or ``org/name`` on the Hub.
        summary: what the model is, in a few sentences.
        data: names of the data sets that it was trained on.
        split: part of the data with which it was compared.
        base_model: reference of the weights that training started from.
        tags: further tags.
        command: shell command that gives the figures again.
        task: identifier of the Hub for what the model does; None says it from the model's class: an autoencoder is
            ``image-to-image``, what reads masks ``image-segmentation``, what reads labels alone
            ``image-classification``, anything else ``unconditional-image-generation``.
        dtype: in which the weights are stored, where it is not the float32 that they are loaded as.

    Returns:
        README text with its YAML header.

    Raises:
        ValueError: an empty licence.
    """
    if not licence.strip():
        raise ValueError("licence='' says nothing; give an identifier such as 'apache-2.0' or 'cc-by-4.0'.")
    names = [data] if isinstance(data, str) else list(data)
    found = figures(metrics)
    others = semantic_tasks(semantics(config))
    task = task or _task(config, others)
    every = [kind_of(config), "lightning", *others, *tags]
    header = header_text(model_id, licence, names, split, base_model, every, task, found)
    sections = [
        f"# {model_id}",
        summary or f"A `{family(config)}` model of `{LIBRARY}`.",
        f"## Use\n\n{usage(config, model_id)}",
        results_text(found, names, split, command),
        origin_text(licence, names, base_model, dtype),
    ]
    return f"---\n{header}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def write_card(
    folder: str | Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    **about: Any,
) -> Path:
    """Write `card` as ``README.md`` of a folder, whole or not at all.

    Args:
        folder: of the model.
        config: config of the model.
        metrics: see `figures`.
        **about: the keyword arguments of `card`; ``model_id`` is the folder's name where it is not given.

    Returns:
        The file.
    """
    file = Path(folder) / CARD
    write_text(file, card(config, metrics, **{"model_id": Path(folder).resolve().name, **about}))
    return file


def read_header(folder: str | Path) -> dict[str, Any]:
    """What the header of a folder's card says; empty without a card or without a header.

    Raises:
        ValueError: the header is not YAML.
    """
    file = Path(folder) / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError as error:
        raise ValueError(f"the header of {file} is not YAML ({str(error).splitlines()[0]}).") from error
    return header if isinstance(header, dict) else {}


def family(config: Mapping[str, Any]) -> str:
    """Name of the class of a config's model."""
    return str(config["class_path"]).rpartition(".")[2]


def is_autoencoder(config: Mapping[str, Any]) -> bool:
    """Whether a config's model encodes and decodes, and draws no samples: known by the name of its class."""
    return family(config).endswith("Autoencoder")


def kind_of(config: Mapping[str, Any]) -> str:
    """Tag of what a config's model is: known by the name of its class."""
    if is_autoencoder(config):
        return "autoencoder"
    if family(config).endswith("SymmFlow"):
        return "symmflow"
    return "normalizing-flow" if family(config).endswith("NormalizingFlow") else "flow-matching"


def _task(config: Mapping[str, Any], others: Sequence[str]) -> str:
    if is_autoencoder(config):
        return "image-to-image"
    return others[0] if others else "unconditional-image-generation"


def _named(metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    if not isinstance(metrics, Mapping):
        yield from ((str(entry["name"]), entry) for entry in metrics)
        return
    for name, entry in metrics.items():
        values = entry.get("values") if isinstance(entry, Mapping) else None
        if isinstance(values, Mapping):  # a block of a stage
            yield from values.items()
        else:
            yield name, entry


def _numbers(name: str, entry: Any) -> Iterator[Figure]:
    value = entry.get("value") if isinstance(entry, Mapping) else entry
    setting = {key: entry[key] for key in entry if key not in ("name", "value")} if value is not entry else {}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield Figure(name, value, setting)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(f"{name}/{key}", {**setting, "value": part})


def header_text(
    model_id: str,
    licence: str,
    data: list[str],
    split: str | None,
    base_model: str | None,
    tags: Sequence[str],
    task: str,
    found: list[Figure],
    **more: str,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=task,
            dataset_type=data[0] if data else "unstated",
            dataset_name=data[0] if data else "unstated",
            dataset_split=split,
            metric_type=figure.name,
            metric_value=figure.value,
            metric_args={key: value for key, value in figure.setting.items() if value is not None} or None,
        )
        for figure in found
    ]
    about = ModelCardData(
        library_name=LIBRARY,
        license=licence,
        tags=list(tags),
        datasets=data or None,
        base_model=base_model,
        pipeline_tag=task,
        model_name=model_id if results else None,
        eval_results=results or None,
        **more,
    )
    return str(about.to_yaml())


def usage(config: Mapping[str, Any], model_id: str) -> str:
    """Markdown with the lines of Python that use a model, its ``model_id`` being what ``from_pretrained`` takes."""
    if is_autoencoder(config):
        return (
            "```python\nimport lightning_flows as lf\n\n"
            f'model = lf.from_pretrained("{model_id}")\n'
            "z = model.encode(images)  # (B, c, h, w), from images (B, C, H, W) in [-1, 1]\n"
            "images = model.decode(z)\n```\n\n"
            f'As the codec of a latent model: `lightning_flows.codecs.AutoencoderKL("{model_id}")`.'
        )
    if counts := semantics(config):
        return semantic_usage(counts, model_id)
    classes = [entry["init_args"].get("num_classes") for _, entry in entries(config) if "init_args" in entry]
    labels = next((number for number in classes if isinstance(number, int) and number > 0), None)
    asked = f"lf.Condition(label=torch.arange({min(labels, 10)}))" if labels else "n=16"
    imports = "import torch\n\nimport lightning_flows as lf" if labels else "import lightning_flows as lf"
    return (
        f"```python\n{imports}\n\n"
        f'model = lf.from_pretrained("{model_id}")\n'
        f"images = model.sample({asked}, seed=0)  # (B, C, H, W) in [-1, 1]\n```"
    )


def results_text(found: list[Figure], data: list[str], split: str | None, command: str | None) -> str:
    if not found:
        return ""
    columns = [key for key in _COLUMNS if any(figure.setting.get(key) is not None for figure in found)]
    lines = ["metric", "value", *(_COLUMNS[key] for key in columns)]
    table = [_row(lines), _row(["---"] * len(lines))]
    for figure in found:
        table.append(_row([figure.name, _text(figure.value), *(_text(figure.setting.get(key)) for key in columns)]))
    against = f"Measured on {', '.join(data)}{f' ({split})' if split else ''}.\n\n" if data else ""
    again = f"\n\nThe figures come from\n\n```bash\n{command}\n```" if command else ""
    return f"## Results\n\n{against}" + "\n".join(table) + again


def origin_text(licence: str, data: list[str], base_model: str | None, dtype: str) -> str:
    lines = [f"Licence of the weights: {licence}."]
    lines += [f"Stored as {dtype} (small tensors as float32), loaded as float32."] if dtype != "float32" else []
    lines += [f"Trained on {', '.join(data)}."] if data else []
    lines += [f"Training started from {base_model}."] if base_model else []
    return "## Origin\n\n" + " ".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
