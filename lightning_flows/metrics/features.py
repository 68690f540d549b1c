"""What a distance is measured in: extractors that turn a batch into one float64 row of features per item.

A distance between sets of images means nothing without its extractor, so each extractor has a ``name`` and
metrics carry it: ``fid`` is kept for the standard Inception network, everything else is ``frechet[<name>]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_INCEPTION_DIGEST = "6726825d"  # of the TensorFlow graph of 2015-12-05 as converted by torch-fidelity
_LAYERS = ("64", "192", "768", "2048", "logits_unbiased", "logits")
_STANDARD_FOR = {"2048": ("fid", "kid"), "logits_unbiased": ("is",)}


class Extractor(nn.Module):
    """Base of extractors: ``(B, ...)`` to ``(B, D)`` float64, never in training mode, never under autocast.

    A subclass gives ``name`` and ``extract``; ``standard_for`` lists the standard names (``fid``, ``kid``,
    ``is``) that values computed with it may carry.
    """

    name: str = "features"
    standard_for: tuple[str, ...] = ()

    def extract(self, x: Tensor) -> Tensor:
        """Features ``(B, ...)`` of a batch ``x`` ``(B, ...)``; the base class flattens and casts them."""
        raise NotImplementedError(f"{type(self).__name__} has to define extract(x)")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Float64 features ``(B, D)`` of ``x`` ``(B, C, H, W)`` or ``(B, D')``.

        Raises:
            ValueError: ``x`` has no batch dimension, or the features hold NaN or infinity.
        """
        if x.ndim < 2:
            raise ValueError(f"x must be a batch (B, ...) of two dimensions or more, got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            features = self.extract(x).flatten(1).double()  # (B, D)
        if not features.isfinite().all():
            raise ValueError(f"x gives NaN or infinite {self.name} features: finite values are needed")
        return features

    def train(self, mode: bool = True) -> Extractor:
        """Stay in evaluation mode: a distance must not depend on dropout or on batch statistics."""
        return super().train(False)


class Pixels(Extractor):
    """The values themselves, flattened: ``(B, C, H, W)`` to ``(B, C H W)``."""

    name = "pixels"

    def extract(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        return x


class Features(Extractor):
    """Any network or function as an extractor.

    Args:
        module: maps ``(B, C, H, W)`` to ``(B, D)`` (further dimensions are flattened). A module is frozen,
            put in evaluation mode, and follows the device of its input.
        name: what values are called by, as in ``frechet[dinov2-s]``.

    Raises:
        ValueError: ``module`` cannot be called, ``name`` is empty, or ``name`` is the standard one.
    """

    def __init__(self, module: nn.Module | Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__()
        if not callable(module):
            raise ValueError(f"module must be an nn.Module or a function, got {type(module).__name__}")
        if not name or name == "inception":
            raise ValueError(f"name must be a word; 'inception' is kept for Inception(); got {name!r}")
        self.name = name
        self.module = module
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()

    def extract(self, x: Tensor) -> Tensor:
        """The features of ``x``, computed in the type of the module's weights."""
        if not isinstance(self.module, nn.Module):
            return self.module(x)
        weight = next(self.module.parameters(), None)
        if weight is None:
            return self.module(x.float() if not x.is_floating_point() else x)
        if weight.device != x.device:
            self.module.to(x.device)
        return self.module(x.to(weight.dtype))


class Inception(Extractor):
    """The Inception-v3 network of 2015-12-05 with which published FID, KID and Inception scores are computed.

    The network and its weights come from ``torch-fidelity`` (extra ``[metrics]``); they are loaded on first
    use. Images ``(B, 1 | 3, H, W)`` in ``[-1, 1]`` are rounded to 8 bits, as they would be in files; grey
    ones are repeated to three channels; the resize to 299 is the one of the original graph.

    Args:
        layer: ``"2048"`` (FID, KID), ``"logits_unbiased"`` (Inception score), or ``"64" | "192" | "768"``.
        weights: a local file of the same weights for machines without a network; None downloads it. A file
            with another checksum is used, but its name says so and values are no longer called standard.

    Raises:
        ValueError: ``layer`` is unknown, or ``weights`` is no file.
        ImportError: ``torch-fidelity`` is missing (at first use).
    """

    def __init__(self, layer: str = "2048", weights: str | None = None) -> None:
        super().__init__()
        layer = str(layer)
        if layer not in _LAYERS:
            raise ValueError(f"layer must be one of {', '.join(_LAYERS)}, got {layer!r}")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights must be a file, got {weights!r}")
        self.layer, self.weights = layer, weights
        digest = _INCEPTION_DIGEST if weights is None else _digest(Path(weights))
        known = digest.startswith(_INCEPTION_DIGEST)
        self.name = ("inception" if known else f"inception-{digest[:8]}") + ("" if layer == "2048" else f":{layer}")
        self.standard_for = _STANDARD_FOR.get(layer, ()) if known else ()
        self.network: nn.Module | None = None

    def extract(self, x: Tensor) -> Tensor:
        """Features ``(B, D)`` of images ``(B, 1 | 3, H, W)`` in ``[-1, 1]``."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x must be images (B, 1 or 3, H, W), got shape {tuple(x.shape)}")
        if self.network is None:
            self.network = _load_inception(self.layer, self.weights)
        self.network.to(x.device)
        grey = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(grey.expand(-1, 3, -1, -1))[0]


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _load_inception(layer: str, weights: str | None) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "Inception() needs torch-fidelity: install the extra with `pip install lightning-flows[metrics]`"
        ) from error
    if weights is not None:
        # torch-fidelity would unpickle anything; this raises unless the file holds tensors only.
        torch.load(weights, map_location="cpu", weights_only=True)
    try:
        name = "inception-v3-compat"
        return FeatureExtractorInceptionV3(name, [layer], feature_extractor_weights_path=weights)
    except OSError as error:
        raise OSError(
            "the Inception weights could not be downloaded: fetch them elsewhere: Inception(weights=FILE)"
        ) from error
