"""Features of any image network that timm knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lightning_flows.metrics.features import Extractor, Kind, LayerExtractor, Trunk, digest_of, grey_levels

_LAYERS = ("pooled", "spatial", "logits")


class Timm(LayerExtractor):
    """A network of timm, such as ``"vit_small_patch14_dinov2.lvd142m"``, with the sizes and colours it was trained on.

    Images ``(B, 1 | 3, H, W)`` in ``[-1, 1]`` are rounded to 8 bits, grey ones repeated to three channels, resized
    (bicubic, antialiased) to the network's input and normalised by its mean and deviation. "Exposing flaws of
    generative model evaluation metrics and their unfair treatment of diffusion models" (Stein et al., 2023)
    recommends DINOv2 features over Inception's.

    Args:
        model: name in timm, with its tag; values are ``frechet[<model>]``.
        layer: ``"pooled"``, ``"logits"`` of a classifier, or ``"spatial"``: the first ``channels`` channels of the
            last feature map but one, flattened with their places.
        weights: a safetensors file of the network for machines without the Hub; None downloads it. The name then
            carries the file's hash.
        channels: of the spatial layer.

    Raises:
        ValueError: an unknown model or layer, logits of a network without classes, or ``weights`` is no file.
        ImportError: timm is missing.
    """

    def __init__(self, model: str, layer: str = "pooled", weights: str | None = None, channels: int = 7) -> None:
        if layer not in _LAYERS:
            raise ValueError(f"layer must be one of {', '.join(_LAYERS)}, got {layer!r}")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights must be a file, got {weights!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        super().__init__(layer)
        self.model, self.weights, self.channels = model, weights, channels
        self.classes = _classes(model)
        if layer == "logits" and not self.classes:
            raise ValueError(f"layer='logits' needs a classifier, {model} has no classes")
        self.name = model if weights is None else f"{model}-{digest_of(load_file(weights))[:8]}"
        self.name += "" if layer == "pooled" else f":{layer}"
        self.spatial = layer == "spatial"

    def key(self) -> tuple[Any, ...]:
        """See `LayerExtractor.key`."""
        return (self.model, self.weights, self.channels)

    def load(self) -> Trunk:
        """See `LayerExtractor.load`."""
        return _Network(self.model, self.weights, self.channels)

    def companion(self, kind: Kind) -> Extractor | None:
        """See `Extractor.companion`."""
        if kind == "logits" and not self.classes:
            return None
        return Timm(self.model, kind, self.weights, self.channels)

    def fingerprint(self) -> str:
        """Hash of the network's weights, which are loaded for it."""
        self.prepare()
        assert self.network is not None
        return digest_of(self.network.state_dict())


class _Network(Trunk):
    def __init__(self, model: str, weights: str | None, channels: int) -> None:
        super().__init__()
        self.network, self.channels = _load(model, weights), channels
        settings = self.network.pretrained_cfg
        self.size = tuple(settings["input_size"][1:])
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).reshape(-1, 1, 1), persistent=False)

    def outputs(self, x: Tensor, layers: set[str]) -> Mapping[str, Tensor]:
        """See `Trunk.outputs`."""
        x = self._input(x)
        hidden, found = None, {}
        if "spatial" in layers:
            hidden, maps = self.network.forward_intermediates(x, indices=[-2], output_fmt="NCHW")
            found["spatial"] = maps[0][:, : self.channels]  # (B, channels, h, w)
        hidden = self.network.forward_features(x) if hidden is None else hidden
        if "pooled" in layers:
            found["pooled"] = self.network.forward_head(hidden, pre_logits=True)  # (B, D)
        if "logits" in layers:
            found["logits"] = self.network.forward_head(hidden)  # (B, classes)
        return found

    def _input(self, x: Tensor) -> Tensor:
        x = grey_levels(x).float() / 255
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self.mean) / self.std


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("Timm() needs timm: install the extra with `pip install lightning-flows[metrics]`") from error
    return timm


def _classes(model: str) -> int:
    timm = _timm()
    if not timm.is_model(model.partition(".")[0]):
        near = ", ".join(timm.list_models(f"*{model.partition('_')[0]}*")[:5])
        raise ValueError(f"model must be a name of timm.list_models(), got {model!r} (near it: {near or 'nothing'})")
    settings = timm.get_pretrained_cfg(model)
    return 0 if settings is None else settings.num_classes


def _load(model: str, weights: str | None) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            network = _timm().create_model(model, pretrained=weights is None)
    except Exception as error:  # the Hub's client, urllib and timm each raise their own
        raise FileNotFoundError(
            f"{model} could not be loaded ({error}): fetch its weights elsewhere as safetensors and name the file, "
            "Timm(weights=FILE) or --extractor.weights FILE"
        ) from error
    if weights is not None:
        network.load_state_dict(load_file(weights))
    return network.float()
