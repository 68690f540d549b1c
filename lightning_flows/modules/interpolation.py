"""From one sample to another through the noise of a normalizing flow, which is a bijection: data have a noise too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_flows.flow import AffineGuidance, Condition, SampleNoise, seeds_from
from lightning_flows.modules.base import evaluation
from lightning_flows.modules.inpainting import noise_of
from lightning_flows.modules.inversion import slerp
from lightning_flows.networks import InverseMethod, check_condition


class Interpolation:
    """The mixin that walks from one noise to another."""

    network: Any
    denoise: float
    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    prior: Callable[..., Tensor]
    draw: Callable[..., Any]
    denoised: Callable[..., Tensor]
    _guidance: Callable[..., AffineGuidance | None]

    @torch.no_grad()
    def interpolate(
        self,
        a: Tensor | int,
        b: Tensor | int,
        n: int,
        condition: Condition | None = None,
        *,
        guidance: AffineGuidance | float | None = None,
        method: InverseMethod | None = None,
        denoise: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Samples on the great circle between the noises z of two ends (see `slerp`), both ends included.

        Args:
            a: where it starts: data of one sample, shape (...), which become their own noise, or the seed of a sample.
            b: where it ends, likewise.
            n: number of samples, at least 2.
            condition: one (batch size 1) for all, or two (batch size 2), of ``a`` and of ``b``: each sample takes
                that of its nearer end, the middle one that of ``a``. Conditions are not mixed.
            guidance: of both directions; the module's by default.
            method: how blocks are inverted; the module's by default.
            denoise: see `NormalizingFlow.generate`. By default 0 where an end is data, which held no noise and so are
                met exactly, and the module's between two seeds.
            seed: of the draws of a codec that encodes to a distribution.

        Returns:
            Shape (n, ...).

        Raises:
            ValueError: fewer than two samples, a condition of another batch size, data of another shape than the
                model's at the end of a seed, two noises that are exactly opposite.
        """
        if n < 2:
            raise ValueError(f"n must be at least 2 (both ends are included), got {n}")
        given = 1 if condition is None or condition.batch_size is None else condition.batch_size
        if given not in (1, 2):
            raise ValueError(f"condition must have batch size 1 (of all) or 2 (of both ends), got {given}")
        check_condition(self.network, condition)
        condition = None if condition is None else condition.to(self.device)  # type: ignore[attr-defined]
        rule = self._guidance(guidance)
        with evaluation(self):  # type: ignore[arg-type]
            ends = [
                self._end(end, rows_of(condition, [min(k, given - 1)]), rule, seed)[0] for k, end in enumerate((a, b))
            ]
            weights = torch.linspace(0, 1, n, dtype=torch.float64)
            rows = rows_of(condition, ((weights > 0.5) & (given == 2)).long().tolist())
            drawn = self.draw(slerp(ends[0], ends[1], weights), rows, guidance=rule, method=method).x
            data = any(isinstance(end, Tensor) for end in (a, b))
            strength = (0.0 if data else self.denoise) if denoise is None else denoise
            return self.decode(self.denoised(drawn, rows, strength))

    def _end(self, end: Tensor | int, condition: Condition | None, rule: AffineGuidance | None, seed: int) -> Tensor:
        """The noise of one end of an interpolation, shape (1, C, H, W)."""
        if not isinstance(end, Tensor):
            like = torch.empty(1, *self.shape, device=self.device)  # type: ignore[attr-defined]
            return self.prior(SampleNoise([int(end)]), like)
        given = SampleNoise(seeds_from(seed, 1))
        latent = self.encode(end[None].to(self.device), given)  # type: ignore[attr-defined]
        return noise_of(self, latent, condition, rule)[0]


def rows_of(condition: Condition | None, index: Tensor | list[int]) -> Condition | None:
    """Samples of a condition, repeated and in any order; what is the same for all stays."""
    if condition is None or condition.batch_size is None:
        return condition
    return condition[torch.as_tensor(index)]
