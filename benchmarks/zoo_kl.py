"""Scores an autoencoder of Fashion-MNIST on the 10,000 test images, beside PCA with as many numbers.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_kl kl-fashion-mnist --metrics FILE

Three reconstructions, each clipped to [0, 1]: of the posterior's mean, of one draw of the posterior, and by the
leading principal components of the 60,000 training images, as many as a latent has numbers:

- PSNR in dB, from the squared error of all pixels of all images together, in [0, 1];
- SSIM (`torchmetrics`, window of 11 pixels), the mean over images;
- Frechet distance of the reconstructions to the originals in the features of `benchmarks.judges.fashion_cnn`;

and for each channel of the latent the mean and the deviation of the posterior's mean, and the root mean square of
the posterior's deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from benchmarks import common
from benchmarks.judges import fashion_cnn
from benchmarks.zoo_scores import frechet, write
from lightning_flows import from_pretrained
from lightning_flows.flow import SampleNoise, seeds_from
from lightning_flows.metrics.reconstruction import LatentMoments, PeakSignalToNoise, StructuralSimilarity

SEED = 0
DATA = "Fashion-MNIST"
_ROWS = 500


class Coded(NamedTuple):
    """Latents (N, c, h, w) of images and what they decode to (N, C, H, W), not clipped."""

    latent: Tensor
    image: Tensor


@torch.no_grad()
def code(model: Any, images: Tensor, seed: int | None = None) -> Coded:
    """Encode and decode ``images`` (N, C, H, W) in [-1, 1]: by the posterior's mean, or by a draw from a seed."""
    latents, decoded = [], []
    seeds = None if seed is None else seeds_from(seed, len(images)).split(_ROWS)
    for i, rows in enumerate(images.split(_ROWS)):
        z = model.encode(rows.to(model.device), None if seeds is None else SampleNoise(seeds[i]))
        latents.append(z.float().cpu())
        decoded.append(model.decode(z).float().cpu())
    return Coded(torch.cat(latents), torch.cat(decoded))


def principal_components(train: Tensor, images: Tensor, count: int) -> Tensor:
    """``images`` (N, ...) from their ``count`` leading principal components of ``train`` (M, ...), float64 inside.

    Raises:
        ValueError: ``count`` is not between 1 and the number of pixels.
    """
    dim = train[0].numel()
    if not 1 <= count <= dim:
        raise ValueError(f"count must be 1 to {dim}, got {count}")
    mean, product = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for rows in train.flatten(1).split(_ROWS):
        mean += rows.double().sum(0) / len(train)
    for rows in train.flatten(1).split(_ROWS):
        centred = rows.double() - mean
        product += centred.T @ centred
    basis = torch.linalg.eigh(product).eigenvectors[:, -count:]  # (D, count), ascending order
    centred = images.flatten(1).double() - mean
    return (centred @ basis @ basis.T + mean).to(images.dtype).reshape(images.shape)


def paired(metric: Metric, found: Tensor, images: Tensor) -> float:
    """A metric of pairs of images in [-1, 1], of which the found ones are clipped."""
    for rows in zip(images.split(_ROWS), found.split(_ROWS), strict=True):
        metric.update(*rows)
    return metric.compute().item()


def latent_figures(mean: Tensor, drawn: Tensor) -> dict[str, float]:
    """Mean and deviation of each channel of the posterior's means, and the posterior's own deviation."""
    moments = LatentMoments()
    moments.update(mean)
    own = {f"{name}_{c}": x.item() for name, row in moments.compute().items() for c, x in enumerate(row.reshape(-1))}
    spread = (drawn - mean).double().square().mean((0, 2, 3)).sqrt()
    return own | {f"posterior_std_{c}": x.item() for c, x in enumerate(spread)}


class Kind(NamedTuple):
    """One way to reconstruct: what stands behind the names of its figures, the images, and its setting."""

    suffix: str
    image: Tensor
    setting: dict[str, Any]


def scores(model: Any, train: Tensor, test: Tensor) -> dict[str, dict[str, Any]]:
    """The values with what they were computed from; ``psnr`` of the posterior's mean comes first."""
    mode, drawn = code(model, test), code(model, test, SEED)
    count = mode.latent[0].numel()
    kinds = [
        Kind("", mode.image, {}),
        Kind("[sampled posterior]", drawn.image, {"seed": SEED}),
        Kind(f"[pca-{count}]", principal_components(train, test, count), {"train": len(train)}),
    ]
    how = {"data": DATA, "real": len(test), "device": str(model.device)}
    values = {
        name + kind.suffix: {"value": measure(kind.image, test), **how, **seen, **kind.setting}
        for name, measure, seen in _measures()
        for kind in kinds
    }
    latent = {"value": latent_figures(mode.latent, drawn.latent), **how, "numbers": count, "seed": SEED}
    return values | {"latent": latent}


def _measures() -> list[tuple[str, Callable[[Tensor, Tensor], float], dict[str, Any]]]:
    """Name, function of (found, images) in [-1, 1], and what to say beside the value."""
    judge = {"extractor": fashion_cnn.NAME, "judge": fashion_cnn.trained().digest}
    return [
        ("psnr", lambda found, images: paired(PeakSignalToNoise(), found, images), {}),
        ("ssim", lambda found, images: paired(StructuralSimilarity(), found, images), {}),
        (f"frechet[{fashion_cnn.NAME}]", lambda found, images: frechet(images, found, fashion_cnn.extractor()), judge),
    ]


def report(values: dict[str, Any]) -> str:
    """The table: one row for each figure, then the latent's channels."""
    rows = [[name, f"{entry['value']:.4f}"] for name, entry in values.items() if name != "latent"]
    latent = values["latent"]
    rows += [[f"latent {name}", f"{value:.4f}"] for name, value in latent["value"].items()]
    return common.table(["score", f"value on {values['psnr']['real']} test images"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", help="zoo id, folder, or org/name@revision")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--metrics", type=Path, help="metrics.json that receives the block 'reconstruction'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = from_pretrained(args.model, device=args.device)
    values = scores(model, *(fashion_cnn.garments(split).images for split in ("train", "test")))
    common.show(report(values))
    if args.metrics is not None:
        write(args.metrics, "reconstruction", values, ("torchmetrics",))
    common.finish({"model": args.model, "values": values}, [], args.json)


if __name__ == "__main__":
    main()
