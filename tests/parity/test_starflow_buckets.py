"""Sizes of the aspect-ratio buckets, as the official code computes them."""

import json
import os
from pathlib import Path

import pytest

from lightning_flows.data import AspectBuckets
from tests.parity.parity_cases import NO_CASES, VARIABLE


def every_size():
    """Each entry of ``bucket_sizes`` in the helpers of a family."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        missing = pytest.mark.skip(reason=f"{VARIABLE} does not name the folder of reference numbers")
        return [pytest.param(None, marks=missing, id="bucket_sizes")]
    entries = [
        pytest.param(entry, id=f"{file.parent.name}/{entry['target_side']}-{entry['multiple']}-{entry['aspect_ratio']}")
        for file in sorted(Path(folder).glob("*/helpers.json"))
        for entry in json.loads(file.read_text()).get("bucket_sizes", [])
    ]
    return entries or [pytest.param(None, id=NO_CASES)]


@pytest.mark.parametrize("entry", every_size())
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
