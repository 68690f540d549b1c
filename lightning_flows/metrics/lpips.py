r"""Learned perceptual distance of the drawn image to the real one of the same mask or label.

With the maps :math:`f_l` of a network of photographs, scaled to unit vectors at every position, and weights
:math:`w_l \ge 0` of their channels that were fitted to what people call alike,

.. math:: d(x, y) = \sum_l \operatorname{mean}_{h,w} \; w_l \cdot (\hat f_l(x) - \hat f_l(y))^2 .

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (Zhang, Isola, Efros, Shechtman, Wang, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_flows.metrics.features import grey_levels
from lightning_flows.metrics.inception import _digest

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}  # names in torchvision
_LEAST_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}  # of an image, below which a layer has nothing left to pool


class LPIPS(Metric):
    """Mean distance of pairs of a real and a drawn image; smaller is nearer.

    Images in [-1, 1] are rounded to 8 bits, grey ones repeated to three channels, and are not resized. The weights
    of the channels come with torchmetrics, those of the network are torchvision's, trained on ImageNet.

    Args:
        net: ``"alex"``, with which published values are computed, ``"vgg"`` or ``"squeeze"``.
        backbone_weights: a file of torchvision's weights of the network (``.pth`` or safetensors), for machines
            without the internet. None takes them from torch's cache, or downloads them there. A file of another
            checksum is used, but the name then says so.

    Attributes:
        name: ``lpips``, for another network ``lpips[vgg]``, for other weights ``lpips[alex-<their hash>]``.

    Raises:
        ValueError: an unknown ``net``, or ``backbone_weights`` is no file.
        FileNotFoundError: the weights could not be had (in ``prepare``, before anything is sampled).
    """

    full_state_update = False
    higher_is_better = False
    consumes = ("real", "sample")

    total: Tensor
    count: Tensor

    def __init__(self, net: Literal["alex", "vgg", "squeeze"] = "alex", backbone_weights: str | None = None) -> None:
        super().__init__()
        if net not in _BACKBONES:
            raise ValueError(f"net must be one of {', '.join(_BACKBONES)}, got {net!r}")
        if backbone_weights is not None and not Path(backbone_weights).is_file():
            raise ValueError(f"backbone_weights must be a file, got {backbone_weights!r}")
        self.net, self.backbone_weights = net, backbone_weights
        self.extractor = _BACKBONES[net] + _suffix(net, backbone_weights)
        named = net + _suffix(net, backbone_weights)
        self.name = "lpips" if named == "alex" else f"lpips[{named}]"
        self.network: nn.Module | None = None
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def prepare(self) -> None:
        """Load the network.

        Raises:
            FileNotFoundError: the weights are not in torch's cache and could not be downloaded.
            ValueError: ``backbone_weights`` holds another network.
        """
        if self.network is None:
            state = _download(self.net) if self.backbone_weights is None else _read(self.backbone_weights)
            self.network = _build(self.net, state)

    @torch.no_grad()
    def update(self, real: Tensor, sample: Tensor) -> None:
        """Take in real and drawn images, both (B, 1 | 3, H, W) in [-1, 1].

        Raises:
            ValueError: shapes differ, or images are too small for the network.
        """
        if real.shape != sample.shape:
            raise ValueError(f"real and sample must have one shape, got {tuple(real.shape)}, {tuple(sample.shape)}")
        if min(real.shape[-2:]) < _LEAST_SIDE[self.net]:
            raise ValueError(
                f"real must be images of side {_LEAST_SIDE[self.net]} or more for net={self.net!r}, "
                f"got {tuple(real.shape)}"
            )
        self.prepare()
        assert self.network is not None
        x, y = (grey_levels(image.to(self.device)).float() / 127.5 - 1 for image in (real, sample))
        with torch.autocast(x.device.type, enabled=False):
            distance = self.network.to(x.device)(x, y)  # (B, 1, 1, 1)
        self.total = self.total + distance.double().sum()
        self.count = self.count + len(real)

    def compute(self) -> Tensor:
        """The mean over pairs, a float64 scalar.

        Raises:
            ValueError: nothing was taken in.
        """
        if not self.count:
            raise ValueError(f"{self.name}: no pair of real and sample was given")
        return self.total / self.count


def _url(net: str) -> str:
    """Where torchvision's weights lie; the name of the file ends in the first digits of its hash."""
    from torchvision.models import get_model_weights  # here: slow to import, and needed by few

    return get_model_weights(_BACKBONES[net]).DEFAULT.url  # type: ignore[attr-defined]


def _suffix(net: str, weights: str | None) -> str:
    """Empty for the standard weights, else a dash and the first digits of the file's hash."""
    if weights is None:
        return ""
    digest = _digest(Path(weights), Path(weights).stat().st_mtime_ns)
    return "" if digest.startswith(Path(_url(net)).stem.rpartition("-")[2]) else f"-{digest[:8]}"


def _download(net: str) -> Mapping[str, Tensor]:
    url = _url(net)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the weights of {_BACKBONES[net]} could not be downloaded ({error}): fetch torchvision's {Path(url).name} "
            f"elsewhere and name the file, LPIPS({net!r}, backbone_weights=FILE)"
        ) from error


def _read(file: str) -> Mapping[str, Tensor]:
    if file.endswith(".safetensors"):
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _build(net: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The distance with the given weights of the network, frozen.

    Raises:
        ValueError: weights of another network.
    """
    # The public class of torchmetrics would download the weights; this one takes a network without them.
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        network = _LPIPS(net=net, pnet_rand=True)
    own = network.net.state_dict()
    # layers keep their numbers within torchvision's `features`, e.g. slice2.3.weight is features.3.weight
    wanted = {name: f"features.{name.removeprefix('slices.').partition('.')[2]}" for name in own}
    missing = [key for name, key in wanted.items() if key not in state or state[key].shape != own[name].shape]
    if missing:
        wrong = f"{missing[0]} is missing or of another shape"
        raise ValueError(f"backbone_weights must be those of {_BACKBONES[net]}: {wrong}")
    network.net.load_state_dict({name: state[key] for name, key in wanted.items()})
    return network.float().requires_grad_(False).eval()
