"""The Inception-v3 network of 2015-12-05, in whose features published distances are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_flows.metrics.features import Extractor, Kind, LayerExtractor, Trunk, grey_levels

_DIGEST = "6726825d"  # of the TensorFlow graph of 2015-12-05 as converted by torch-fidelity
_LAYERS = ("64", "192", "768", "2048", "logits_unbiased", "logits", "spatial")
_STANDARD_FOR = {"2048": ("fid", "kid"), "logits_unbiased": ("is",), "spatial": ("sfid",)}
_SPATIAL_CHANNELS = 7  # of 17 x 17: 2023 features, about as many as the pooled ones


class Inception(LayerExtractor):
    """The Inception-v3 network of 2015-12-05 with which published FID, sFID, KID and Inception scores are computed.

    The network and its weights come from ``torch-fidelity`` (extra ``[metrics]``); they are loaded on first
    use, once for all layers. Images ``(B, 1 | 3, H, W)`` in ``[-1, 1]`` are rounded to 8 bits, as they would be in
    files; grey ones are repeated to three channels; the resize to 299 is the one of the original graph.

    The layer ``"spatial"`` is that of the sFID: "Generating Images with Sparse Representations" (Nash et al.,
    2021), as in the evaluation suite of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, 2021):
    the first 7 channels of the graph's tensor ``mixed_6/conv``, 17 x 17, flattened to 2023. In the names of PyTorch
    that is ``Mixed_6d.branch1x1`` (the graph counts ``mixed_4`` to ``mixed_7`` where PyTorch counts ``6b`` to ``6e``).

    Args:
        layer: ``"2048"`` (FID, KID, precision and recall), ``"spatial"`` (sFID), ``"logits_unbiased"`` (Inception
            score), or ``"64" | "192" | "768" | "logits"``.
        weights: a local file of the same weights for machines without a network; None downloads it. A file
            with another checksum is used, but its name says so and values are no longer called standard.

    Raises:
        ValueError: ``layer`` is unknown, or ``weights`` is no file.
        ImportError: ``torch-fidelity`` is missing (at first use).
        FileNotFoundError: the weights could not be downloaded (at first use).
    """

    def __init__(self, layer: str = "2048", weights: str | None = None) -> None:
        layer = str(layer)
        if layer not in _LAYERS:
            raise ValueError(f"layer must be one of {', '.join(_LAYERS)}, got {layer!r}")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights must be a file, got {weights!r}")
        super().__init__(layer)
        self.weights = weights
        self.digest = _DIGEST if weights is None else _digest(Path(weights), Path(weights).stat().st_mtime_ns)
        known = self.digest.startswith(_DIGEST)
        self.name = "inception" if known else f"inception-{self.digest[:8]}"
        self.name += "" if layer == "2048" else f":{layer}"
        self.standard_for = _STANDARD_FOR.get(layer, ()) if known else ()
        self.spatial = layer == "spatial"

    def key(self) -> tuple[Any, ...]:
        """See `LayerExtractor.key`."""
        return (self.weights, self.digest)

    def load(self) -> Trunk:
        """See `LayerExtractor.load`."""
        return _Network(self.weights)

    def companion(self, kind: Kind) -> Extractor:
        """See `Extractor.companion`."""
        return Inception({"spatial": "spatial", "logits": "logits_unbiased"}[kind], self.weights)

    def fingerprint(self) -> str:
        """Beginning of the hash of the weight file."""
        return self.digest[: len(_DIGEST)]


class _Network(Trunk):
    """torch-fidelity's network with one more layer, the spatial one."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.network = _load(weights)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._see)
        self._seen: Tensor | None = None

    def _see(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._seen = output[:, :_SPATIAL_CHANNELS]

    def outputs(self, x: Tensor, layers: set[str]) -> Mapping[str, Tensor]:
        """See `Trunk.outputs`."""
        asked = [layer for layer in _LAYERS if layer in layers and layer != "spatial"]
        self.network.features_list = asked or ["768"]  # the first one that lies behind the spatial layer
        found = dict(zip(self.network.features_list, self.network(grey_levels(x)), strict=True))
        spatial, self._seen = self._seen, None
        return {**found, "spatial": spatial} if "spatial" in layers else found


@cache
def _digest(file: Path, changed: int) -> str:
    """Hash of a file, computed again when it has changed."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _load(weights: str | None) -> Any:
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
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except OSError as error:
        raise FileNotFoundError(
            "the Inception weights could not be downloaded: fetch weights-inception-2015-12-05-6726825d.pth of "
            "torch-fidelity elsewhere and name the file, Inception(weights=FILE) or --extractor.weights FILE; or "
            "measure in other features, such as --extractor Pixels"
        ) from error
