"""From state dicts of the ADM U-Nets to ours: names by a table of modules, sizes from keys and shapes.

A table maps our module names to official ones; every tensor of the file must be named by it, and every tensor that
it names must be there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_flows.networks import UNetBlock
from lightning_flows.store import load_into

ADM_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ADM_ATTENTION = {"attention.norm": "norm", "attention.qkv": "qkv", "attention.proj": "proj_out"}
EDM_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "embed": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
}


def load_named(network: nn.Module, tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> None:
    """Fill ``network`` with the tensors of an official state dict.

    Args:
        network: receives them.
        tensors: official names to tensors; a 1x1 convolution may have lost or gained axes of length 1.
        modules: our module names to official ones.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape, by their official names.
    """
    expected = network.state_dict()
    names = {ours: _official(ours, modules) for ours in expected}
    missing = sorted(set(names.values()) - set(tensors))
    unknown = sorted(set(tensors) - set(names.values()))
    problems = [f"{word} {', '.join(found)}" for word, found in (("missing", missing), ("unknown", unknown)) if found]
    for ours, theirs in names.items():
        if theirs in tensors and _core(tensors[theirs]) != _core(expected[ours]):
            shapes = tuple(tensors[theirs].shape), tuple(expected[ours].shape)
            problems.append(f"{theirs} has shape {shapes[0]} instead of {shapes[1]}")
    if problems:
        raise ValueError(f"the weights do not fit {type(network).__name__}: {'; '.join(problems)}")
    load_into(network, {ours: tensors[theirs].reshape(expected[ours].shape) for ours, theirs in names.items()})


def prefixed(table: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    """A table of the parts of one module, under its two names."""
    return {f"{ours}.{mine}": f"{theirs}.{official}" for mine, official in table.items()}


def adm_modules(network: nn.Module) -> dict[str, str]:
    """Our module names in an `ADMUNet` to those of guided-diffusion files."""
    names = {
        "t_embedder.mlp": "time_embed",
        "y_embedder.embedding_table": "label_emb",
        "stem": "input_blocks.0.0",
        "out_norm": "out.0",
        "out_conv": "out.2",
    }
    names |= _adm_block(network.middle[0], "middle.0", "middle_block")  # type: ignore[index]
    names |= prefixed(ADM_BLOCK, "middle.1", "middle_block.2")
    place = 1
    for i, level in enumerate(network.encoder):  # type: ignore[arg-type]
        for j, block in enumerate(level.blocks):
            names |= _adm_block(block, f"encoder.{i}.blocks.{j}", f"input_blocks.{place + j}")
        place += len(level.blocks)
        if level.resample is not None:
            names |= _adm_resample(level.resample, f"encoder.{i}.resample", f"input_blocks.{place}.0", "op")
            place += 1
    place = 0
    for i, level in enumerate(network.decoder):  # type: ignore[arg-type]
        for j, block in enumerate(level.blocks):
            names |= _adm_block(block, f"decoder.{i}.blocks.{j}", f"output_blocks.{place + j}")
        place += len(level.blocks)
        if level.resample is not None:
            index = 1 if level.blocks[-1].attention is None else 2
            theirs = f"output_blocks.{place - 1}.{index}"
            names |= _adm_resample(level.resample, f"decoder.{i}.resample", theirs, "conv")
    return names


def edm_modules(network: nn.Module) -> dict[str, str]:
    """Our module names in an `EDMUNet` to those of EDM files; the size of the map is part of those."""
    side = network.shape[1]  # type: ignore[index]
    names = {
        "t_embedder.mlp.0": "map_layer0",
        "t_embedder.mlp.2": "map_layer1",
        "y_embedder.embedding_table": "map_label",
        "stem": f"enc.{side}x{side}_conv",
        "out_norm": "out_norm",
        "out_conv": "out_conv",
    }
    for i, level in enumerate(network.encoder):  # type: ignore[arg-type]
        size = side >> i
        for j in range(len(level.blocks)):
            names |= prefixed(EDM_BLOCK, f"encoder.{i}.blocks.{j}", f"enc.{size}x{size}_block{j}")
        names |= prefixed(EDM_BLOCK, f"encoder.{i}.resample", f"enc.{size // 2}x{size // 2}_down")
    names |= prefixed(EDM_BLOCK, "middle.0", f"dec.{size}x{size}_in0")
    names |= prefixed(EDM_BLOCK, "middle.1", f"dec.{size}x{size}_in1")
    for i, level in enumerate(network.decoder):  # type: ignore[arg-type]
        for j in range(len(level.blocks)):
            names |= prefixed(EDM_BLOCK, f"decoder.{i}.blocks.{j}", f"dec.{size}x{size}_block{j}")
        size *= 2
        names |= prefixed(EDM_BLOCK, f"decoder.{i}.resample", f"dec.{size}x{size}_up")
    return names


def _adm_block(block: UNetBlock, ours: str, theirs: str) -> dict[str, str]:
    names = prefixed(ADM_BLOCK, ours, f"{theirs}.0")
    return names if block.attention is None else names | prefixed(ADM_ATTENTION, ours, f"{theirs}.1")


def _adm_resample(module: nn.Module, ours: str, theirs: str, conv: str) -> dict[str, str]:
    return prefixed(ADM_BLOCK if isinstance(module, UNetBlock) else {"conv": conv}, ours, theirs)


def _official(ours: str, modules: Mapping[str, str]) -> str:
    head, tail = ours, ""
    while head not in modules:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
        if not head:
            raise ValueError(f"{ours} has no name in the official files")
    return modules[head] + tail


def _core(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the axes of length 1 of a 1x1 convolution."""
    shape = tuple(tensor.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
