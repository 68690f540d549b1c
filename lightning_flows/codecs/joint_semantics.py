"""Semantic codecs made of others: mask and label side by side, and a mask in the latent space of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_flows.codecs.base import Codec
from lightning_flows.codecs.semantic import Decoded, SemanticCodec, field_of
from lightning_flows.flow.noise import Noise

_PROBE = 1024  # side of an image from which an autoencoder's number of latent channels is read


class JointSemantics(SemanticCodec):
    """The planes of several codecs behind each other: a mask and a label of one image.

    Args:
        parts: codecs that read different fields.

    Raises:
        ValueError: no part, or a field that two of them read.
    """

    def __init__(self, parts: Sequence[SemanticCodec]) -> None:
        keys = [key for part in parts for key in part.keys]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"parts must be codecs of different fields, got {[part.keys for part in parts]}")
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.keys = tuple(keys)
        self.num_classes = {key: count for part in parts for key, count in part.num_classes.items()}

    @property
    def channels(self) -> int:
        """Sum of the channels of the parts."""
        return sum(part.channels for part in self.parts)

    def encode(self, fields: Mapping[str, Tensor], size: tuple[int, int], noise: Noise | None = None) -> Tensor:
        """See `SemanticCodec.encode`."""
        return torch.cat([part.encode(fields, size, noise) for part in self.parts], dim=1)

    def decode(self, y: Tensor, size: tuple[int, int] | None = None) -> dict[str, Decoded]:
        """See `SemanticCodec.decode`."""
        read = [part.decode(own, size) for part, own in zip(self.parts, self._split(y), strict=True)]
        return {key: decoded for one in read for key, decoded in one.items()}

    @property
    def layout(self) -> dict[str, slice]:
        """See `SemanticCodec.layout`."""
        spans, start = {}, 0
        for part in self.parts:
            spans |= {key: slice(start + own.start, start + own.stop) for key, own in part.layout.items()}
            start += part.channels
        return spans

    @property
    def constant(self) -> int:
        """See `SemanticCodec.constant`."""
        count = 0
        for part in reversed(list(self.parts)):
            count += part.constant
            if part.constant < part.channels:
                break
        return count

    def colours(self, key: str = "mask") -> list[tuple[int, int, int]]:
        """See `SemanticCodec.colours`."""
        return next(part for part in self.parts if key in part.keys).colours(key)

    def extra_loss(self, y: Tensor, fields: Mapping[str, Tensor]) -> Tensor | None:
        """Sum of the extra losses of the parts, (B,); None where none has one."""
        given = [part.extra_loss(own, fields) for part, own in zip(self.parts, self._split(y), strict=True)]
        losses = [loss for loss in given if loss is not None]
        return torch.stack(losses).sum(0) if losses else None

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        self.check_planes(y)
        return y.split([part.channels for part in self.parts], dim=1)


class ThroughAutoencoder(SemanticCodec):
    """SymmFlow's masks in latent space: a mask as a picture goes through the same autoencoder as the image.

    The dequantised picture has the size of the mask; its latent is the mode of the posterior. Autoencoders of images
    smear borders and shift colours a little: averaged planes (`OneHot` at the size of the latent) do not need them.

    Args:
        semantic: a fixed code of masks with as many planes as the autoencoder takes, such as `RGBPalette`.
        codec: the autoencoder. It stays outside of the module tree, as in the model (see `codecs.Codec`).
        channels: of its latent, so that a model is built before the autoencoder is there; None asks the autoencoder.

    Raises:
        ValueError: a ``semantic`` that reads anything but masks, or that has parameters; ``channels`` below 1.
    """

    semantic: SemanticCodec
    codec: Codec

    def __init__(self, semantic: SemanticCodec, codec: Codec, *, channels: int | None = None) -> None:
        if semantic.keys != ("mask",) or any(True for _ in semantic.parameters()):
            reads = f"which reads {semantic.keys}"
            raise ValueError(f"semantic must be a fixed code of masks, got {type(semantic).__name__}, {reads}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1 or None, got {channels}")
        super().__init__()
        self.semantic = semantic
        object.__setattr__(self, "codec", codec)  # also a codec that is a module is no part of this one
        self.keys, self.num_classes = semantic.keys, semantic.num_classes
        self._channels = channels

    @property
    def channels(self) -> int:
        """Channels of the autoencoder's latent; reads its config where they were not given."""
        if self._channels is not None:
            return self._channels
        return self._latent_shape((_PROBE, _PROBE))[0]

    def colours(self, key: str = "mask") -> list[tuple[int, int, int]]:
        """See `SemanticCodec.colours`."""
        return self.semantic.colours(key)

    def encode(self, fields: Mapping[str, Tensor], size: tuple[int, int], noise: Noise | None = None) -> Tensor:
        """See `SemanticCodec.encode`.

        Args:
            fields: ``mask``, (B, H, W).
            size: (h, w) of the latent of an image of the size of the mask.
            noise: see `SemanticCodec.encode`; added before the autoencoder.

        Raises:
            ValueError: another ``size``, or an autoencoder of other ``channels``; see `SemanticCodec.encode`.
        """
        shape = tuple(field_of(fields, "mask", self.num_classes["mask"]).shape[1:])
        latent = self._latent_shape(shape)
        if tuple(latent[1:]) != tuple(size):
            raise ValueError(
                f"size must be {tuple(latent[1:])}, the latent of masks of size {shape}, got {tuple(size)}"
            )
        return self.codec.encode(self.semantic.encode(fields, shape, noise))

    def decode(self, y: Tensor, size: tuple[int, int] | None = None) -> dict[str, Decoded]:
        """See `SemanticCodec.decode`; by default at the size to which the autoencoder decodes."""
        self.check_planes(y)
        self._latent_shape((_PROBE, _PROBE))
        return self.semantic.decode(self.codec.decode(y), size)

    def _latent_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) of masks (H, W), checked."""
        latent = self.codec.latent_shape((self.semantic.channels, *size))
        if self._channels not in (None, latent[0]):
            raise ValueError(f"channels must be {latent[0]}, those of the autoencoder's latent, got {self._channels}")
        return latent
