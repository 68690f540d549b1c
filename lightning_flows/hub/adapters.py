"""An adapter on the Hub: its card names the base model, and its folder is checked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_flows.hub.cards import (
    CARD,
    LIBRARY,
    figures,
    header_text,
    kind_of,
    origin_text,
    read_header,
    results_text,
)
from lightning_flows.networks.adapter_folder import ADAPTER_CONFIG, read_adapter
from lightning_flows.store import CONFIG, read_config, write_text, zoo_folders
from lightning_flows.store.resolve import ORGANISATION

TASK = "unconditional-image-generation"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / CONFIG).is_file()


def check_adapter(folder: str | Path) -> Path:
    """Refuse an adapter that others could not load or may not use.

    Returns:
        The folder.

    Raises:
        ValueError: config, weights, card or base model are not fit to be published; says what to mend.
    """
    source = Path(folder)
    config, _ = read_adapter(source)
    base = config["base"]
    if not base or _is_local(base):
        raise ValueError(
            f"{source / ADAPTER_CONFIG}: base_model_name_or_path={base!r} is no model that others can load: publish "
            "the base (lightning-flows push FOLDER org/name) and save the adapter with base='org/name@revision'"
        )
    if not read_header(source).get("license"):
        raise ValueError(
            f"{source / CARD} states no licence: push with licence (--licence apache-2.0, say), which writes a card, "
            "or write 'license: <identifier>' into its header."
        )
    return source


def adapter_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    licence: str,
    model_id: str = "adapter",
    summary: str = "",
    data: str | Sequence[str] = (),
    split: str | None = None,
    command: str | None = None,
) -> str:
    """Text of an adapter's card.

    Args:
        config: what `networks.adapter_folder.read_adapter` returns.
        metrics: see `figures`.
        licence: of the adapter; it must agree with those of its data and of its base model.
        model_id: ``org/name`` on the Hub.
        summary: what the adapter does, in a few sentences.
        data: names of the data sets that it was trained on.
        split: part of the data with which it was compared.
        command: shell command that gives the figures again.

    Returns:
        README text with its YAML header.

    Raises:
        ValueError: an empty licence.
    """
    if not licence.strip():
        raise ValueError("licence='' says nothing; give an identifier such as 'apache-2.0' or 'cc-by-4.0'.")
    names, found, base = [data] if isinstance(data, str) else list(data), figures(metrics), config["base"] or "unknown"
    repo = base.partition("@")[0]
    repo = repo if "/" in repo else f"{ORGANISATION}/{repo}"
    tags = ["lora", *_kinds(base), "lightning"]
    header = header_text(model_id, licence, names, split, repo, tags, TASK, found, base_model_relation="adapter")
    usage = (
        "## Use\n\n```python\nimport lightning_flows as lf\n\n"
        f'model = lf.from_pretrained("{base}")\nlf.load_adapter(model, "{model_id}")  # needs peft\n'
        "images = model.sample(n=16, seed=0)  # with a condition where the model takes one\n```\n\n"
        "`lf.merge_adapters(model)` adds it to the weights."
    )
    about = f"A low-rank adapter (LoRA, rank {config['r']}) of `{base}` for `{LIBRARY}`."
    sections = [
        f"# {model_id}",
        f"{summary} {about}".strip(),
        usage,
        results_text(found, names, split, command),
        origin_text(licence, names, base, "float32"),
    ]
    return f"---\n{header}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def write_adapter_card(
    folder: str | Path,
    metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    **about: Any,
) -> Path:
    """Write `adapter_card` as ``README.md`` of an adapter's folder, whole or not at all.

    Args:
        folder: what `networks.save_adapter` wrote.
        metrics: see `figures`.
        **about: the keyword arguments of `adapter_card`; ``model_id`` is the folder's name where it is not given.

    Returns:
        The file.
    """
    file = Path(folder) / CARD
    config, _ = read_adapter(folder)
    write_text(file, adapter_card(config, metrics, **{"model_id": Path(folder).resolve().name, **about}))
    return file


def _kinds(base: str) -> list[str]:
    """Tag of what a base model is, where its config lies on this machine: an adapter's own folder does not say it."""
    name = base.partition("@")[0]
    folders = [Path(name), *(place / name for place in zoo_folders())]
    return [kind_of(read_config(folder)) for folder in folders if (folder / CONFIG).is_file()][:1]


def _is_local(base: str) -> bool:
    """Whether a reference is a place on this machine: neither a zoo id nor ``org/name[@revision]``."""
    name = base.partition("@")[0]
    return (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix == ".ckpt" or Path(name).exists()
    )
