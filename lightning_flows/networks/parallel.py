"""What is done to a network from outside, block by block: recomputed activations, compiled blocks, sharded parameters.

A network is written for one device and knows nothing of this. Its repeated blocks hold nearly all of its parameters,
operations and activations, so they are the units of all three:

- `checkpoint_blocks` keeps the input of a block alone and computes the rest again in the backward pass;
- `compile_blocks` compiles what a block does once for all blocks of a class, `compile_network` the network as a whole;
- `shard_blocks` spreads parameters over devices (FSDP2): a block's own are gathered where it computes, and only there.

All work in place and change neither the names nor the values of the state dict. What a block does in the
end is always: gather its parameters, then the compiled function, in it the recomputation, in it the block's own
``forward``, in whatever order the functions were called.

References:
    Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin, 2016).
    PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (Zhao et al., 2023).
"""

from __future__ import annotations

import atexit
import inspect
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ blocks


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated blocks of a network by name, in order of appearance.

    They are the instances of the classes in ``block_classes``, an attribute of the network's class (or of the class of
    a part of it); without such an attribute, the members of its outermost `torch.nn.ModuleList`.

    Raises:
        ValueError: the network has neither.
    """
    classes = tuple(cls for part in network.modules() for cls in getattr(type(part), "block_classes", ()))
    if classes:
        found = {name: part for name, part in network.named_modules() if isinstance(part, classes)}
    else:
        lists = {name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList)}
        found = {f"{name}.{i}": part for name, parts in lists.items() for i, part in enumerate(parts)}
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no blocks: give its class an attribute block_classes = (Block, ...), "
            "or keep the blocks in a torch.nn.ModuleList"
        )
    return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}


# ------------------------------------------------------------------ recomputed and compiled blocks

# All blocks share a function's code, and with it the number of compilations after which torch gives up and goes on
# uncompiled. It is 8, and the blocks of a U-Net have more shapes than that. Older versions of torch cannot be told.
LIMIT: dict[str, Any] = (
    {"recompile_limit": 128} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


class OutsideForward:
    """Stands in for a module's ``forward``: recomputed in the backward pass, compiled, or both.

    It is an attribute of the instance, so that hooks of the module (those of FSDP2 among them) stay outside of it.

    Args:
        module: whose ``forward`` it calls.

    Attributes:
        recompute: keep the inputs alone for the backward pass.
        compiler: options of `torch.compile`, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.inner = module.forward
        self.recompute = False
        self.compiler: dict[str, Any] | None = None
        self._run: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's ``forward`` returns."""
        if self._run is None:
            self._run = self._made()
        return self._run(*args, **kwargs)

    def _made(self) -> Callable[..., Any]:
        run = self._recomputed if self.recompute else self.inner
        return run if self.compiler is None else torch.compile(run, **(LIMIT | self.compiler))

    def _recomputed(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)

    def set(self, **options: Any) -> None:
        """Change `recompute` or `compiler`."""
        for name, value in options.items():
            setattr(self, name, value)
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled function, which is made again at its first call."""
        return {**vars(self), "_run": None}


def checkpoint_blocks(network: nn.Module, every: int = 1) -> list[str]:
    """Compute the activations of every ``every``-th block again in the backward pass, instead of keeping them.

    One more forward pass of those blocks (at most a third more time) for the memory of their activations. The
    results are the same, bit for bit.

    Args:
        network: changed in place.
        every: 1 for all blocks, 2 for every second one, and so on.

    Returns:
        Names of those blocks.

    Raises:
        ValueError: ``every`` below 1, or a network without blocks.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    chosen = dict(list(blocks_of(network).items())[::every])
    for block in chosen.values():
        _outside(block).set(recompute=True)
    return list(chosen)


def compile_blocks(network: nn.Module, **options: Any) -> list[str]:
    """Compile each block; blocks of one class and shape share one compilation.

    Args:
        network: changed in place.
        **options: of `torch.compile`, such as ``mode``, ``dynamic``, ``fullgraph``, ``backend``.

    Returns:
        Names of the blocks.

    Raises:
        ValueError: a network without blocks.
    """
    found = blocks_of(network)
    for block in found.values():
        _outside(block).set(compiler=options)
    return list(found)


def compile_network(network: nn.Module, **options: Any) -> None:
    """Compile the network as a whole: fewer launches than block by block, for a longer compilation.

    Args:
        network: changed in place; not one that is sharded.
        **options: of `torch.compile`.

    Raises:
        ValueError: the network is sharded, whose gathering cannot be compiled as one.
    """
    if is_sharded(network):
        raise ValueError("a sharded network is compiled block by block: use compile_blocks")
    _outside(network).set(compiler=options)


def restore_blocks(network: nn.Module) -> None:
    """Undo `checkpoint_blocks`, `compile_blocks` and `compile_network`."""
    for part in network.modules():
        if isinstance(part.__dict__.get("forward"), OutsideForward):
            del part.__dict__["forward"]


def _outside(module: nn.Module) -> OutsideForward:
    made = module.__dict__.get("forward")
    if not isinstance(made, OutsideForward):
        module.__dict__["forward"] = made = OutsideForward(module)
    return made


# ------------------------------------------------------------------ sharded parameters


def shard_blocks(network: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Spread the parameters over the devices of ``mesh`` by `torch.distributed.fsdp.fully_shard` (FSDP2).

    Each block is gathered before it computes, forward and backward, and freed afterwards; what is outside of the blocks
    is one more group. Parameters are gathered in their own dtype: those of the float32 islands
    (`networks.layers.without_autocast`) must not arrive in 16 bits. Weights of rank 0 count, as in DDP.

    Args:
        network: changed in place: its parameters become DTensors. A network that is sharded is left as it is.
        mesh: of one axis.

    Returns:
        Names of the blocks.

    Raises:
        ValueError: a mesh of several axes, or a network without blocks.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one axis, got {mesh.ndim}: {mesh.mesh_dim_names}")
    found = blocks_of(network)
    if is_sharded(network):
        return list(found)
    _share_first(network, mesh)
    for part in [*found.values(), network]:
        # The last group too is freed after a forward pass: weights that are replaced while it is gathered (an
        # average in a validation) would else not be seen.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return list(found)


def _share_first(network: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks the weights and buffers of the first one; they go where the mesh computes."""
    network.to(torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu")
    first = dist.get_global_rank(mesh.get_group(), 0)
    for value in [*network.parameters(), *network.buffers()]:
        dist.broadcast(value.detach(), first, group=mesh.get_group())


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is spread over devices."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Any) -> Any:
    """A tensor without its sharding, on the CPU; containers by their parts, other values as they are.

    Every rank must call it, with values in the same order.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return type(value)({name: whole(part) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(whole(part) for part in value)
    return value


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """``value`` spread over devices as ``like`` is, with the values of rank 0; as it is where ``like`` is not spread.

    Every rank must call it, with values in the same order.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements)


# ------------------------------------------------------------------ the end of a process

MOMENT = 1.0  # seconds: long for a thread that has nothing else to do, on a busy machine, too


def leave_group_at_exit() -> None:
    """Take this process out of its gloo group before the interpreter ends; if an error ends it, wait a moment instead.

    A thread of gloo lets go of the tensors of the last exchange after whoever waited for them has gone on. If the
    interpreter has ended by then, the process is aborted ("terminate called without an active exception"), and a run
    that was done fails, or one that failed ends with another status. After an error leaving would wait for an exchange
    that may never end. Lightning leaves groups of NCCL alone. Calling it again changes nothing.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() != "gloo":
        return
    if getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()
    else:
        time.sleep(MOMENT)
