"""Scores a model of MNIST: recognised? distributed like the data? copied? And what a normalizing flow says of digits.

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_mnist tarflow-mnist --metrics FILE
    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_mnist tarflow-mnist-bpd --metrics FILE

Blocks of figures, each where it applies:

- ``likelihood``, for a flow in dequantised pixels: bits per dimension of the 10,000 test images
  (`benchmarks.mnist_bits`); without classes also the share of 1,000 samples that are finite (some run away where the
  data had no Gaussian noise);
- ``mnist`` and ``mnist_unguided``, with classes: the scores of `benchmarks.zoo_cnn` by the judge
  `benchmarks.judges.mnist_cnn`, 5,000 samples from one seed, with the model's guidance and at scale 1;
- ``mnist_noisy``, for a flow whose samples are denoised: the judge on the same guided samples before that step;
- ``classification``, for a flow with classes: the label that makes each of the first 2,000 test images likeliest;
- ``invertibility``, for a flow: 1,000 test images turned into noise and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import mnist_bits, zoo_cnn, zoo_flows
from benchmarks.judges import mnist_cnn
from benchmarks.judges.cnn import CLASSES, Real
from benchmarks.zoo_cnn import JUDGED, SEED, Values
from benchmarks.zoo_scores import draw, setting
from lightning_flows import from_pretrained
from lightning_flows.flow import Dequantization

CLASSIFIED, SAMPLES = 2000, 1000
DATA = "MNIST"


def blocks_of(model: Any, train: Tensor, test: Real, options: dict[str, Any], per_class: int) -> dict[str, Values]:
    """All blocks of a model, beside real training images (M, 1, 28, 28) and the real test data; likelihoods first."""
    flow, labelled = zoo_flows.is_flow(model), "label" in getattr(model.network, "streams", ())
    blocks: dict[str, Values] = {}
    if flow and isinstance(model.objective.data_noise, Dequantization):
        blocks["likelihood"] = bits(model, test.images)
        blocks["likelihood"] |= {} if labelled else zoo_flows.finite_samples(model, SAMPLES, SEED)
    if labelled:
        real = zoo_cnn.reference(mnist_cnn, train, test.images, per_class * CLASSES)
        blocks |= zoo_cnn.score_twice(mnist_cnn, "mnist", model, real, options, per_class, DATA)
    if labelled and flow:
        blocks |= before_denoising(model, options, min(JUDGED, per_class))
        found = zoo_flows.classification(model, test.images[:CLASSIFIED], test.labels[:CLASSIFIED])
        blocks["classification"] = {name: value | {"data": DATA} for name, value in found.items()}
    return blocks | zoo_cnn.inverted(model, *test, DATA)


def before_denoising(model: Any, options: dict[str, Any], per_class: int) -> dict[str, Values]:
    """Block ``mnist_noisy``: the judge on samples that hold the noise of the training data; none without such noise."""
    if not zoo_flows.setting_of(model, options)["denoise"]:
        return {}
    options = options | {"denoise": 0.0}
    drawn = draw(model, zoo_cnn.labels_of(per_class), SEED, options)
    how = setting(model, drawn, options, SEED) | {"data": DATA}
    found = zoo_cnn.accuracy(mnist_cnn, drawn, len(drawn.labels))
    return {"mnist_noisy": {name: how | value for name, value in found.items()}}


def bits(model: Any, images: Tensor) -> Values:
    """Bits per dimension of real images (N, 1, 28, 28) under a flow in dequantised pixels.

    Raises:
        ValueError: pixels that were dequantised to other levels.
    """
    noise = model.objective.data_noise
    if noise.levels != mnist_bits.LEVELS:
        raise ValueError(f"bits per dimension are those of {mnist_bits.LEVELS} levels, got {noise!r}")
    found = mnist_bits.figures(model, images, ())["test"]
    how = {"real": found["images"], "levels": found["levels"], "draws": found["draws"], "data_noise": repr(noise)}
    value = {"value": found["bits_per_dim"], "standard_error": found["standard_error"]}
    return {"bits_per_dim": value | how | zoo_flows.machine(model) | {"data": DATA}}


def main() -> None:
    args = zoo_cnn.parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model = from_pretrained(args.model, device=args.device)
    mnist_cnn.trained()  # before any sample is drawn
    train, test = (mnist_cnn.digits(split) for split in ("train", "test"))
    zoo_cnn.publish(blocks_of(model, train.images, test, zoo_cnn.options_of(args), args.per_class), args)


if __name__ == "__main__":
    main()
