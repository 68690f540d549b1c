"""Sizes of the aspect-ratio buckets, as the official code computes them."""

import json

import pytest

from lightning_flows.data import AspectBuckets
from tests.parity.parity_cases import parameters


def sizes(folder):
    """Each entry of ``bucket_sizes`` in the helpers of a family."""
    return [
        (f"{file.parent.name}/{entry['target_side']}-{entry['multiple']}-{entry['aspect_ratio']}", (entry,))
        for file in sorted(folder.glob("*/helpers.json"))
        for entry in json.loads(file.read_text()).get("bucket_sizes", [])
    ]


@parameters("bucket_sizes", ("entry",), sizes)
def test_size_of_a_bucket(entry):
    buckets = AspectBuckets(entry["target_side"], entry["multiple"], ratios=(entry["aspect_ratio"],))
    assert list(buckets.size(entry["aspect_ratio"])) == entry["height_width"]


@pytest.mark.parametrize(
    ("side", "multiple", "ratio", "size"),
    [
        (256, 8, "16:9", (192, 344)),
        (256, 8, "9:21", (392, 168)),
        (512, 16, "5:4", (464, 576)),
        (640, 16, "16:9", (480, 848)),
        (1024, 8, "1:1", (1024, 1024)),
    ],
)
def test_sizes_that_are_known_without_the_folder(side, multiple, ratio, size):
    assert AspectBuckets(side, multiple).size(ratio) == size
