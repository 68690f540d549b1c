"""What a distance is measured in: extractors that turn a batch into one float64 row of features per item.

A distance between sets of images means nothing without its extractor, so each extractor has a ``name`` and
metrics carry it: ``fid`` is kept for the standard Inception network, everything else is ``frechet[<name>]``.
Images are read in memory, rounded to the 8 bits that a lossless file would hold; no JPEG is in between.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["spatial", "logits"]


class Extractor(nn.Module):
    """Base of extractors: ``(B, ...)`` to ``(B, D)`` float64, never in training mode, never under autocast.

    A subclass gives ``name`` and ``extract``. Metrics that share an extractor share its work: the features of the
    last tensor are remembered while that tensor lives and is unchanged.

    Attributes:
        name: what values are called by.
        standard_for: the standard names (``fid``, ``sfid``, ``kid``, ``is``) that values may carry.
        spatial: the features keep the places of the image (``spatial_frechet[...]``).
    """

    name: str = "features"
    standard_for: tuple[str, ...] = ()
    spatial: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._last = Memory()

    def extract(self, x: Tensor) -> Tensor:
        """Features ``(B, ...)`` of a batch ``x`` ``(B, ...)``; the base class flattens and casts them."""
        raise NotImplementedError(f"{type(self).__name__} has to define extract(x)")

    def prepare(self) -> None:
        """Load what is loaded at first use, so that a missing file is known before anything is sampled."""

    def companion(self, kind: Kind) -> Extractor | None:
        """The same network's ``"spatial"`` features or ``"logits"`` as an extractor, None where it has none."""
        return None

    def fingerprint(self) -> str:
        """Hash of the weights, empty without any: two networks of one name are told apart by it."""
        return digest_of(self.state_dict())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Float64 features ``(B, D)`` of ``x`` ``(B, C, H, W)`` or ``(B, D')``.

        Raises:
            ValueError: ``x`` has no batch dimension, or the features hold NaN or infinity.
        """
        if x.ndim < 2:
            raise ValueError(f"x must be a batch (B, ...) of two dimensions or more, got {tuple(x.shape)}")
        features = self._last.recall(x)
        if features is None:
            with torch.autocast(x.device.type, enabled=False):
                features = self.extract(x).flatten(1).double()  # (B, D)
            if not features.isfinite().all():
                raise ValueError(f"x gives NaN or infinite {self.name} features: finite values are needed")
            self._last.keep(x, features)
        return features

    def train(self, mode: bool = True) -> Extractor:
        """Stay in evaluation mode: a distance must not depend on dropout or on batch statistics."""
        return super().train(False)


class Pixels(Extractor):
    """The values themselves, flattened: ``(B, C, H, W)`` to ``(B, C H W)``.

    Args:
        size: average images down (or repeat them up) to this side first; values are then ``...[pixels-32]``.

    Raises:
        ValueError: ``size`` is below 1.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 or None, got {size}")
        self.size = size
        self.name = "pixels" if size is None else f"pixels-{size}"

    def extract(self, x: Tensor) -> Tensor:
        """``x`` as it is, or its cells' means ``(B, C, size, size)``."""
        if self.size is None:
            return x
        if x.ndim != 4:
            raise ValueError(f"x must be images (B, C, H, W) for Pixels(size={self.size}), got {tuple(x.shape)}")
        return F.adaptive_avg_pool2d(x.double(), self.size)


class Features(Extractor):
    """Any network or function as an extractor.

    Args:
        module: maps ``(B, C, H, W)`` to ``(B, D)`` (further dimensions are flattened). A module is frozen,
            put in evaluation mode, and follows the device of its input.
        name: what values are called by, as in ``frechet[dinov2-s]``.
        channels: None, or for a module that gives maps ``(B, C, H, W)``: keep the first ``channels`` of them, with
            their places, as the spatial distance of ADM does; values are then ``spatial_frechet[...]``.

    Raises:
        ValueError: ``module`` cannot be called, ``name`` is empty, or ``name`` is the standard one.
    """

    def __init__(self, module: nn.Module | Callable[[Tensor], Tensor], name: str, channels: int | None = None) -> None:
        super().__init__()
        if not callable(module):
            raise ValueError(f"module must be an nn.Module or a function, got {type(module).__name__}")
        if not name or name == "inception":
            raise ValueError(f"name must be a word; 'inception' is kept for Inception(); got {name!r}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1 or None, got {channels}")
        self.name, self.channels, self.spatial = name, channels, channels is not None
        self.module = module
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()

    def extract(self, x: Tensor) -> Tensor:
        """The features of ``x``, computed in the type of the module's weights."""
        features = self._call(x)
        if self.channels is None:
            return features
        if features.ndim != 4 or features.shape[1] < self.channels:
            raise ValueError(
                f"channels={self.channels} needs maps (B, C, H, W) of so many channels, "
                f"{self.name} gives {tuple(features.shape)}"
            )
        return features[:, : self.channels]  # (B, channels, H, W)

    def _call(self, x: Tensor) -> Tensor:
        if not isinstance(self.module, nn.Module):
            return self.module(x)
        weight = next(self.module.parameters(), None)
        if weight is None:
            return self.module(x.float() if not x.is_floating_point() else x)
        if weight.device != x.device:
            self.module.to(x.device)
        return self.module(x.to(weight.dtype))


class Trunk(nn.Module, ABC):
    """A network that several extractors read at different layers, in one pass for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: set[str] = set()
        self._last = Memory()

    @abstractmethod
    def outputs(self, x: Tensor, layers: set[str]) -> Mapping[str, Tensor]:
        """What the network gives at some of its layers, each ``(B, ...)``."""

    def forward(self, x: Tensor, layer: str) -> Tensor:
        """Features of ``x`` at one layer."""
        self.layers.add(layer)
        found = self._last.recall(x)
        if found is None or layer not in found:
            found = self.outputs(x, self.layers)
            self._last.keep(x, found)
        return found[layer]


_SHARED: weakref.WeakValueDictionary[Any, Trunk] = weakref.WeakValueDictionary()


class LayerExtractor(Extractor, ABC):
    """An extractor that reads one layer of a `Trunk`, which it shares with others of the same weights."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.network: Trunk | None = None

    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Says which network it is: extractors of one key share it."""

    @abstractmethod
    def load(self) -> Trunk:
        """The network, frozen."""

    def prepare(self) -> None:
        """See `Extractor.prepare`."""
        if self.network is None:
            key = (type(self), *self.key())
            network = _SHARED.get(key)
            if network is None:
                network = _SHARED[key] = self.load().requires_grad_(False).eval()
            network.layers.add(self.layer)
            self.network = network

    def extract(self, x: Tensor) -> Tensor:
        """The layer's features of images ``(B, 1 | 3, H, W)`` in ``[-1, 1]``."""
        self.prepare()
        assert self.network is not None
        return self.network.to(x.device)(x, self.layer)


class Memory:
    """What the last tensor gave; forgotten with the tensor, when it changes, and by copies and pickles."""

    def __init__(self) -> None:
        self._of: tuple[weakref.ref[Tensor], int] | None = None
        self._value: Any = None

    def recall(self, x: Tensor) -> Any:
        """What was kept for ``x``, or None."""
        known = self._of is not None and self._of[0]() is x and not x.is_inference() and self._of[1] == x._version
        return self._value if known else None

    def keep(self, x: Tensor, value: Any) -> None:
        """Keep what ``x`` gave (an inference tensor does not tell when it changes: nothing is kept for it)."""
        self._of, self._value = (None, None) if x.is_inference() else ((weakref.ref(x), x._version), value)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: it is only of use in its own process."""
        return {"_of": None, "_value": None}


def grey_levels(x: Tensor) -> Tensor:
    """Images ``(B, 1 | 3, H, W)`` in ``[-1, 1]`` as the 8 bits of a file, uint8 ``(B, 3, H, W)``.

    Raises:
        ValueError: another shape.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be images (B, 1 or 3, H, W), got shape {tuple(x.shape)}")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of named tensors; empty without any."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16] if tensors else ""
