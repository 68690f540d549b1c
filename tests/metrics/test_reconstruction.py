"""What an autoencoder's report says, on images whose answers are known."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_flows.metrics import LatentMoments, PeakSignalToNoise, StructuralSimilarity


def test_psnr_pools_the_error_of_values_in_zero_to_one():
    metric, x = PeakSignalToNoise(), torch.zeros(2, 1, 4, 4)
    metric.update(x, x + 0.2)  # 0.1 of the range
    metric.update(x[:1], x[:1])
    assert metric.compute().item() == pytest.approx(-10 * math.log10(0.01 * 2 / 3), abs=1e-5)


def test_psnr_clips_the_reconstruction():
    metric, x = PeakSignalToNoise(), torch.ones(1, 1, 2, 2)
    metric.update(x, x * 5)
    assert metric.compute() == math.inf


def test_psnr_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        PeakSignalToNoise().update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("side", [4, 7, 16])
def test_ssim_is_one_for_equal_images_and_less_for_others(side):
    metric, x = StructuralSimilarity(), torch.rand(3, 1, side, side) * 2 - 1
    metric.update(x, x)
    assert metric.compute().item() == pytest.approx(1, abs=1e-5)
    metric.update(x, x.flip(0))
    assert metric.compute().item() < 0.9


def test_ssim_is_the_usual_one_and_its_mean_counts_images():
    metric, x, y = StructuralSimilarity(), *(torch.rand(2, 5, 3, 24, 24) * 2 - 1)
    metric.update(x[:2], y[:2])
    metric.update(x[2:], y[2:])
    truth = structural_similarity_index_measure((y + 1) / 2, (x + 1) / 2, data_range=1.0)
    assert metric.compute().item() == pytest.approx(truth.item(), abs=1e-5)


def test_moments_pool_items_and_positions():
    z = torch.randn(10, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 1
    metric = LatentMoments()
    metric.update(z[:3])
    metric.update(z[3:])
    found = metric.compute()
    assert torch.allclose(found["mean"].float(), z.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found["std"].float(), z.std((0, 2, 3), correction=0), atol=1e-5)


def test_moments_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="no latents"):
        LatentMoments().compute()
