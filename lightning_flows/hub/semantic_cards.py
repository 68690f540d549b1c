"""What the card of a model says that reads masks or labels from images (`modules.SymmFlow`), by its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_flows.store import build

TASKS = {"mask": ("image-segmentation", "mask-to-image"), "label": ("image-classification",)}  # the first are the Hub's


def semantics(config: Mapping[str, Any]) -> dict[str, int]:
    """Number of classes of each field (``mask``, ``label``) that a config's model reads from images.

    Empty for models that read none, and where the code is a class of another package, which is not imported for a card.
    """
    entry = config.get("init_args", {}).get("semantic")
    if not isinstance(entry, Mapping):
        return {}
    try:
        return dict(build(entry).num_classes)
    except ValueError:
        return {}


def semantic_tasks(counts: Mapping[str, int]) -> list[str]:
    """Tags of what is done with the fields of `semantics`, the one that counts most first."""
    return [tag for name, tags in TASKS.items() if name in counts for tag in tags]


def semantic_usage(counts: Mapping[str, int], model_id: str) -> str:
    """Markdown with lines of Python that read images and draw others from what was read."""
    lines = ["import lightning_flows as lf", "", f'model = lf.from_pretrained("{model_id}")']
    asked = []
    if "mask" in counts:
        lines.append(f"mask = model.segment(images).labels  # (B, H, W) of 0..{counts['mask'] - 1}, {_IMAGES}")
        asked.append("spatial=mask[:, None]")
    if "label" in counts:
        lines.append(f"label = model.classify(images).labels  # (B,) of 0..{counts['label'] - 1}, {_IMAGES}")
        asked.append("label=label")
    lines.append(f"drawn = model.sample(lf.Condition({', '.join(asked)}), seed=0)  # (B, C, H, W) in [-1, 1]")
    return "```python\n" + "\n".join(lines) + "\n```"


_IMAGES = "from images (B, C, H, W) in [-1, 1]"
