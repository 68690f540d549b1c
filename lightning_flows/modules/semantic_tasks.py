"""What a model of image and semantics does beside drawing: it reads masks and labels, inverts and edits images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flows.codecs import Decoded, LabelMap
from lightning_flows.flow import SampleNoise, Solution, Solver
from lightning_flows.modules.base import Progress, evaluation
from lightning_flows.modules.joint_field import JointField, between, joint

OPTIONS: dict[str, tuple[str, ...]] = {
    "segment": ("steps", "votes", "uncertainty"),
    "classify": ("steps", "votes"),
    "edit": ("steps", "grow", "guidance"),
}


class Reading(NamedTuple):
    """What is read from images.

    Attributes:
        decoded: labels and scores of each field, ``{"mask": ..., "label": ...}``; scores are means over the votes.
        noise: the image carried to noise, in the units of the network, (B, C, h, w), of the first vote.
        code: the code that was reached, undecoded, (B, S, h, w), of the first vote.
        uncertainty: how much the votes disagree, of each field: the variance of the scores over the votes, summed over
            the classes, (B, H, W) or (B,), in [0, 1]; None for a single vote.
        nfe: calls of the network.
    """

    decoded: dict[str, Decoded]
    noise: Tensor
    code: Tensor
    uncertainty: dict[str, Tensor] | None
    nfe: int


class SemanticTasks:
    """A mixin of `SymmFlow`: reading, inversion, editing, and ``predict_step`` for each."""

    tasks = ("sample", *OPTIONS)

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(
        self: Any,
        image: Tensor,
        *,
        steps: int | None = None,
        votes: int = 1,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> Reading:
        """Masks and labels of images: the flow backwards from the image and noise in the place of its code.

        Args:
            image: in data space, (B, ...).
            steps: intervals of the time grid; ``read_steps`` by default. One gives the mean of the code given the
                image; more also carry the image to noise, from which it can be drawn again.
            votes: noises for each image, whose scores are averaged.
            seed: image i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each image.
            solver: the module's by default.
            progress: called with (step, steps of all votes).

        Raises:
            ValueError: no vote or step, seeds of another number, or images of another shape than the model's.
        """
        steps = self.read_steps if steps is None else steps
        if votes < 1:
            raise ValueError(f"votes must be at least 1, got {votes}")
        if len(self._seeds(None, len(image), seed, seeds)) != len(image):
            raise ValueError(f"seeds must have one seed for each of {len(image)} images")
        noise = SampleNoise(self._seeds(None, len(image), seed, seeds))
        with evaluation(self):
            z = self._latent_to_read(image)
            ends = []
            for vote in range(votes):
                told = None if progress is None else (lambda k, n, v=vote: progress(v * n + k, votes * n))
                ends.append(self._read_once(z, noise, vote, steps, solver, told))
        codes = [end.x[:, self.shape[0] :] for end in ends]
        decoded, uncertainty = _together([self.semantic.decode(code, self._size_of(image)) for code in codes])
        first = ends[0].x[:, : self.shape[0]]
        return Reading(decoded, first, codes[0], uncertainty, sum(end.nfe for end in ends))

    def _read_once(
        self: Any, z: Tensor, noise: SampleNoise, vote: int, steps: int, solver: Solver | None, progress: Any
    ) -> Solution:
        purpose = "semantic" if vote == 0 else f"semantic:{vote}"
        code = noise.normal(purpose, z.new_empty(len(z), self.semantic.channels, *self.shape[1:]))
        field = JointField(self.network, self.shape[0], self.objective.path)
        return self.solve(field, joint(z, code), steps, solver, backwards=True, progress=progress)

    def _latent_to_read(self: Any, image: Tensor) -> Tensor:
        z = self.encode(image.to(self.device))
        if tuple(z.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"images of shape {tuple(image.shape[1:])} have latents of shape {tuple(z.shape[1:])}, those of the "
                f"model have {tuple(self.shape)}"
            )
        return z

    def _size_of(self, image: Tensor) -> tuple[int, int]:
        return int(image.shape[-2]), int(image.shape[-1])

    def segment(self: Any, image: Tensor, **options: Any) -> Decoded:
        """The mask of each image: labels (B, H, W) and scores (B, K, H, W); options as in `read`.

        Raises:
            ValueError: the model knows no masks; see `read`.
        """
        return self._read_field("mask", image, options)

    def classify(self: Any, image: Tensor, **options: Any) -> Decoded:
        """The label of each image: labels (B,) and scores (B, K); options as in `read`.

        Raises:
            ValueError: the model knows no labels; see `read`.
        """
        return self._read_field("label", image, options)

    def _read_field(self: Any, name: str, image: Tensor, options: Mapping[str, Any]) -> Decoded:
        if name not in self.semantic.keys:
            raise ValueError(f"this model reads {list(self.semantic.keys)} from images, and no {name}")
        return self.read(image, **options).decoded[name]

    def reported(self, reading: Reading, batch: Any) -> dict[str, Any]:
        """What metrics are told of a reading beside the truth of its batch.

        ``mask`` (B, H, W), ``segmented`` (B, H, W), ``mask_scores`` (B, K, H, W); ``label`` (B,), ``class_scores``
        (B, K).
        """
        told: dict[str, Any] = {}
        if "mask" in reading.decoded:
            found = reading.decoded["mask"]
            told |= {"mask": batch.get("mask"), "segmented": found.labels, "mask_scores": found.scores}
        if "label" in reading.decoded:
            told |= {"label": batch.get("label"), "class_scores": reading.decoded["label"].scores}
        return told

    # ------------------------------------------------------------------ from noise and code, and editing

    @torch.no_grad()
    def draw_from(
        self: Any, noise: Tensor, code: Tensor, *, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of a given noise and code: `read` with many steps, undone.

        Args:
            noise: (B, C, h, w), such as that of a `Reading`.
            code: (B, S, h, w), undecoded, or ``semantic.encode`` of a mask.
            steps: intervals of the time grid; the module's by default.
            solver: the module's by default.

        Returns:
            Images in data space, (B, ...).
        """
        with evaluation(self):
            field = JointField(self.network, self.shape[0], self.objective.path)
            end = self.solve(field, joint(noise, code), self.steps if steps is None else steps, solver)
            return self.decode(end.x[:, : self.shape[0]])

    @torch.no_grad()
    def edit(
        self: Any,
        image: Tensor,
        mask: Tensor,
        region: Tensor | None = None,
        *,
        steps: int | None = None,
        grow: int = 2,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        label: Tensor | None = None,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images redrawn where their mask was repainted, and unchanged elsewhere.

        The image is carried to noise. Inside of the region fresh noise takes its place; outside, the state is held on
        the exact path between that noise and the image at every step.

        Args:
            image: in data space, (B, C', H, W).
            mask: the repainted mask, class ids (B, H, W).
            region: where to redraw, bool (B, H, W); by default where ``mask`` differs from the mask that is read.
            steps: intervals of the time grid, each way; the module's by default.
            grow: pixels of the network's state by which the region is widened, so that the seam is redrawn as well.
            seed: see `read`; of the fresh noise, too.
            seeds: see `read`.
            label: class of each image, (B,), for models that know labels; what is read by default.
            solver: the module's by default; fixed-step.
            progress: called with (step, 2 steps).

        Raises:
            ValueError: a model without masks, a mask or region of another size, or an adaptive solver.
        """
        if "mask" not in self.semantic.keys:
            raise ValueError(f"edit needs a model of masks, this one knows {list(self.semantic.keys)}")
        for name, value in (("mask", mask), ("region", region)):
            if value is not None and tuple(value.shape) != (len(image), *self._size_of(image)):
                wanted = (len(image), *self._size_of(image))
                raise ValueError(f"{name} must have shape {wanted}, that of the images, got {tuple(value.shape)}")
        solver = solver or self.solver
        if solver.adaptive:
            raise ValueError(f"solver must have fixed steps, got {type(solver).__name__}")
        steps = self.steps if steps is None else steps
        seeds = self._seeds(None, len(image), seed, seeds)
        told = None if progress is None else (lambda k, n: progress(k, 2 * n))
        found = self.read(image, steps=steps, seeds=seeds, solver=solver, progress=told)
        mask = mask.to(self.device)
        redraw = mask != found.decoded["mask"].labels if region is None else region.to(self.device)
        fields = {"mask": mask}
        if "label" in found.decoded:
            fields["label"] = found.decoded["label"].labels if label is None else label.to(self.device)
        with evaluation(self):
            inside = self._on_grid(redraw, grow)  # (B, 1, h, w)
            code = self.semantic.encode(fields, self.shape[1:], SampleNoise(seeds))
            fresh = torch.where(inside, SampleNoise(seeds).normal("fresh", found.noise), found.noise)
            z, path = self._latent_to_read(image), self.objective.path
            field = JointField(self.network, self.shape[0], path)
            state, grid = joint(fresh, code), self.objective.times.grid(steps, device=self.device)
            for step in solver.iterate(_Held(field, z, found.noise, inside, path), state, grid):
                held = between(found.noise, z, step.t, path)
                state = joint(torch.where(inside, step.x[:, : self.shape[0]], held), step.x[:, self.shape[0] :])
                if progress is not None:
                    progress(steps + step.index + 1, 2 * steps)
            drawn = self.decode(torch.where(inside, state[:, : self.shape[0]], z))
        outside = ~F.interpolate(inside.float(), self._size_of(image), mode="nearest").bool()
        return torch.where(outside, image.to(drawn), drawn)

    def _on_grid(self: Any, region: Tensor, grow: int) -> Tensor:
        """A region (B, H, W) on the grid of the state, widened, bool, (B, 1, h, w); a cell with any of it is inside."""
        if grow < 0:
            raise ValueError(f"grow must not be negative, got {grow}")
        cells = F.adaptive_max_pool2d(region[:, None].float(), self.shape[1:])
        return F.max_pool2d(cells, 2 * grow + 1, stride=1, padding=grow) > 0

    # ------------------------------------------------------------------ requests

    def predict_step(self: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
        """What a batch of requests asks for; without a task the keys say it: images are read, masks and labels drawn.

        Returns:
            ``{"id": names, "sample": images, or a list of `codecs.LabelMap` and dictionaries}``.

        Raises:
            ValueError: a task or option that is unknown, or requests that do not fit the model.
        """
        task = batch.get("task")
        if task is None and batch.get("image") is not None:
            task = "segment" if "mask" in self.semantic.keys else "classify"
        if task in (None, "sample"):
            return super().predict_step(batch, batch_idx)  # type: ignore[misc]
        self.check_requests({**batch, "task": task})
        options = batch.get("task_options") or {}
        if unknown := sorted(set(options) - set(OPTIONS[task])):
            raise ValueError(f"task_options of {task!r} can be {list(OPTIONS[task])}, got {unknown}")
        if task == "edit":
            edited = self.edit(batch["image"], batch["mask"], seeds=batch["seed"], progress=self.progress, **options)
            return {"id": batch["id"], "sample": edited}
        return self._read_requests(task, batch, options)

    def _read_requests(self: Any, task: str, batch: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Masks as pictures; of labels a record. A model of both says both."""
        name = {"segment": "mask", "classify": "label"}[task]
        if name not in self.semantic.keys:
            raise ValueError(f"task {task!r} needs a model of {name}s, this one knows {list(self.semantic.keys)}")
        uncertain = options.pop("uncertainty", False) if "uncertainty" in options else False
        reading = self.read(batch["image"], seeds=batch["seed"], progress=self.progress, **options)
        names, samples = [], []
        for i, request in enumerate(batch["id"]):
            if task == "segment":
                names.append(request)
                samples.append(LabelMap(reading.decoded["mask"].labels[i].cpu(), self.semantic.colours()))
                if uncertain and reading.uncertainty is not None:
                    names.append(f"{request}-uncertainty")
                    samples.append(reading.uncertainty["mask"][i].cpu()[None] * 2 - 1)
            if "label" in reading.decoded:
                names.append(request if task == "classify" else f"{request}-class")
                samples.append(_record(reading, i))
        return {"id": names, "sample": samples}


class _Held:
    """A field whose image stands on the exact path outside of a region, at every call."""

    def __init__(self, field: JointField, z: Tensor, noise: Tensor, inside: Tensor, path: Any) -> None:
        self.field, self.z, self.noise, self.inside, self.path = field, z, noise, inside, path

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        channels = self.z.shape[1]
        image = torch.where(self.inside, state[:, :channels], between(self.noise, self.z, t, self.path))
        return self.field(joint(image, state[:, channels:]), t)


def _record(reading: Reading, i: int) -> dict[str, Any]:
    found = reading.decoded["label"]
    record = {"label": int(found.labels[i]), "scores": found.scores[i].tolist()}
    if reading.uncertainty is not None:
        record["uncertainty"] = float(reading.uncertainty["label"][i])
    return record


def _together(votes: list[dict[str, Decoded]]) -> tuple[dict[str, Decoded], dict[str, Tensor] | None]:
    """The votes' mean scores, the labels that win by them, and how the votes disagree."""
    if len(votes) == 1:
        return votes[0], None
    decoded, uncertainty = {}, {}
    for name in votes[0]:
        scores = torch.stack([vote[name].scores for vote in votes])  # (V, B, K, ...)
        mean = scores.mean(0)
        decoded[name] = Decoded(mean.argmax(1), mean)
        uncertainty[name] = scores.var(0, correction=0).sum(1)
    return decoded, uncertainty
