"""The critic of patches."""

import pytest
import torch

from lightning_flows.networks import PatchDiscriminator


def test_each_score_sees_its_own_patch():
    network, x = (
        PatchDiscriminator(in_channels=1, hidden_size=8, depth=1),
        torch.randn(1, 1, 32, 32, requires_grad=True),
    )
    scores = network(x)
    assert scores.shape[:2] == (1, 1)
    # Without the normalisation, which looks at the whole image, a score's gradient is a patch.
    bare = torch.nn.Sequential(*[layer for layer in network.layers if not isinstance(layer, torch.nn.GroupNorm)])
    bare(x)[0, 0, 0, 0].backward()
    assert x.grad[0, 0, :8, :8].abs().sum() > 0
    assert x.grad[0, 0, 16:, 16:].abs().sum() == 0


def test_a_verdict_does_not_depend_on_the_batch():
    network, x = PatchDiscriminator(hidden_size=8, depth=2), torch.randn(3, 3, 16, 16)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-5)


def test_depth_three_sees_seventy_pixels():
    field, widths = 1, [(4, 1), (4, 1), (4, 2), (4, 2), (4, 2)]  # from the output back
    for kernel, stride in widths:
        field = (field - 1) * stride + kernel
    strides = [m.stride[0] for m in PatchDiscriminator().layers if isinstance(m, torch.nn.Conv2d)]
    assert field == 70
    assert strides[::-1] == [stride for _, stride in widths]


@pytest.mark.parametrize("side", [12, 13])
def test_the_smallest_image_still_has_a_score(side):
    assert PatchDiscriminator(hidden_size=8, depth=2)(torch.randn(1, 3, side, side)).numel() >= 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least 12, got"):
        PatchDiscriminator(hidden_size=8, depth=2)(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="norm_groups must divide hidden_size=8, got 3"):
        PatchDiscriminator(hidden_size=8, norm_groups=3)
    with pytest.raises(ValueError, match="depth"):
        PatchDiscriminator(depth=0)
