"""The judges recognise real data, reject wrong labels, and say their own score."""

import pytest
import torch

from benchmarks.common import compare, table
from benchmarks.judges import digits_svm


def test_the_judge_recognises_held_out_digits():
    assert digits_svm.trained().accuracy >= 0.98


def test_real_digits_pass_and_wrong_labels_do_not():
    images, labels = digits_svm.digits()
    verdict = digits_svm.judge(images, labels)
    assert verdict.accuracy > 0.99
    assert verdict.judge == digits_svm.trained().accuracy
    assert digits_svm.judge(images, (labels + 1) % 10).accuracy < 0.01
    assert f"{verdict.judge:.4f}" in str(verdict)


def test_noise_scores_about_one_in_ten():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(500, 1, 8, 8, generator=generator) * 2 - 1
    assert digits_svm.judge(noise, torch.randint(10, (500,), generator=generator)).accuracy < 0.2


def test_values_outside_the_range_are_clipped_like_pixels():
    images, labels = digits_svm.digits()
    extreme = torch.where(images > 0, 50.0, -50.0)
    assert digits_svm.judge(extreme, labels) == digits_svm.judge(extreme.clamp(-1, 1), labels)


@pytest.mark.parametrize(
    ("images", "labels"), [((3, 64), (3,)), ((3, 1, 8, 8), (2,)), ((0, 1, 8, 8), (0,)), ((1, 2, 8, 8), (1,))]
)
def test_wrong_shapes_are_named(images, labels):
    with pytest.raises(ValueError, match="images and labels must be"):
        digits_svm.judge(torch.zeros(images), torch.zeros(labels))


def test_images_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="images must be finite"):
        digits_svm.judge(torch.full((1, 1, 8, 8), torch.nan), torch.zeros(1))


def test_a_judge_below_its_bar_refuses_to_judge(monkeypatch):
    monkeypatch.setattr(digits_svm, "REQUIRED", 1.01)
    digits_svm.trained.cache_clear()
    with pytest.raises(RuntimeError, match=r"1\.01 are needed"):
        digits_svm.trained()


def test_compare_runs_everyone_each_round_in_rotated_order():
    calls = []
    result = compare({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, bare="a")
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert result["a"].ratio == pytest.approx(1.0, abs=1.0)


def test_compare_measures_ratios_of_cpu_time():
    def work(n):
        return lambda: sum(range(n))

    result = compare({"one": work(200_000), "three": work(600_000)}, rounds=9, bare="one")
    assert 2 < result["three"].ratio < 4.5
    with pytest.raises(ValueError, match="bare must be one of"):
        compare({"a": work(1)}, 1, "b")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        compare({"a": work(1)}, 0, "a")


def test_a_table_is_markdown():
    assert table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
