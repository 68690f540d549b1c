"""What requests can ask of a normalizing flow beside samples: ``predict`` with ``data.Requests(task=...)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow import Condition
from lightning_flows.modules.likelihood_uses import LikelihoodUses

OPTIONS = {
    "classify": ("candidates", "prior", "batch_size"),
    "score": ("method", "reference", "marginal", "prior", "batch_size"),
    "inpaint": (
        "rule",
        "steps",
        "warmup",
        "step_size",
        "leapfrog",
        "guidance",
        "noisy",
        "denoise",
        "paste",
    ),
    "interpolate": ("n", "guidance", "denoise"),
}
FRAMES = 8  # pictures of an interpolation, both ends included


class LikelihoodTasks(LikelihoodUses):
    """A mixin before `GenerativeModule`: its ``predict_step`` for every task.

    Pictures are tensors; what is said of a picture is a dictionary, which `callbacks.PredictionWriter` writes as JSON.
    """

    tasks = ("sample", *OPTIONS)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """What a batch of requests asks for: ``{"id": list of names, "sample": a tensor or a list of dictionaries}``.

        Raises:
            ValueError: a task or an option of it that is unknown, pictures or a condition that do not fit the model.
        """
        task = batch.get("task") or "sample"
        if task not in OPTIONS:
            return super().predict_step(batch, batch_idx)  # type: ignore[misc]
        self.check_requests(batch)  # type: ignore[attr-defined]
        options = batch.get("task_options") or {}
        if unknown := sorted(set(options) - set(OPTIONS[task])):
            raise ValueError(f"task_options of {task!r} can be {list(OPTIONS[task])}, got {unknown}")
        if batch.get("image") is not None:
            self._check_pictures(batch["image"])
        condition = self.condition_of(batch)  # type: ignore[attr-defined]
        return getattr(self, f"_{task}_requests")(batch, condition, options)

    def _classify_requests(self, batch: Any, condition: Condition | None, options: dict[str, Any]) -> dict[str, Any]:
        found = self.classify(batch["image"], seeds=batch["seed"], progress=self._progress, **options)
        named = options.get("candidates") or list(range(found.scores.shape[1]))
        rows = zip(found.label.tolist(), found.scores.tolist(), found.log_prob.tolist(), strict=True)
        records = [
            {"label": label, "candidates": list(named), "log_posterior": scores, "log_prob": nats}
            for label, scores, nats in rows
        ]
        for record in records if "tokens" in self.network.streams else []:
            record["caption"] = named[record["label"]]
        return {"id": batch["id"], "sample": records}

    def _score_requests(self, batch: Any, condition: Condition | None, options: dict[str, Any]) -> dict[str, Any]:
        method = options.get("method", "nll")
        scores = self.anomaly_score(batch["image"], condition, seeds=batch["seed"], progress=self._progress, **options)
        records = [{"score": score, "method": method, "unit": "nats per dimension"} for score in scores.tolist()]
        return {"id": batch["id"], "sample": records}

    def _inpaint_requests(self, batch: Any, condition: Condition | None, options: dict[str, Any]) -> dict[str, Any]:
        found = self.inpaint(
            batch["image"], batch["mask"], condition, seeds=batch["seed"], progress=self._progress, **options
        )
        return {"id": batch["id"], "sample": found.x}

    def _interpolate_requests(self, batch: Any, condition: Condition | None, options: dict[str, Any]) -> dict[str, Any]:
        names, frames, images = [], [], batch.get("image")
        for i, name in enumerate(batch["id"]):
            ends = [int(seed) for seed in batch["seed"][i]] if images is None else images[i]
            own = None if condition is None else condition[[i]]
            made = self.interpolate(*ends, **{"n": FRAMES, **options}, condition=own)
            frames += list(made)
            names += [f"{name}-{k:02d}" for k in range(len(made))]
        return {"id": names, "sample": frames}

    @property
    def _progress(self) -> Any:
        return self.progress  # type: ignore[attr-defined]

    def _check_pictures(self, x: Tensor) -> None:
        """Refuse pictures (..., C, H, W) of which the model has no density, in the words of the requests."""
        given = tuple(x.shape[-3:])
        latent = tuple(self.codec.latent_shape(given))  # type: ignore[attr-defined]
        try:
            like = self.network.patchify(torch.empty(1, *latent, device="meta"))
            rows, columns = (side // self.network.patch_size for side in latent[1:])
            self.network.rotations(rows, columns, like.device)
        except ValueError as error:
            own = tuple(self.shape)  # type: ignore[attr-defined]
            raise ValueError(
                f"images of shape {given} have latents of shape {latent}, those of the model have {own} ({error}): "
                "give the requests other channels=... and size=..."
            ) from None
