"""How well an autoencoder gives its images back, and what its latents look like."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

WINDOW = 11


class _Pairs(Metric):
    """A sum over pairs of an image and its reconstruction, and a count; larger values are better."""

    full_state_update = False
    higher_is_better = True
    consumes = ("real", "sample")

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")


class PeakSignalToNoise(_Pairs):
    """Peak signal-to-noise ratio in dB: ``-10 log10`` of the squared error pooled over all values, range [0, 1].

    Takes images in [-1, 1] and their reconstructions, which are clipped.
    """

    name = "psnr"

    def update(self, real: Tensor, sample: Tensor) -> None:
        """Take in images and reconstructions, both (B, C, H, W).

        Raises:
            ValueError: shapes differ.
        """
        if real.shape != sample.shape:
            raise ValueError(f"real and sample must have one shape, got {tuple(real.shape)}, {tuple(sample.shape)}")
        error = (real.double() - sample.double().clamp(-1, 1)) / 2
        self.total = self.total + error.square().sum()
        self.count = self.count + error.numel()

    def compute(self) -> Tensor:
        """The ratio in dB, a float64 scalar; infinite where nothing differs."""
        return -10 * (self.total / self.count).log10()


class StructuralSimilarity(_Pairs):
    """Mean structural similarity of images and their reconstructions, in [-1, 1].

    The window is the usual Gaussian of deviation 1.5 over 11 pixels, and a box where an image is smaller than that.

    Reference: Image Quality Assessment: From Error Visibility to Structural Similarity (Wang, Bovik, Sheikh,
    Simoncelli, 2004).
    """

    name = "ssim"

    def update(self, real: Tensor, sample: Tensor) -> None:
        """Take in images in [-1, 1] and reconstructions, both (B, C, H, W)."""
        side = min(real.shape[-2:])
        values = structural_similarity_index_measure(
            (sample.float().clamp(-1, 1) + 1) / 2,
            (real.float() + 1) / 2,
            gaussian_kernel=side >= WINDOW,
            kernel_size=min(WINDOW, side - 1 + side % 2),  # odd; the Gaussian's follows from its deviation
            data_range=1.0,
            reduction="none",
        )
        self.total = self.total + values.double().sum()
        self.count = self.count + len(real)

    def compute(self) -> Tensor:
        """The mean over images, a float64 scalar."""
        return self.total / self.count


class LatentMoments(Metric):
    """Mean and deviation of every latent channel: what a flow subtracts and divides by.

    The deviation pools items and positions. A channel whose deviation is near 0 carries nothing.
    """

    full_state_update = False
    name = "latent"
    consumes = ("latent",)

    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("moments", default=[], dist_reduce_fx="cat")

    def update(self, latent: Tensor) -> None:
        """Take in latents (B, c, h, w)."""
        z = latent.double().transpose(0, 1).flatten(1)  # (c, B h w)
        self.moments.append(torch.stack([torch.full_like(z[:, 0], z.shape[1]), z.sum(1), z.square().sum(1)])[None])

    def compute(self) -> dict[str, Tensor]:
        """``{"mean" (c,), "std" (c,)}``, float64.

        Raises:
            ValueError: nothing was taken in.
        """
        rows = self.moments if isinstance(self.moments, Tensor) else torch.cat([*self.moments] or [torch.zeros(0)])
        if not len(rows):
            raise ValueError("latent: no latents were taken in")
        count, total, squares = rows.sum(0)
        mean = total / count
        return {"mean": mean, "std": (squares / count - mean.square()).clamp(min=0).sqrt()}
