"""Between a batch or a condition, which hold masks and labels, and the code that a flow of pairs moves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow import Condition, SampleNoise

STREAM = {"label": "label", "mask": "spatial"}  # field of a batch -> stream of the condition
PROBE = 1024  # side of an image from which the factor of a codec is read


class SemanticConditions:
    """A mixin of `SymmFlow`: a condition has ``label`` (B,), and the mask as ``spatial`` (B, 1, H, W) of class ids."""

    @property
    def streams(self: Any) -> tuple[str, ...]:
        """See `GenerativeModule.streams`."""
        return tuple(STREAM[name] for name in self.semantic.keys)

    def fields_of(self: Any, batch: Any) -> dict[str, Tensor]:
        """Masks (B, H, W) and labels (B,) of a batch, those that the semantic codec reads.

        Raises:
            ValueError: one is not there.
        """
        if missing := [name for name in self.semantic.keys if batch.get(name) is None]:
            raise ValueError(f"{type(self.semantic).__name__} reads {self.semantic.keys}; the batch has no {missing}")
        return {name: batch[name] for name in self.semantic.keys}

    def condition_of(self: Any, batch: Any) -> Condition | None:
        """See `GenerativeModule.condition_of`."""
        given = {STREAM[name]: batch[name] for name in self.semantic.keys if batch.get(name) is not None}
        if "spatial" in given:
            given["spatial"] = given["spatial"][:, None]
        return Condition(**given) if given else None

    def _code_of(self: Any, condition: Condition | None, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        """The code of a condition, (B, S, h, w), and which of its channels are there, bool (B, S)."""
        condition, count = condition or Condition(), len(noise.seeds)
        if unknown := sorted(set(condition.streams) - set(self.streams)):
            raise ValueError(f"condition gives {unknown}, but {type(self.semantic).__name__} reads {self.streams}")
        present = {name: condition.presence(STREAM[name], count, self.device) for name in self.semantic.keys}
        if not self.objective.drop_rate and not all(bool(there.all()) for there in present.values()):
            raise ValueError(
                f"the condition must give {self.streams} for every sample: this model was trained without "
                "objective.drop_rate and cannot draw what it is not told"
            )
        if not condition.streams:
            code = torch.zeros(count, self.semantic.channels, *self.shape[1:], device=self.device)
            return code, self._channels(present)
        fields = {name: self._ids_of(condition, name, there) for name, there in present.items()}
        try:
            return self.semantic.encode(fields, self.shape[1:], noise), self._channels(present)
        except ValueError as error:
            raise ValueError(f"the condition does not fit this model, whose state is {self.shape}: {error}") from None

    def _ids_of(self: Any, condition: Condition, name: str, present: Tensor) -> Tensor:
        """Class ids of a field, (B,) or (B, H, W); 0 where they are absent, whatever stands there."""
        value = getattr(condition, STREAM[name])
        if value is None:
            shape = (len(present), *self._data_size()) if name == "mask" else (len(present),)
            return torch.zeros(shape, dtype=torch.int64, device=self.device)
        ids = (mask_ids(value) if name == "mask" else value).to(self.device)
        return torch.where(present.view(-1, *[1] * (ids.dim() - 1)), ids, 0)

    def _data_size(self: Any) -> tuple[int, int]:
        """(H, W) of the images of the model: the codec tells how much larger they are than their latents."""
        for channels in (3, 1, 4):
            with suppress(ValueError):  # an autoencoder for images of other channels
                _, rows, columns = self.codec.latent_shape((channels, PROBE, PROBE))
                return self.shape[1] * PROBE // rows, self.shape[2] * PROBE // columns
        return self.shape[1:]

    def _channels(self: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """What is said of each part (B,) for each of its channels, bool, (B, S)."""
        spans = self.semantic.layout.items()
        columns = [parts[name][:, None].expand(-1, span.stop - span.start) for name, span in spans]
        return torch.cat(columns, dim=1).to(self.device)


def mask_ids(mask: Tensor) -> Tensor:
    """Class ids (B, H, W), int64, of a condition's map (B, 1, H, W).

    Raises:
        ValueError: another shape, or values that are no ids.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.is_floating_point():
        raise ValueError(
            f"condition.spatial must hold class ids, integers (B, 1, H, W), got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask[:, 0].long()
