"""Editing: an image is redrawn where its mask was repainted, and stays as it is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flows.codecs import IGNORE
from lightning_flows.flow import Guidance, SampleNoise, Solver
from lightning_flows.modules.base import Progress, evaluation
from lightning_flows.modules.joint_field import Held, Hidden, JointField, joint
from lightning_flows.modules.reading import Reading, SemanticReading


class MaskEditing(SemanticReading):
    """A mixin of `SymmFlow`: changes of images by changes of their masks."""

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
        guidance: Guidance | float | None = None,
        solver: Solver | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images redrawn where their mask was repainted, and unchanged elsewhere.

        The image is carried to noise. Inside of the region fresh noise takes its place; outside, the state is held on
        the exact path between that noise and the image at every call of the network.

        Args:
            image: in data space, (B, C', H, W).
            mask: the repainted mask, class ids (B, H, W); 255 keeps what is read there.
            region: where to redraw, bool (B, H, W); by default where ``mask`` differs from the mask that is read.
            steps: intervals of the time grid, each way; the module's by default.
            grow: pixels of the network's state by which the region is widened, so that the seam is redrawn as well.
            seed: see `read`; of the fresh noise, too.
            seeds: see `read`.
            label: class of each image, (B,), for models that know labels; what is read by default.
            guidance: see `SymmFlow.generate`.
            solver: the module's by default.
            progress: called with (step, 2 steps).

        Raises:
            ValueError: a model without masks, a mask or region of another size, a label for a model without labels, or
                a negative ``grow``.
        """
        self._check_edit(image, mask, region, grow, label)
        steps, seeds = self.steps if steps is None else steps, self._seeds(None, len(image), seed, seeds)
        rule, noise = self._guidance(guidance), SampleNoise(seeds)
        back, forth = (None, None) if progress is None else _halves(progress, steps)
        found = self.read(image, steps=steps, seeds=seeds, scores=False, solver=solver, progress=back)
        fields, differs = self._repainted(found, mask.to(self.device), label)
        with evaluation(self):
            inside = self._on_grid(differs if region is None else region.to(self.device), grow)  # (B, 1, h, w)
            code, z = self.semantic.encode(fields, self.shape[1:], noise), self._latent_to_read(image)
            path, channels = self.objective.path, self.shape[0]
            hidden = None if rule is None else Hidden(noise, code, path)
            field = JointField(self.network, channels, path, hidden=hidden, guidance=rule)
            fresh = torch.where(inside, noise.normal("fresh", found.noise), found.noise)
            held = Held(field, found.noise, z, inside, path)
            end = self.solve(held, joint(fresh, code), steps, solver, progress=forth)
            drawn = self.decode(torch.where(inside, end.x[:, :channels], z))
        redrawn = F.interpolate(inside.float(), tuple(image.shape[-2:]), mode="nearest").bool()
        return torch.where(redrawn, drawn, image.to(drawn))

    def _check_edit(
        self: Any, image: Tensor, mask: Tensor, region: Tensor | None, grow: int, label: Tensor | None
    ) -> None:
        known = list(self.semantic.keys)
        if "mask" not in known:
            raise ValueError(f"edit needs a model of masks, this one knows {known}")
        if label is not None and "label" not in known:
            raise ValueError(f"label must be None for a model that knows {known} alone")
        wanted = (len(image), *image.shape[-2:])
        for name, value in (("mask", mask), ("region", region)):
            if value is not None and tuple(value.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, that of the images, got {tuple(value.shape)}")
        if grow < 0:
            raise ValueError(f"grow must not be negative, got {grow}")

    def _repainted(self: Any, found: Reading, mask: Tensor, label: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The fields that are drawn, and where they differ from what was read, bool (B, H, W)."""
        read = found.decoded["mask"].labels
        fields = {"mask": torch.where(mask == IGNORE, read, mask)}
        if "label" in found.decoded:
            fields["label"] = found.decoded["label"].labels if label is None else label.to(self.device)
        return fields, fields["mask"] != read

    def _on_grid(self: Any, region: Tensor, grow: int) -> Tensor:
        """A region (B, H, W) on the grid of the state, widened, bool, (B, 1, h, w); a cell with any of it is inside."""
        cells = F.adaptive_max_pool2d(region[:, None].float(), self.shape[1:])
        return F.max_pool2d(cells, 2 * grow + 1, stride=1, padding=grow) > 0


def _halves(progress: Progress, steps: int) -> tuple[Progress, Progress]:
    """The progress of the way back and of the way forth."""
    return lambda k, n: progress(k, 2 * steps), lambda k, n: progress(steps + k, 2 * steps)
