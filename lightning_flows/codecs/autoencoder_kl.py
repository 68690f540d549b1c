r"""The image autoencoders of latent diffusion, frozen, through diffusers.

With the encoder's Gaussian posterior of mean and standard deviation :math:`\mu(x), s(x)`,

.. math:: z = (\mu + s\,\epsilon - \text{shift}) \cdot \text{scale}, \qquad \hat x = D(z / \text{scale} + \text{shift}).

Reference: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser,
Ommer, 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_flows.codecs.base import Codec
from lightning_flows.flow.noise import Noise


class AutoencoderKL(Codec):
    """A frozen `diffusers.AutoencoderKL`, loaded when it is first used.

    The network follows the device of its input, stays in eval mode and in float32 (also under autocast), has
    no trainable parameter and is never a submodule of whatever holds the codec. Copies of the codec share it;
    a pickle leaves it out. Gradients flow through ``decode`` to z, and through ``encode`` to x.

    Args:
        repo: ``org/name``, ``org/name@revision``, or a local folder.
        subfolder: folder of the autoencoder in a repository that holds more.
        revision: commit, branch or tag, where ``repo`` does not say it.
        scale: factor on the latent; None takes ``scaling_factor`` of the autoencoder's config.
        shift: what is subtracted before; None takes ``shift_factor`` of the config (0 where it has none).
        posterior: ``"sample"`` draws from the posterior, ``"mode"`` takes its mean.

    Raises:
        ValueError: an unknown ``posterior``, a ``scale`` that is not positive, a revision given twice.
    """

    def __init__(
        self,
        repo: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        posterior: Literal["sample", "mode"] = "sample",
    ) -> None:
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior must be 'sample' or 'mode', got {posterior!r}")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive or None, got {scale}")
        self.repo, self.revision = _reference(repo, revision)
        self.subfolder, self.posterior = subfolder, posterior
        self._scale, self._shift = scale, shift
        self._network: Any = None  # a diffusers network, once it is used
        self._settings: dict[str, Any] | None = None

    # ---- the codec

    def encode(self, x: Tensor, noise: Noise | torch.Generator | None = None) -> Tensor:
        """Latent of images.

        Args:
            x: (B, C, H, W) in [-1, 1].
            noise: draws of the posterior: a `Noise` (purpose ``"posterior"``) or a CPU generator. None gives
                the mean: nothing is drawn from a global stream.

        Returns:
            z, float32, (B, c, h, w).

        Raises:
            ValueError: height or width that the autoencoder cannot halve often enough.
        """
        self.latent_shape(tuple(x.shape[1:]))
        with torch.autocast(x.device.type, enabled=False):
            distribution = self.network(x.device).encode(x.float()).latent_dist
            z = distribution.mean
            if self.posterior == "sample" and noise is not None:
                z = z + distribution.std * _normal(noise, z)
            return (z - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w), float32, about [-1, 1], not clipped."""
        with torch.autocast(z.device.type, enabled=False):
            return self.network(z.device).decode(z.float() / self.scale + self.shift).sample

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) for images of ``shape`` (C, H, W); reads the config, not the weights."""
        settings = self.settings
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        channels, height, width = shape
        if channels != settings["in_channels"] or height % factor or width % factor:
            raise ValueError(
                f"shape must be ({settings['in_channels']}, H, W) with H and W multiples of {factor} "
                f"for {self.repo}, got {tuple(shape)}"
            )
        return settings["latent_channels"], height // factor, width // factor

    @property
    def scale(self) -> float:
        """Factor on the latent."""
        return float(self.settings["scaling_factor"]) if self._scale is None else self._scale

    @property
    def shift(self) -> float:
        """What is subtracted from the latent."""
        return float(self.settings.get("shift_factor") or 0.0) if self._shift is None else self._shift

    # ---- the frozen network

    @property
    def settings(self) -> dict[str, Any]:
        """The autoencoder's own config."""
        if self._settings is None:
            self._settings = dict(_diffusers().load_config(self.repo, **self._where()))
        return self._settings

    def network(self, device: torch.device | str = "cpu") -> Any:
        """The frozen autoencoder on ``device``."""
        if self._network is None:
            loaded = _diffusers().from_pretrained(
                self.repo, torch_dtype=torch.float32, use_safetensors=True, **self._where()
            )
            self._network = loaded.eval().requires_grad_(False)
        if next(self._network.parameters()).device != torch.device(device):
            self._network.to(device)
        return self._network

    def _where(self) -> dict[str, Any]:
        given = {"subfolder": self.subfolder, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}

    def __getstate__(self) -> dict[str, Any]:
        """State without the loaded network: a pickle names weights, it does not carry them."""
        return {**self.__dict__, "_network": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoencoderKL:
        """A codec that shares the frozen network."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        memo[id(self)] = copy
        return copy


def _diffusers() -> Any:
    from diffusers import AutoencoderKL as Network  # here: heavy, and needed by few

    return Network


def _reference(repo: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision; a local folder may have an @ in its name."""
    if Path(repo).is_dir() or "@" not in repo:
        return repo, revision
    name, _, pinned = repo.rpartition("@")
    if revision is not None and revision != pinned:
        raise ValueError(f"revision={revision!r} contradicts repo={repo!r}: give one of them")
    return name, pinned


def _normal(noise: Noise | torch.Generator, like: Tensor) -> Tensor:
    if isinstance(noise, Noise):
        return noise.normal("posterior", like=like)
    return torch.randn(like.shape, generator=noise, dtype=like.dtype, device=noise.device).to(like.device)
