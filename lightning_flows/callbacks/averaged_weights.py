"""The tensors behind `EMA`: parameters, their float32 average, the raw weights while the average stands in.

The three are kept apart: nothing is ever recovered by rounding back. Knows nothing of trainers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_flows.networks.parallel import sharded_like, whole


class AveragedWeights:
    """Average of the trainable parameters of a module, which can take their place for a while.

    The average begins with the first update; before it, it is the weights themselves. It lives in float32
    (float64 for float64 parameters) beside its parameter and costs one foreach call per update. DTensor
    parameters are averaged shard by shard.

    Attributes:
        params: the parameters, in order of appearance.
        average: their averages, None before the first update.
        raw: copies of the raw weights while the average stands in the module, else None.
    """

    def __init__(self) -> None:
        self.params: list[nn.Parameter] = []
        self.average: list[Tensor] | None = None
        self.raw: list[Tensor] | None = None
        self._same_dtype = True

    def bind(self, module: nn.Module) -> None:
        """List the trainable parameters; those met later start with their own value as average."""
        known = {id(p) for p in self.params}
        new = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
        self.params += new
        self._same_dtype = all(p.dtype == _average_dtype(p) for p in self.params)
        if self.average is not None:
            self.average += _float_copies(new)

    def restore(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Take the average from a state dict of the module."""
        self.average = _float_copies(self.params)
        for name, index in self.positions(module).items():
            if name in state:
                self.average[index].copy_(sharded_like(state[name], self.average[index]))

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Set the average to (1 - weight) average + weight parameters; the first update copies."""
        if self.average is None:
            self.average = _float_copies(self.params)
        elif self._same_dtype:
            torch._foreach_lerp_(self.average, self.params, weight)
        else:  # 16-bit parameters: promoted inside the addition, without a float32 copy of the model
            torch._foreach_mul_(self.average, 1.0 - weight)
            torch._foreach_add_(self.average, self.params, alpha=weight)

    def enter(self) -> bool:
        """Put the average into the module; False if it is there already or equals the weights."""
        if self.average is None or self.raw is not None:
            return False
        with torch.inference_mode(False), torch.no_grad():
            self.raw = [p.detach().clone() for p in self.params]
        _copy(self.params, self.average)
        return True

    def leave(self) -> None:
        """Put the raw weights back; nothing to do where they are in the module."""
        if self.raw is not None:
            _copy(self.params, self.raw)
            self.raw = None

    def to_cpu(self) -> None:
        """Move the average and the raw copy to the CPU; parts of a sharded module stay, as the module does."""
        self.average = None if self.average is None else [_on_cpu(a) for a in self.average]
        self.raw = None if self.raw is None else [_on_cpu(r) for r in self.raw]

    def stands_in(self) -> bool:
        """Whether the module holds exactly the average: its weights may have been replaced by others."""
        if self.average is None or self.raw is None:
            return False
        pairs = zip(self.params, self.average, strict=True)
        return all([torch.equal(_on_cpu(p.detach()), _on_cpu(a.to(p.dtype))) for p, a in pairs])  # asked on all ranks

    def positions(self, module: nn.Module) -> dict[str, int]:
        """Position of every averaged parameter by name; tied ones appear under each of their names."""
        index = {id(p): i for i, p in enumerate(self.params)}
        named = module.named_parameters(remove_duplicate=False)
        return {name: index[id(p)] for name, p in named if id(p) in index}

    def averaged_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy of the module's state dict with the average in place of its parameters; sharded ones as a whole."""
        return self._replaced(module, state, self.average)

    def raw_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy of the module's state dict with the raw weights."""
        return self._replaced(module, state, self.raw)

    def _replaced(
        self, module: nn.Module, state: Mapping[str, Tensor], values: list[Tensor] | None
    ) -> Mapping[str, Tensor]:
        result = copy.copy(state)  # keeps the `_metadata` that `load_state_dict` reads
        if values is not None:
            found = {name: whole(values[i]) for name, i in self.positions(module).items()}  # on all ranks, even if ...
            result.update({name: value for name, value in found.items() if name in state})  # ... one alone has a state
        return result


def _float_copies(params: list[nn.Parameter]) -> list[Tensor]:
    """Own copies in at least float32, outside inference mode so that they may change in place later."""
    with torch.inference_mode(False), torch.no_grad():
        return [p.detach().to(_average_dtype(p), copy=True) for p in params]


@torch.no_grad()
def _copy(params: list[nn.Parameter], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):  # DTensor has no foreach copy
        param.copy_(value)


def _on_cpu(value: Tensor) -> Tensor:
    return value if isinstance(value, DTensor) else value.cpu()


def _average_dtype(param: nn.Parameter) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)
