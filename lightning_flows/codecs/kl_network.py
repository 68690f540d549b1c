r"""The network of a KL autoencoder to be trained: encoder with a Gaussian posterior, and decoder, of diffusers.

.. math:: q(z \mid x) = \mathcal N(\mu(x), \operatorname{diag} s^2(x)), \qquad \hat x = D(z).

Residual blocks of two 3x3 convolutions with group normalisation at every resolution, halved between them, and one
attention layer in the middle, on both sides.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser, Ommer, 2022).
    Auto-Encoding Variational Bayes (Kingma, Welling, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flows.store import Recorded

LOG_VARIANCE = (-30.0, 20.0)  # the range to which the encoder's log-variance is clamped


class KLNetwork(Recorded, nn.Module):
    """Encoder and decoder of an image autoencoder whose latent is 2^(levels - 1) times smaller on each side.

    Its weights are those of a `diffusers.AutoencoderKL`, under the same names behind ``kl.``; `hub.convert` takes them
    there and back.

    Args:
        in_channels: channels C of an image.
        latent_channels: channels c of a latent.
        channels: width of each level, from full resolution to the latent's; each a multiple of ``norm_groups``.
        layers: residual blocks of an encoder level; a decoder level has one more.
        norm_groups: groups of every normalisation.
        attention: attention layer in the middle.
        quant_conv: 1x1 convolutions beside the latent, as in Stable Diffusion 1 and 2 (3 and FLUX have none).
        scaling_factor: what users of the diffusers folder multiply latents by; it changes nothing here.
        shift_factor: what they subtract before.

    Raises:
        ValueError: no level, a width that the groups do not divide, or a number that is not positive.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        layers: int = 2,
        norm_groups: int = 32,
        attention: bool = True,
        quant_conv: bool = True,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        positive = {"in_channels": in_channels, "latent_channels": latent_channels, "layers": layers}
        for name, value in (positive | {"norm_groups": norm_groups}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not channels or any(width < 1 or width % norm_groups for width in channels):
            raise ValueError(f"channels must be multiples of norm_groups={norm_groups}, got {list(channels)}")
        if not scaling_factor > 0:
            raise ValueError(f"scaling_factor must be positive, got {scaling_factor}")
        self.settings: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": in_channels,
            "latent_channels": latent_channels,
            "block_out_channels": list(channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "layers_per_block": layers,
            "norm_num_groups": norm_groups,
            "mid_block_add_attention": attention,
            "use_quant_conv": quant_conv,
            "use_post_quant_conv": quant_conv,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
        }
        self.kl = _diffusers()(**self.settings)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> KLNetwork:
        """The network, with fresh weights, that a diffusers config describes.

        Raises:
            ValueError: a block or an option that this network does not have.
        """
        _check_settings(settings)
        return cls(
            in_channels=settings.get("in_channels", 3),
            latent_channels=settings.get("latent_channels", 4),
            channels=tuple(settings.get("block_out_channels", (64,))),
            layers=settings.get("layers_per_block", 1),
            norm_groups=settings.get("norm_num_groups", 32),
            attention=settings.get("mid_block_add_attention", True),
            quant_conv=settings.get("use_quant_conv", True),
            scaling_factor=settings.get("scaling_factor", 0.18215),
            shift_factor=settings.get("shift_factor") or 0.0,
        )

    @classmethod
    def from_diffusers(cls, folder: str | Path) -> KLNetwork:
        """The network with the weights of a local diffusers folder (``config.json``, safetensors).

        Raises:
            ValueError: no such folder, or an architecture that this network does not have.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder} is no diffusers folder: it has no config.json")
        network = cls.from_settings(dict(_diffusers().load_config(folder)))
        loaded = _diffusers().from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
        network.kl.load_state_dict(loaded.state_dict())
        return network

    def save_diffusers(self, folder: str | Path, scaling_factor: float | None = None) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` for `diffusers.AutoencoderKL`.

        Args:
            folder: made if needed.
            scaling_factor: another one than the network's own, such as one over the latents' deviation.
        """
        changed = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
        copy = _diffusers()(**self.settings | changed)
        copy.load_state_dict(self.kl.state_dict())
        copy.save_pretrained(folder, safe_serialization=True)

    @property
    def latent_channels(self) -> int:
        """Channels c of a latent."""
        return int(self.settings["latent_channels"])

    @property
    def scaling_factor(self) -> float:
        """What users of the latents multiply them by."""
        return float(self.settings["scaling_factor"])

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """The parts on which latents of images depend: the encoder and, where there is one, its 1x1 convolution."""
        return [part for part in (self.kl.encoder, self.kl.quant_conv) if part is not None]

    @property
    def factor(self) -> int:
        """How often a side of the latent goes into a side of the image."""
        return 2 ** (len(self.settings["block_out_channels"]) - 1)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(c, h, w) of the latent for images (C, H, W).

        Raises:
            ValueError: other channels, or sides that are no multiples of `factor`.
        """
        channels, height, width = shape
        if channels != self.settings["in_channels"] or height % self.factor or width % self.factor:
            raise ValueError(
                f"images must be ({self.settings['in_channels']}, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(shape)}"
            )
        return self.settings["latent_channels"], height // self.factor, width // self.factor

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, c, h, w) float32, of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        self.latent_shape(x.shape[1:])
        moments = self.kl.encoder(x)  # (B, 2c, h, w)
        moments = moments if self.kl.quant_conv is None else self.kl.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w), about [-1, 1], not clipped."""
        return self.kl.decoder(z if self.kl.post_quant_conv is None else self.kl.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction from the posterior's mean, (B, C, H, W)."""
        return self.decode(self.encode_moments(x)[0])

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return self.kl.decoder.conv_out.weight


_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}


def _check_settings(settings: dict[str, Any]) -> None:
    for name, wanted in _FIXED.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"the config says {name}={settings[name]!r}; KLNetwork has {wanted!r} only")
    for name, wanted in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if other := sorted(set(settings.get(name, [wanted])) - {wanted}):
            raise ValueError(f"the config says {name}={other}; KLNetwork has {wanted!r} only")
    for name, other, default in (("in_channels", "out_channels", 3), ("use_quant_conv", "use_post_quant_conv", True)):
        if settings.get(name, default) != settings.get(other, default):
            raise ValueError(f"the config says {other}={settings.get(other)}, but {name}={settings.get(name)}")


def _diffusers() -> Any:
    from diffusers import AutoencoderKL as Network  # here: heavy, and needed by few

    return Network
