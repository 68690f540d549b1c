"""Weights of other sizes: what a network computes after a resize is what it computed before, said in other sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_flows.flow import Condition
from lightning_flows.networks import (
    ADMUNet,
    DiT,
    EDMUNet,
    Patch,
    ReversedTime,
    resize_input_channels,
    resize_label_table,
    resize_output_channels,
    resize_patch_kernel,
    resize_patch_rows,
    resize_position_table,
)
from lightning_flows.networks.resize_rules import resized, rules_of
from lightning_flows.networks.resizing import bilinear_matrix
from lightning_flows.store import load_into
from tests.networks.test_unet import TINY as UNETS
from tests.networks.test_unet import randomised

DIT = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "frequency_size": 8}
U_NETS = pytest.mark.parametrize("cls", [ADMUNet, EDMUNet])


def dit(**options):
    return randomised(DiT(**{**DIT, **options}))


def unet(cls, **options):
    return randomised(cls(**{**UNETS[cls], **options}))


def moved(source, target, keep=()):
    """``target`` with the weights of ``source``, and what was said."""
    tensors, lines = resized(source.state_dict(), rules_of(target, source.config), keep=keep)
    load_into(target, tensors, reinit=list(keep))
    return target, lines


def images(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarged(x, old, new):
    """Every patch of ``x`` (B, C, H, W) by itself from side ``old`` to side ``new``, bilinear."""
    rows, columns = x.shape[2] // old, x.shape[3] // old
    patches = x.unflatten(2, (rows, old)).unflatten(4, (columns, old)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    patches = F.interpolate(patches, size=(new, new), mode="bilinear", antialias=True)
    patches = patches.unflatten(0, (len(x), rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return patches.flatten(4).flatten(2, 3)


T = torch.tensor([0.3, 0.8])
LABEL = Condition(label=torch.tensor([0, 2]))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------- the same size


@pytest.mark.parametrize(
    ("tensor", "rule", "options"),
    [
        (torch.ones(5, 3, 2, 2), resize_patch_kernel, {"old": Patch(2, 3), "new": Patch(2, 3, heads=2)}),
        (torch.ones(24, 5), resize_patch_rows, {"old": Patch(2, 3, 2), "new": Patch(2, 3, 2)}),
        (torch.ones(5, 4, 3, 3), resize_input_channels, {"old": (3, 1), "new": (3, 1)}),
        (torch.ones(4), resize_output_channels, {"old": (2, 4), "new": (2, 4)}),
        (torch.ones(4, 5), resize_label_table, {"old": (3, True), "new": (3, True)}),
        (torch.ones(1, 7, 5), resize_position_table, {"old": (2, 3), "new": (2, 3), "extra": 1}),
    ],
)
def test_the_same_size_is_the_same_tensor_and_another_shape_is_refused(tensor, rule, options):
    assert rule(tensor, **options) is tensor
    with pytest.raises(ValueError, match="which the config of the weights says"):
        rule(torch.cat([tensor, tensor], dim=1 if tensor.dim() > 2 else 0), **options)


@pytest.mark.parametrize(
    "network",
    [
        lambda: dit(num_classes=3, label_dropout=0.1, learn_sigma=True),
        lambda: unet(ADMUNet, num_classes=3, label_dropout=0.1, spatial_channels=2, out_channels=8),
        lambda: unet(EDMUNet, num_classes=3, label_dropout=0.1),
    ],
)
def test_a_network_of_the_same_sizes_is_left_alone(network):
    source = network()
    tensors, lines = resized(source.state_dict(), rules_of(network(), source.config))
    assert lines == []
    assert all(tensors[name] is not None and torch.equal(tensors[name], v) for name, v in source.state_dict().items())


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4), (2, 3), (4, 8)])
def test_enlarged_patches_have_the_tokens_that_they_had(old, new):
    weight, patch = images(6, 3, old, old), images(9, 3, old, old, seed=4)
    kernel = resize_patch_kernel(weight, old=Patch(old, 3), new=Patch(new, 3))
    assert kernel.shape == (6, 3, new, new)
    close(F.conv2d(enlarged(patch, old, new), kernel), F.conv2d(patch, weight))


def test_a_smaller_kernel_is_the_least_squares_fit_over_white_images():
    weight = images(1, 1, 4, 4)
    kernel = resize_patch_kernel(weight, old=Patch(4, 1), new=Patch(2, 1)).double().flatten()
    matrix = bilinear_matrix(4, 2)  # (4, 16)
    fit = torch.linalg.lstsq(matrix.t(), weight.double().flatten()[:, None]).solution[:, 0]
    close(kernel, fit)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4), (2, 6)])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_network_with_larger_patches_gives_the_enlarged_output_of_enlarged_images(old, new, learn_sigma):
    source = dit(patch_size=old, learn_sigma=learn_sigma, in_channels=2)
    size = 4 // old * new
    target, lines = moved(source, dit(patch_size=new, input_size=size, learn_sigma=learn_sigma, in_channels=2))
    x = images(2, 2, 4, 4)
    close(target(enlarged(x, old, new), T), enlarged(source(x, T), old, new))
    weight = tuple(source.final_layer.linear.weight.shape)
    assert lines[:2] == [
        f"x_embedder.proj.weight: (16, 2, {old}, {old}) -> (16, 2, {new}, {new}) (patch kernel)",
        f"final_layer.linear.weight: {weight} -> {(weight[0] * new**2 // old**2, 16)} (patch rows)",
    ]


def test_other_image_sizes_need_no_rule():
    source = dit(num_classes=3)
    target = dit(num_classes=3, input_size=(8, 6))
    assert load_into(target, source.state_dict()) == []
    x = images(2, 1, 8, 6)
    assert target(x, T, LABEL).shape == x.shape


# ---------------------------------------------------------------------- channels

KINDS = pytest.mark.parametrize(
    "make", [dit, lambda **o: unet(ADMUNet, **o), lambda **o: unet(EDMUNet, **o)], ids=["DiT", "ADM", "EDM"]
)


def side(network):
    return network.shape[1:]


@KINDS
def test_a_grey_network_in_colour_treats_grey_pictures_as_before(make):
    source, target = make(in_channels=1), make(in_channels=3)
    moved(source, target)
    x = images(2, 1, *side(source))
    close(target(x.expand(-1, 3, -1, -1), T), source(x, T).expand(-1, 3, -1, -1))


@KINDS
def test_a_colour_network_in_grey_gives_the_mean_of_what_it_gave(make):
    source, target = make(in_channels=3), make(in_channels=1)
    moved(source, target)
    x = images(2, 1, *side(source))
    close(target(x, T), source(x.expand(-1, 3, -1, -1), T).mean(1, keepdim=True))


@KINDS
def test_further_channels_are_neither_read_nor_written(make):
    source, target = make(in_channels=2), make(in_channels=3)
    moved(source, target)
    x = images(2, 3, *side(source))
    result = target(x, T)
    close(result[:, :2], source(x[:, :2], T))
    assert result[:, 2].eq(0).all()


@KINDS
def test_fewer_channels_are_refused_unless_they_start_afresh(make):
    source, target = make(in_channels=3), make(in_channels=2)
    with pytest.raises(ValueError, match=r"weight cannot be resized: 3 channels cannot become 2.*reinit"):
        moved(source, target)
    names = [name for name in rules_of(target, source.config)]
    fresh = {name: target.state_dict()[name].clone() for name in names}
    moved(source, target, keep=names)
    assert all(torch.equal(target.state_dict()[name], value) for name, value in fresh.items())


@pytest.mark.parametrize(("old", "new"), [(False, True), (True, False)])
def test_a_second_head_does_not_change_the_prediction(old, new):
    source, target = dit(learn_sigma=old, in_channels=2), dit(learn_sigma=new, in_channels=2)
    _, lines = moved(source, target)
    x = images(2, 2, 4, 4)
    close(target(x, T), source(x, T), 1e-6)
    assert [line.partition(":")[0] for line in lines] == ["final_layer.linear.weight", "final_layer.linear.bias"]


@U_NETS
@pytest.mark.parametrize(("old", "new"), [(None, 6), (6, None), (5, 8)])
def test_further_outputs_of_a_u_net_do_not_change_the_prediction(cls, old, new):
    source, target = unet(cls, in_channels=3, out_channels=old), unet(cls, in_channels=3, out_channels=new)
    moved(source, target)
    x = images(2, 3, 8, 8)
    close(target(x, T), source(x, T), 1e-6)
    both = min(old or 3, new or 3)
    assert torch.equal(target.out_conv.weight[:both], source.out_conv.weight[:both])


@U_NETS
def test_a_map_that_is_new_is_not_read_and_one_that_is_dropped_is_refused(cls):
    source, target = unet(cls), unet(cls, spatial_channels=2)
    moved(source, target)
    x = images(2, 4, 8, 8)
    close(target(x, T, Condition(spatial=images(2, 2, 8, 8))), source(x, T), 1e-6)
    with pytest.raises(ValueError, match="2 channels of a map cannot become 0"):
        moved(target, source)


PATCHES = {"input_size": 8, "patch_size": 2, "pooled_channels": 1}
HERE = {ADMUNet: {"attention_factors": (2,)}, EDMUNet: {"attention_sizes": (2,)}}


@U_NETS
def test_further_channels_of_patches_are_neither_read_nor_written(cls):
    make = {**PATCHES, **HERE[cls]}
    source, target = unet(cls, in_channels=3, **make), unet(cls, in_channels=4, **make)
    moved(source, target)
    x = images(2, 4, 8, 8)
    result = target(x, T)
    close(result[:, :2], source(x[:, :3], T)[:, :2], 1e-6)
    assert result[:, 2].eq(0).all()
    close(result[:, 3], source(x[:, :3], T)[:, 2], 1e-6)  # the pooled one


@U_NETS
def test_a_grey_network_of_patches_in_colour_treats_grey_pictures_as_before(cls):
    make = {"patch_size": 2, **HERE[cls]}
    source, target = unet(cls, in_channels=1, **make), unet(cls, in_channels=3, **make)
    moved(source, target)
    x = images(2, 1, 8, 8)
    close(target(x.expand(-1, 3, -1, -1), T), source(x, T).expand(-1, 3, -1, -1))


def test_other_patches_are_refused():
    source, target = unet(ADMUNet, in_channels=4), unet(ADMUNet, in_channels=1, patch_size=2)  # of the same shapes
    with pytest.raises(ValueError, match=r"cannot be resized: patches of 1 pixels cannot become patches of 4 .*reinit"):
        moved(source, target)


# ---------------------------------------------------------------------- classes

TABLE = "y_embedder.embedding_table.weight"


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_old_classes_are_what_they_were_bit_for_bit_after_new_ones_came(make, dropout):
    source = make(num_classes=3, label_dropout=dropout)
    target, lines = moved(source, make(num_classes=5, label_dropout=dropout))
    x = images(2, *source.shape)
    assert torch.equal(target(x, T, LABEL), source(x, T, LABEL))
    if dropout:
        assert torch.equal(target(x, T, target.null(LABEL)), source(x, T, source.null(LABEL)))
    table = target.y_embedder.embedding_table.weight
    close(table[3:5], source.y_embedder.embedding_table.weight[:3].mean(0).expand(2, -1))
    assert [line.partition(":")[0] for line in lines] == [TABLE]


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ((3, True), (4, True), rows(1, 2, 6, 3, 9)),
        ((3, True), (3, False), rows(1, 2, 6)),
        ((3, True), (4, False), rows(1, 2, 6, 3)),  # as many rows as before, and not the same ones
        ((4, False), (3 + 1, True), rows(1, 2, 6, 9, 4.5)),
    ],
)
def test_rows_keep_their_meaning(old, new, wanted):
    assert torch.equal(resize_label_table(rows(1, 2, 6, 9), old=old, new=new), wanted)


def test_fewer_classes_are_refused():
    with pytest.raises(ValueError, match=rf"{TABLE} cannot be resized: 3 classes cannot become 2"):
        moved(dit(num_classes=3), dit(num_classes=2))


def test_a_last_class_that_means_no_label_stays_the_last_one():
    source = dit(num_classes=4, absent_label="last")
    target, _ = moved(source, dit(num_classes=6, absent_label="last"))
    x = images(2, *source.shape)
    assert torch.equal(target(x, T, target.null(LABEL)), source(x, T, source.null(LABEL)))
    other, _ = moved(source, dit(num_classes=3, label_dropout=0.1))
    assert torch.equal(other(x, T, other.null(LABEL)), source(x, T, source.null(LABEL)))
    assert torch.equal(other(x, T, LABEL), source(x, T, LABEL))


def test_one_class_becomes_several_that_begin_alike():
    source = dit(num_classes=1)
    target, _ = moved(source, dit(num_classes=3, label_dropout=0.1))
    x = images(2, *source.shape)
    assert torch.equal(target(x, T, LABEL), source(x, T))
    assert torch.equal(target(x, T, target.null(LABEL)), source(x, T))


# ---------------------------------------------------------------------- places


def ramp(height, width):
    """Coordinates of pixel centres in [0, 1], (1, height width, 2)."""
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack([y[:, None].expand(-1, width), x[None].expand(height, -1)], dim=-1).reshape(1, -1, 2)


@pytest.mark.parametrize("new", [(16, 12), (16, 24), (4, 6)])
def test_a_table_of_places_is_interpolated(new):
    table = torch.cat([torch.full((1, 1, 2), 7.0), ramp(8, 12)], dim=1)
    result = resize_position_table(table, old=(8, 12), new=new, extra=1)
    assert torch.equal(result[:, :1], table[:, :1])
    inside = (slice(None), slice(new[0] // 4, -new[0] // 4), slice(new[1] // 4, -new[1] // 4))
    close(result[:, 1:].unflatten(1, new)[inside], ramp(*new).unflatten(1, new)[inside], 6e-3)


def test_both_layouts_of_a_table_are_one():
    table = images(1, 12, 5)
    as_map = table.transpose(1, 2).unflatten(2, (3, 4))
    flat, grid = (resize_position_table(t, old=(3, 4), new=(6, 5)) for t in (table, as_map))
    assert torch.equal(flat.transpose(1, 2).unflatten(2, (6, 5)), grid)


# ---------------------------------------------------------------------- the machinery


def test_rules_are_found_through_wrappers():
    source = ReversedTime(dit(num_classes=3))
    target, lines = moved(source, ReversedTime(dit(num_classes=4)))
    assert lines == [f"network.{TABLE}: (3, 16) -> (4, 16) (label table)"]
    x = images(2, *source.shape)
    assert torch.equal(target(x, T, LABEL), source(x, T, LABEL))


class Places(DiT):
    """A network of a user: a learned table of places with a rule of its own."""

    def __init__(self, input_size: int) -> None:
        super().__init__(**{**DIT, "input_size": input_size})
        self.places = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], 2))

    def resize_rules(self, source):
        old = (source["input_size"] // 2,) * 2
        return {"places": lambda table: resize_position_table(table, old=old, new=self.grid)}


def test_a_network_of_a_user_offers_its_own_rules():
    target, lines = moved(randomised(Places(4)), Places(8))
    assert lines == ["places: (1, 4, 2) -> (1, 16, 2) (<lambda>)"]
    assert target.places.abs().sum() > 0


def test_files_of_16_bits_are_resized_in_float32():
    source = dit(num_classes=3)
    half = {name: value.half() for name, value in source.state_dict().items()}
    tensors, _ = resized(half, rules_of(dit(num_classes=4, patch_size=4), source.config))
    assert {tensors[name].dtype for name in (TABLE, "x_embedder.proj.weight", "final_layer.linear.bias")} == {
        torch.float32
    }
    assert tensors["t_embedder.mlp.0.weight"].dtype == torch.float16


def test_arguments_that_an_old_config_does_not_name_have_their_defaults():
    source = dit(num_classes=3)
    config = source.config
    del config["init_args"]["learn_sigma"], config["init_args"]["label_dropout"]
    tensors, _ = resized(source.state_dict(), rules_of(dit(num_classes=4), config))
    assert tensors[TABLE].shape == (4, 16)
