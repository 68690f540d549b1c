"""Reference numbers of Apple's autoregressive flows: cases that say, for each output, the call that made it.

A case is ``NAME.json`` with ``NAME.weights.safetensors`` and ``NAME.io.safetensors`` (``in/*``, ``out/*``). A test
exists for every output tensor. A call is answered by the operation that it names; what no operation covers, a call
with an argument that is not known, and an output that no call names are failures.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parity.parity_cases import FLOAT32, parameters


@dataclass(frozen=True)
class FlowCase:
    json_file: Path

    @property
    def name(self):
        return f"{self.json_file.parent.name}/{self.json_file.stem}"

    @cached_property
    def facts(self):
        return json.loads(self.json_file.read_text())

    @cached_property
    def tensors(self):
        return load_file(self.json_file.parent / self.facts["io_file"])

    @cached_property
    def weights(self):
        return load_file(self.json_file.parent / self.facts["weights_file"])

    def hyper_parameters(self, table):
        """By our names; one that the table does not know fails."""
        given = self.facts["hyper_parameters"]
        unknown = sorted(set(given) - set(table))
        assert not unknown, f"hyper-parameters {unknown} of {self.name} have no place in the table"
        return {table[name]: value for name, value in given.items()}

    def outputs(self):
        return sorted(name for name in self.tensors if name.startswith("out/"))

    def call_of(self, output):
        found = [call for call in self.facts["calls"] if output in call["outputs"]]
        assert found, f"no call of {self.name} names the output {output!r}"
        return found[0]

    def input(self, call, key):
        """A tensor that a call names, None for null."""
        name = call.get(key)
        return None if name is None else self.tensors[name]

    def compare(self, output, ours, kind):
        theirs = self.tensors[output]
        assert ours.shape == theirs.shape, f"{output}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        size = theirs.abs().max().item()
        bound = max(1e-4, FLOAT32) * size  # the bar, whatever weaker one the JSON suggests for this kind
        error = (ours.detach().double() - theirs.double()).abs().max().item()
        assert error <= bound, f"{self.name} {output} ({kind}): largest error {error:.3g}, allowed {bound:.3g}"


def pairs_of(family, skip=()):
    """``(case, output)`` of every output of every case of a family, as parameters of a test."""

    def found(folder):
        files = [file for file in sorted((folder / family).glob("*.json")) if file.name not in skip]
        cases = [FlowCase(file) for file in files]
        return [(f"{c.name}/{output}", (c, output)) for c in cases for output in c.outputs()]

    return parameters(family, ("case", "output"), found)


def answer(operations, known, case, output):
    """What the operation of the output's call says of it."""
    call = case.call_of(output)
    unknown = sorted(set(call) - known)
    assert not unknown, f"arguments {unknown} of the call for {output} of {case.name} are not known"
    start = next((start for start in operations if call["operation"].startswith(start)), None)
    assert start is not None, f"no rule covers the operation {call['operation']!r} of {case.name}"
    with torch.no_grad():
        return operations[start](case, call, output)


def tweedie_step(latent_log_prob, x, sigma):
    """``x + sigma^2 grad log p``, the gradient of each sample its own."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(latent_log_prob(leaf).sum(), leaf)
    return x + sigma**2 * score
