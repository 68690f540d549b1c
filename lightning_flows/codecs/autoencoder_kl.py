r"""The image autoencoders of latent diffusion, frozen: through diffusers, or trained with this package.

With the encoder's Gaussian posterior of mean and standard deviation :math:`\mu(x), s(x)`,

.. math:: z = (\mu + s\,\epsilon - \text{shift}) \cdot \text{scale}, \qquad \hat x = D(z / \text{scale} + \text{shift}).

Reference: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach, Blattmann, Lorenz, Esser,
Ommer, 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flows.codecs.base import Posterior
from lightning_flows.codecs.frozen import FrozenCodec
from lightning_flows.codecs.kl_network import KLNetwork
from lightning_flows.flow.noise import Noise
from lightning_flows.store import WEIGHTS, build, load_into, load_tensors, read_config, resolve

_PART = "network."  # of the tensors of a `modules.KLAutoencoder`
_NETWORKS = ("lightning_flows.codecs.KLNetwork", "lightning_flows.codecs.kl_network.KLNetwork")


class AutoencoderKL(FrozenCodec):
    """A frozen `diffusers.AutoencoderKL`, or the network of a `modules.KLAutoencoder`; loaded when it is first used.

    Lazy loading, devices and precision: see `FrozenCodec`. An existing folder comes first; a name without a
    slash is a zoo id; whether ``org/name`` is diffusers' or ours says its ``config.json``.

    Args:
        repo: ``org/name``, ``org/name@revision``, a zoo id, or a local folder.
        subfolder: folder of the autoencoder in a repository of diffusers that holds more.
        revision: commit, branch or tag, where ``repo`` does not say it.
        scale: factor on the latent; None takes ``scaling_factor`` of the autoencoder's config.
        shift: what is subtracted before; None takes ``shift_factor`` of the config (0 where it has none).
        posterior: ``"sample"`` draws from the posterior, ``"mode"`` takes its mean.

    Raises:
        ValueError: an unknown ``posterior``, a ``scale`` that is not positive, a revision given twice.
    """

    architecture = "AutoencoderKL"
    widths = "block_out_channels"

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
        super().__init__(repo, subfolder=subfolder, revision=revision, scale=scale, shift=shift)
        self.stochastic = posterior == "sample"

    # ---- the codec

    def moments(self, network: Any, x: Tensor) -> Posterior:
        """See `FrozenCodec.moments`."""
        if isinstance(network, KLNetwork):
            mean, log_variance = network.encode_moments(x)
            return Posterior(mean, (0.5 * log_variance).exp())
        distribution = network.encode(x).latent_dist
        return Posterior(distribution.mean, distribution.std)

    def decoded(self, network: Any, latent: Tensor) -> Tensor:
        """See `FrozenCodec.decoded`."""
        return network.decode(latent) if isinstance(network, KLNetwork) else super().decoded(network, latent)

    def draw(self, posterior: Posterior, noise: Noise | torch.Generator | None = None) -> Tensor:
        """See `Codec.draw`; the mean alone for ``posterior="mode"``."""
        return super().draw(posterior, noise if self.stochastic else None)

    # ---- weights of ours

    def read_settings(self) -> dict[str, Any]:
        """See `FrozenCodec.read_settings`."""
        config = self._read_config()
        return dict(_unloaded(config, self.repo).settings) if "class_path" in config else config

    def load(self) -> nn.Module:
        """See `FrozenCodec.load`.

        Raises:
            ValueError: a model of ours that is no autoencoder, or weights that do not fit it.
        """
        config = self._read_config()
        if "class_path" not in config:
            return super().load()
        network = _unloaded(config, self.repo)
        tensors = load_tensors(self._folder() / WEIGHTS)
        own = {name.removeprefix(_PART): value for name, value in tensors.items() if name.startswith(_PART)}
        load_into(network, own)
        return network

    def _read_config(self) -> dict[str, Any]:
        """``config.json`` of either kind; for a repository on the Hub this file alone is fetched."""
        if self._is_zoo_id():
            return read_config(self._folder())
        return super().read_settings()

    def _is_zoo_id(self) -> bool:
        return "/" not in self.repo and not Path(self.repo).is_dir()

    def _folder(self) -> Path:
        return resolve(self.repo, revision=self.revision)


def _unloaded(config: dict[str, Any], repo: str) -> KLNetwork:
    """The network of a `modules.KLAutoencoder`, without numbers (on the meta device)."""
    entry = config.get("init_args", {}).get("network")
    if not isinstance(entry, dict) or entry.get("class_path") not in _NETWORKS:
        raise ValueError(f"repo {repo!r} holds a {config['class_path']}, which is no KL autoencoder")
    with torch.device("meta"):
        return build(entry, KLNetwork)
