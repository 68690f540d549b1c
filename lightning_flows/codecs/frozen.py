r"""What the codecs over a pretrained autoencoder share: a network that is named, loaded late and never trained.

With the autoencoder's own latent :math:`u = E(x)` and decoder D,

.. math:: z = (u - \text{shift}) \cdot \text{scale}, \qquad \hat x = D(z / \text{scale} + \text{shift}).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_flows.codecs.base import Codec, Posterior


class FrozenCodec(Codec):
    """A frozen autoencoder of diffusers, loaded when it is first used.

    The network follows the device of its input, stays in eval mode and in float32 (also under autocast), has
    no trainable parameter and is never a submodule of whatever holds the codec. Copies of the codec share it;
    a pickle leaves it out. Gradients flow through ``decode`` to z, and through ``encode`` to x.

    A subclass names the class of the network in diffusers and says how it encodes and decodes.

    Args:
        repo: ``org/name``, ``org/name@revision``, or a local folder.
        subfolder: folder of the autoencoder in a repository that holds more.
        revision: commit, branch or tag, where ``repo`` does not say it.
        scale: factor on the latent; None takes ``scaling_factor`` of the autoencoder's config.
        shift: what is subtracted before; None takes ``shift_factor`` of the config (0 where it has none).

    Raises:
        ValueError: a ``scale`` that is not positive, a revision given twice.
    """

    architecture: str  # name of the network's class in diffusers
    widths: str  # setting that lists the channels of the resolutions: one halving fewer than entries

    def __init__(
        self,
        repo: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive or None, got {scale}")
        self.repo, self.revision = _reference(repo, revision)
        self.subfolder = subfolder
        self._scale, self._shift = scale, shift
        self._network: nn.Module | None = None  # once it is used
        self._settings: dict[str, Any] | None = None

    # ---- the codec

    @abstractmethod
    def moments(self, network: Any, x: Tensor) -> Posterior:
        """The posterior in the autoencoder's own units, of float32 images (B, C, H, W)."""

    def decoded(self, network: Any, latent: Tensor) -> Tensor:
        """Images of latents (B, c, h, w) in the autoencoder's own units."""
        return network.decode(latent).sample

    def posterior(self, x: Tensor) -> Posterior:
        """Mean and, where there is one, deviation of z, float32, each (B, c, h, w).

        Args:
            x: images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: height or width that the autoencoder cannot halve often enough.
        """
        self.latent_shape(tuple(x.shape[1:]))
        with torch.autocast(x.device.type, enabled=False):
            mean, std = self.moments(self.network(x.device), x.float())
            return Posterior((mean - self.shift) * self.scale, None if std is None else std * self.scale)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w), float32, about [-1, 1], not clipped."""
        with torch.autocast(z.device.type, enabled=False):
            return self.decoded(self.network(z.device), z.float() / self.scale + self.shift)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) for images of ``shape`` (C, H, W); reads the config, not the weights."""
        settings = self.settings
        factor = 2 ** (len(settings[self.widths]) - 1)
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
            self._settings = self.read_settings()
        return self._settings

    def network(self, device: torch.device | str = "cpu") -> Any:
        """The frozen autoencoder on ``device``."""
        if self._network is None:
            self._network = self.load().eval().requires_grad_(False)
        if next(self._network.parameters()).device != torch.device(device):
            self._network.to(device)
        return self._network

    def read_settings(self) -> dict[str, Any]:
        """The autoencoder's config, without its weights.

        Raises:
            ValueError: it is nowhere to be found, or cannot be fetched.
        """
        with self._named():
            return dict(self._diffusers().load_config(self.repo, **self._where()))

    def load(self) -> nn.Module:
        """The autoencoder with its weights, float32, on the CPU.

        Raises:
            ValueError: they are nowhere to be found, or cannot be fetched.
        """
        with self._named():
            return self._diffusers().from_pretrained(
                self.repo, torch_dtype=torch.float32, use_safetensors=True, **self._where()
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says which autoencoder could not be read, and what else would do."""
        try:
            yield
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the autoencoder {self.repo!r} of the codec cannot be loaded ({reason}). Give a folder with it: "
                "repo=FOLDER, on the command line --model.init_args.codec.init_args.repo FOLDER"
            ) from error

    def _diffusers(self) -> Any:
        import diffusers  # here: heavy, and needed by few

        return getattr(diffusers, self.architecture)

    def _where(self) -> dict[str, Any]:
        given = {"subfolder": self.subfolder, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}

    def __getstate__(self) -> dict[str, Any]:
        """State without the loaded network: a pickle names weights, it does not carry them."""
        return {**self.__dict__, "_network": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A codec that shares the frozen network."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        memo[id(self)] = copy
        return copy


def _reference(repo: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision; a local folder may have an @ in its name."""
    if Path(repo).is_dir() or "@" not in repo:
        return repo, revision
    name, _, pinned = repo.rpartition("@")
    if revision is not None and revision != pinned:
        raise ValueError(f"revision={revision!r} contradicts repo={repo!r}: give one of them")
    return name, pinned
