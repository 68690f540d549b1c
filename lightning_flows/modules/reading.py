"""Reading: masks and labels of images, by the flow of a pair backwards from the image; and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flows.codecs import Decoded
from lightning_flows.flow import SampleNoise, Solution, Solver, key
from lightning_flows.modules.base import Progress, evaluation
from lightning_flows.modules.joint_field import JointField, joint
from lightning_flows.modules.publishable import run_seed

MOST_SCORES = 2**26  # scores of masks that a step of validation or test keeps: 256 MiB; COCO-Stuff at 512 px has 45 M


class Reading(NamedTuple):
    """What is read from images.

    Attributes:
        decoded: labels and scores of each field, ``{"mask": ..., "label": ...}``; scores are means over the votes. Read
            without scores, masks have none: their scores are (B, 0, H, W).
        noise: the image carried to noise, in the units of the network, (B, C, h, w), of the first vote.
        code: the code that was reached, undecoded, (B, S, h, w), of the first vote.
        uncertainty: how much the votes disagree, of each field: the variance of the scores over the votes, summed over
            the classes, (B, H, W) or (B,), in [0, 1); None for a single vote.
        nfe: calls of the network.
    """

    decoded: dict[str, Decoded]
    noise: Tensor
    code: Tensor
    uncertainty: dict[str, Tensor] | None
    nfe: int


class SemanticReading:
    """A mixin of `SymmFlow`: from an image to its mask, its label and its noise."""

    @torch.no_grad()
    def read(
        self: Any,
        image: Tensor,
        *,
        steps: int | None = None,
        votes: int = 1,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        scores: bool = True,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> Reading:
        """Masks and labels of images: the flow backwards from the image and noise in the place of its code.

        No gradient flows through it.

        Args:
            image: in data space, (B, ...).
            steps: intervals of the time grid; ``read_steps`` by default. One gives the mean of the code given the
                image; more also carry the image to noise, from which it can be drawn again.
            votes: noises for each image, whose scores are averaged.
            seed: image i gets the i-th seed derived from it; 0 by default.
            seeds: or one seed for each image.
            scores: keep the scores of masks, K planes of the size of the image: 180 MB an image for the 172 classes of
                COCO-Stuff at 512 x 512. Without them, one image is decoded after the other.
            solver: the module's by default.
            progress: called with (step, steps of all votes).

        Raises:
            ValueError: no vote or step, seeds of another number, or images of another shape than the model's.
        """
        noise = SampleNoise(self._seeds(None, len(image), seed, seeds))
        with evaluation(self):
            z = self._latent_to_read(image)
            return self._read(z, _sides(image), noise, steps, votes, scores, solver, progress)

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

        Raises:
            ValueError: noise or code of another shape than the model's.
        """
        for name, value, channels in (("noise", noise, self.shape[0]), ("code", code, self.semantic.channels)):
            if tuple(value.shape) != (wanted := (len(noise), channels, *self.shape[1:])):
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        start = joint(noise.to(self.device), code.to(self.device))
        with evaluation(self):
            field = JointField(self.network, self.shape[0], self.objective.path)
            end = self.solve(field, start, self.steps if steps is None else steps, solver)
            return self.decode(end.x[:, : self.shape[0]])

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def read_batch(self: Any, batch: Any, batch_idx: int, purpose: str) -> Reading:
        """What is read from the items of a batch, with seeds of their own index; cached latents are read as they are.

        Args:
            batch: with images or latents; masks are read at the size of its masks.
            batch_idx: place of the batch, where its items have no ``index``.
            purpose: of the seeds.
        """
        z = self.latent_of(batch)
        index = batch.get("index", torch.arange(len(z)) + batch_idx * len(z))
        noise = SampleNoise([key(purpose, run_seed(), int(i)) for i in index])
        like = next((batch[name] for name in ("mask", "image") if batch.get(name) is not None), None)
        size = None if like is None else _sides(like)
        count = len(z) * self.semantic.num_classes.get("mask", 0) * (1 if size is None else size[0] * size[1])
        return self._read(z, size, noise, scores=count <= MOST_SCORES)

    def reported(self, reading: Reading, batch: Any) -> dict[str, Any]:
        """What metrics are told of a reading beside the truth of its batch.

        ``mask`` (B, H, W), ``segmented`` (B, H, W), ``mask_scores`` (B, K, H, W); ``label`` (B,), ``class_scores``
        (B, K). Without ``mask_scores`` where they would be more than 2^26 numbers: then use smaller batches.
        """
        told: dict[str, Any] = {}
        if "mask" in reading.decoded:
            labels, scores = reading.decoded["mask"]
            told |= {"mask": batch.get("mask"), "segmented": labels}
            told |= {"mask_scores": scores} if scores.shape[1] else {}
        if "label" in reading.decoded:
            told |= {"label": batch.get("label"), "class_scores": reading.decoded["label"].scores}
        return told

    # ------------------------------------------------------------------ parts

    def _read(
        self: Any,
        z: Tensor,
        size: tuple[int, int] | None,
        noise: SampleNoise,
        steps: int | None = None,
        votes: int = 1,
        scores: bool = True,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> Reading:
        if votes < 1:
            raise ValueError(f"votes must be at least 1, got {votes}")
        steps, ends = self.read_steps if steps is None else steps, []
        for vote in range(votes):
            told = None if progress is None else (lambda k, n, v=vote: progress(v * n + k, votes * n))
            ends.append(self._read_once(z, noise, vote, steps, solver, told))
        codes = [end.x[:, self.shape[0] :] for end in ends]
        decoded, uncertainty = self._decoded(codes, size, scores)
        return Reading(decoded, ends[0].x[:, : self.shape[0]], codes[0], uncertainty, sum(end.nfe for end in ends))

    def _read_once(
        self: Any, z: Tensor, noise: SampleNoise, vote: int, steps: int, solver: Solver | None, progress: Any
    ) -> Solution:
        purpose = "semantic" if vote == 0 else f"semantic:{vote}"
        code = noise.normal(purpose, z.new_empty(len(z), self.semantic.channels, *self.shape[1:]))
        field = JointField(self.network, self.shape[0], self.objective.path)
        return self.solve(field, joint(z, code), steps, solver, backwards=True, progress=progress)

    def _decoded(
        self: Any, codes: Sequence[Tensor], size: tuple[int, int] | None, scores: bool
    ) -> tuple[dict[str, Decoded], dict[str, Tensor] | None]:
        """What the codes (B, S, h, w) of all votes say together."""
        count = len(codes)
        if scores:
            return _together((self.semantic.decode(code, size) for code in codes), count)
        decoded, uncertain = [], []
        for i in range(len(codes[0])):
            one, unsure = _together((self.semantic.decode(code[[i]], size) for code in codes), count)
            decoded.append({name: _bare(found) if name == "mask" else found for name, found in one.items()})
            uncertain.append(unsure or {})
        joined = {name: Decoded(*map(torch.cat, zip(*rows, strict=True))) for name, rows in _by_name(decoded)}
        return joined, {name: torch.cat(rows) for name, rows in _by_name(uncertain)} or None

    def _latent_to_read(self: Any, image: Tensor) -> Tensor:
        z = self.encode(image.to(self.device))
        if tuple(z.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"images of shape {tuple(image.shape[1:])} have latents of shape {tuple(z.shape[1:])}, those of the "
                f"model have {tuple(self.shape)}: give them another size or other channels"
            )
        return z

    def _read_field(self: Any, name: str, image: Tensor, options: Mapping[str, Any]) -> Decoded:
        if name not in self.semantic.keys:
            raise ValueError(f"this model reads {list(self.semantic.keys)} from images, and no {name}")
        return self.read(image, **options).decoded[name]


def _sides(image: Tensor) -> tuple[int, int]:
    """Height and width of images or masks (..., H, W)."""
    return int(image.shape[-2]), int(image.shape[-1])


def _by_name(each: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Of each name, what every item has."""
    return [(name, [one[name] for one in each]) for name in each[0]]


def _bare(mask: Decoded) -> Decoded:
    """A mask without its scores."""
    return Decoded(mask.labels, mask.scores.new_empty(len(mask.labels), 0, *mask.labels.shape[1:]))


def _together(votes: Iterable[dict[str, Decoded]], count: int) -> tuple[dict[str, Decoded], dict[str, Tensor] | None]:
    """The votes' mean scores, the labels that win by them, and how the votes disagree; one vote after the other."""
    if count == 1:
        return next(iter(votes)), None
    sums: dict[str, Any] = {}
    squares: dict[str, Any] = {}
    for vote in votes:
        for name, found in vote.items():
            sums[name] = sums.get(name, 0) + found.scores  # (B, K, ...)
            squares[name] = squares.get(name, 0) + found.scores.square().sum(1)  # (B, ...)
    means = {name: value / count for name, value in sums.items()}
    decoded = {name: Decoded(mean.argmax(1), mean) for name, mean in means.items()}
    spread = {name: squares[name] / count - mean.square().sum(1) for name, mean in means.items()}
    return decoded, {name: value.clamp(min=0) for name, value in spread.items()}  # below 0 by rounding alone
