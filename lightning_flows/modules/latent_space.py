"""The latent space in which a family models data: a codec, and statistics that travel with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_flows.codecs import Codec, Identity, Posterior
from lightning_flows.flow import Noise, StepNoise, key
from lightning_flows.modules.base import GenerativeModule
from lightning_flows.modules.cached_latents import check_latents
from lightning_flows.modules.publishable import run_seed


class LatentSpace(GenerativeModule):
    """A generative module that models ``z = (codec.encode(x) - latent_shift) * latent_scale``.

    A family calls `set_latent_space` in its constructor.

    Attributes:
        codec: data <-> latent.
        shape: (C, H, W) of a latent.
        standardize: batches from which the statistics are measured before the first step of a fresh run; 0 for none.
        latent_shift: subtracted from latents, buffer, shape (C, 1, 1).
        latent_scale: factor on latents, buffer, shape (C, 1, 1).
    """

    latent_shift: Tensor
    latent_scale: Tensor

    def set_latent_space(
        self, network: nn.Module, codec: Codec | None, shape: tuple[int, int, int] | None, standardize: int
    ) -> None:
        """Set the network and everything about its latents.

        Raises:
            ValueError: an unknown latent shape.
        """
        self.network, self.codec, self.standardize = network, codec or Identity(), standardize
        self.shape = tuple(shape or getattr(network, "shape", ()))
        if len(self.shape) != 3:
            raise ValueError(
                f"shape must be (C, H, W): {type(network).__name__} does not say it, give it to the module"
            )
        self.register_buffer("latent_shift", torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("latent_scale", torch.ones(self.shape[0], 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The scale of the latents is a float32 island, also where Lightning turns a module into 16 bits (bf16-true).
        before = {name: getattr(self, name) for name in ("latent_shift", "latent_scale")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if getattr(self, name).dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def latent_of(self, batch: Any, noise: Noise | None = None) -> Tensor:
        """The latents that the flow models, (B, C, H, W), of a batch of images or of cached latents."""
        return (self._coded(batch, noise) - self.latent_shift) * self.latent_scale

    def _coded(self, batch: Any, noise: Noise | None) -> Tensor:
        """What the codec encodes a batch to, now or when it was cached."""
        if "latent" not in batch:
            return self.codec.encode(self.data_of(batch), noise)
        return self.codec.draw(Posterior(batch["latent"], batch.get("latent_std")), noise)

    def data_of(self, batch: Any) -> Tensor:
        """The images of a batch, (B, C', H', W'); of cached latents what they decode to: reconstructions.

        Raises:
            ValueError: a batch without images and latents.
        """
        if "latent" in batch and "image" not in batch:
            return self.codec.decode(batch["latent"])
        return super().data_of(batch)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The latent that the flow models, (B, C', H', W') -> (B, C, H, W)."""
        return (self.codec.encode(x, noise) - self.latent_shift) * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """Data of a latent, (B, C, H, W) -> (B, C', H', W'); differentiable."""
        return self.codec.decode(z / self.latent_scale + self.latent_shift)

    def setup(self, stage: str) -> None:
        """Refuses cached latents and tokens that are not this model's, before a step is taken.

        Raises:
            ValueError: latents of another codec, or of another shape; tokens of another text encoder.
        """
        super().setup(stage)
        check_latents(self.trainer.datamodule, self.codec, self.shape)

    def on_train_start(self) -> None:
        """Measures the latents once, before the first step, unless their statistics came with weights."""
        if self.standardize and self.trainer.global_step == 0 and not self._has_statistics():
            self.set_latent_statistics(*self._measure_latents())

    def _has_statistics(self) -> bool:
        return bool((self.latent_shift != 0).any() or (self.latent_scale != 1).any())

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store per-channel mean and deviation, each (C,), so that latents leave `encode` with 0 and 1.

        Raises:
            ValueError: a deviation that is not positive.
        """
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive, got {std.tolist()}")
        self.latent_shift.copy_(mean.reshape(-1, 1, 1))
        self.latent_scale.copy_(1 / std.reshape(-1, 1, 1))

    @torch.no_grad()
    def _measure_latents(self) -> tuple[Tensor, Tensor]:
        moments = torch.zeros(3, self.shape[0], dtype=torch.float64, device=self.device)
        loader = (
            self.trainer.datamodule.train_dataloader() if self.trainer.datamodule else self.trainer.train_dataloader
        )
        for i, batch in zip(range(self.standardize), loader, strict=False):
            noise = StepNoise(key("statistics", run_seed()), i, self.global_rank)
            z = self._coded(self.trainer.strategy.batch_to_device(batch), noise).double()
            count = z[:, 0].numel()
            moments += torch.stack([z.new_full((len(moments[0]),), count), z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])
        moments = self.trainer.strategy.reduce(moments, reduce_op="sum")
        mean = moments[1] / moments[0]
        return mean.float(), (moments[2] / moments[0] - mean**2).sqrt().float()

    # ------------------------------------------------------------------ density

    def density_dims(self, x: Tensor) -> int:
        """See `GenerativeModule.density_dims`: those of the latent."""
        return math.prod(self.codec.latent_shape(tuple(x.shape[1:])))

    def latent_volume(self, z: Tensor) -> Tensor:
        """Log of how much `encode` stretches a latent z (B, C, H, W) by its scale, a scalar."""
        return self.latent_scale.abs().log().sum() * (z.shape[2] * z.shape[3])
