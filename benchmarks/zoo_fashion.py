"""Scores a class-conditional model of Fashion-MNIST: recognised? distributed like the data? copied?

    LIGHTNING_FLOWS_DATA=FOLDER python -m benchmarks.zoo_fashion lfm-fashion-mnist --metrics FILE

5,000 samples, 500 of each class, of at most 25 network calls each, from one seed; the judge is
`benchmarks.judges.fashion_cnn`, the scores are those of `benchmarks.zoo_cnn`. All of it again at guidance scale 1,
where the model's own scale is another one (block ``fashion_unguided``). For a normalizing flow also: 1,000 test images
turned into noise and back (block ``invertibility``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import zoo_cnn
from benchmarks.judges import fashion_cnn
from benchmarks.zoo_cnn import JUDGED, NEAREST, PER_CLASS, SEED, Reference, copies, labels_of, report, subset
from lightning_flows import from_pretrained

__all__ = [
    "DATA", "JUDGED", "NEAREST", "PER_CLASS", "SEED", "Reference", "blocks_of", "copies", "labels_of", "reference",
    "report", "score", "scores", "subset",
]  # fmt: skip

DATA = "Fashion-MNIST"

reference = partial(zoo_cnn.reference, fashion_cnn)
scores = partial(zoo_cnn.scores, fashion_cnn)
score = partial(zoo_cnn.score, fashion_cnn, data=DATA)


def blocks_of(
    model: Any, train: Tensor, test: fashion_cnn.Real, options: dict[str, Any], per_class: int
) -> dict[str, zoo_cnn.Values]:
    """All blocks of a model, beside real training images (M, 1, 28, 28) and the real test data."""
    real = reference(train, test.images, per_class * fashion_cnn.CLASSES)
    found = zoo_cnn.score_twice(fashion_cnn, "fashion", model, real, options, per_class, DATA)
    return found | zoo_cnn.inverted(model, *test, DATA)


def main() -> None:
    args = zoo_cnn.parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model = from_pretrained(args.model, device=args.device)
    fashion_cnn.trained()  # before any sample is drawn
    train, test = (fashion_cnn.garments(split) for split in ("train", "test"))
    zoo_cnn.publish(blocks_of(model, train.images, test, zoo_cnn.options_of(args), args.per_class), args)


if __name__ == "__main__":
    main()
