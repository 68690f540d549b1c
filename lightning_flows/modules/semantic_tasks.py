"""What requests can ask of a model of image and semantics: ``predict`` with ``data.Requests(task=...)``."""

from __future__ import annotations

from typing import Any

from lightning_flows.codecs import LabelMap
from lightning_flows.modules.mask_editing import MaskEditing
from lightning_flows.modules.reading import Reading

OPTIONS: dict[str, tuple[str, ...]] = {
    "segment": ("steps", "votes", "uncertainty"),
    "classify": ("steps", "votes"),
    "edit": ("steps", "grow", "guidance"),
}
FIELD = {"segment": "mask", "classify": "label"}  # that a task reads


class SemanticTasks(MaskEditing):
    """A mixin before `GenerativeModule`: its ``predict_step`` for every task.

    Images and pictures of uncertainty are tensors, masks `codecs.LabelMap`, and what is said of an image is a
    dictionary, which `callbacks.PredictionWriter` writes as JSON.
    """

    tasks = ("sample", *OPTIONS)

    def predict_step(self: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
        """What a batch of requests asks for; without a task, images alone are read, else samples are drawn.

        Returns:
            ``{"id": names, "sample": images, or a list of images, `codecs.LabelMap` and dictionaries}``.

        Raises:
            ValueError: a task or option that is unknown, or requests that do not fit the model.
        """
        task = batch.get("task") or self._task_of(batch)
        if task not in OPTIONS:
            return super().predict_step(batch, batch_idx)  # type: ignore[misc]
        self.check_requests({**batch, "task": task})
        options = dict(batch.get("task_options") or {})
        if unknown := sorted(set(options) - set(OPTIONS[task])):
            raise ValueError(f"task_options of {task!r} can be {list(OPTIONS[task])}, got {unknown}")
        if missing := [name for name in _needs(task) if batch.get(name) is None]:
            raise ValueError(f"task {task!r} needs {missing} of each request")
        return self._edit_requests(batch, options) if task == "edit" else self._read_requests(task, batch, options)

    def _task_of(self: Any, batch: Any) -> str:
        """What requests ask for that do not say it."""
        if batch.get("image") is None:
            return "sample"
        if given := [name for name in ("mask", "label") if batch.get(name) is not None]:
            raise ValueError(f"the requests give images and {given}: name a task, one of {self.tasks}")
        return "segment" if "mask" in self.semantic.keys else "classify"

    def _edit_requests(self: Any, batch: Any, options: dict[str, Any]) -> dict[str, Any]:
        told = {"label": batch.get("label"), "seeds": batch["seed"], "progress": self.progress}
        return {"id": batch["id"], "sample": self.edit(batch["image"], batch["mask"], **told, **options)}

    def _read_requests(self: Any, task: str, batch: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Masks as pictures, of labels a record; asked for masks, a model of both says both."""
        field, known, votes = FIELD[task], list(self.semantic.keys), options.get("votes", 1)
        if field not in known:
            raise ValueError(f"task {task!r} needs a model of {field}s, this one knows {known}")
        unsure = options.pop("uncertainty", False)
        if unsure and votes < 2:
            raise ValueError(f"uncertainty is how much votes disagree: votes must be at least 2, got {votes}")
        reading = self.read(batch["image"], seeds=batch["seed"], scores=False, progress=self.progress, **options)
        told = [said for i, name in enumerate(batch["id"]) for said in self._said(task, reading, i, name, unsure)]
        return {"id": [name for name, _ in told], "sample": [sample for _, sample in told]}

    def _said(self: Any, task: str, reading: Reading, i: int, name: str, unsure: bool) -> list[tuple[str, Any]]:
        """Names and samples of request i."""
        if task == "classify":
            return [(name, _record(reading, i))]
        told: list[tuple[str, Any]] = [
            (name, LabelMap(reading.decoded["mask"].labels[i].cpu(), self.semantic.colours()))
        ]
        if unsure and reading.uncertainty is not None:
            told.append((f"{name}-uncertainty", reading.uncertainty["mask"][i].cpu()[None] * 2 - 1))  # (1, H, W)
        return told + ([(f"{name}-class", _record(reading, i))] if "label" in reading.decoded else [])


def _needs(task: str) -> tuple[str, ...]:
    return ("image", "mask") if task == "edit" else ("image",)


def _record(reading: Reading, i: int) -> dict[str, Any]:
    found = reading.decoded["label"]
    record = {"label": int(found.labels[i]), "scores": found.scores[i].tolist()}
    if reading.uncertainty is not None:
        record["uncertainty"] = float(reading.uncertainty["label"][i])
    return record
