"""Reference numbers of official implementations: discovery, hyper-parameters, tolerances, comparison.

A case is a ``NAME.json`` with ``NAME.io.safetensors`` (``input.*`` and what must be reproduced) and
weights of its own, in one or more shards, or those of another case. A test exists for every output tensor; a
family answers each by the first rule whose pattern fits the whole name, and what no rule fits is a failure.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

VARIABLE = "LIGHTNING_FLOWS_PARITY"
NUMBER = r"(-?[0-9.]+(?:e-?[0-9]+)?)"
FLOAT32 = 2e-6  # relative error that a faithful implementation reached
NO_CASES = "no-cases"


@dataclass(frozen=True)
class Case:
    """One case of a family."""

    json_file: Path

    @property
    def family(self):
        return self.json_file.parent.name

    @property
    def name(self):
        return self.json_file.stem

    @cached_property
    def facts(self):
        return json.loads(self.json_file.read_text())

    @cached_property
    def tensors(self):
        return load_file(self._io)

    @property
    def inputs(self):
        return {n.removeprefix("input."): v for n, v in self.tensors.items() if n.startswith("input.")}

    def outputs(self):
        """Names of what must be reproduced, without reading a value."""
        with safe_open(self._io, "pt") as file:
            return sorted(name for name in file.keys() if not name.startswith("input."))  # noqa: SIM118

    @property
    def _io(self):
        return self.json_file.parent / self.facts["files"]["io"]

    @cached_property
    def owner(self):
        """The case whose weights and hyper-parameters this one uses."""
        other = self.facts.get("uses_weights_of")
        return self if other is None else case_of(self.json_file.with_name(f"{other}.json"))

    @cached_property
    def weights(self):
        shards = [load_file(self.json_file.parent / name) for name in self.owner.facts["files"]["weights"]]
        joined = {name: tensor for shard in shards for name, tensor in shard.items()}
        assert len(joined) == sum(map(len, shards)), "a tensor lies in two shards"
        return joined

    def hyper_parameters(self, table):
        """Hyper-parameters by our names; a name that the family's table does not know fails."""
        given = self.owner.facts["hyper_parameters"]
        unknown = sorted(set(given) - set(table))
        assert not unknown, f"hyper-parameters {unknown} of {self.family}/{self.owner.name} have no place in the table"
        return {table[name]: value for name, value in given.items()}

    def number(self, pattern, default, key=None):
        """A number that only the text of ``calls`` tells; ``{}`` in the pattern stands for it."""
        calls = self.facts.get("calls", {})
        text = " ; ".join(calls.values()) if key is None else calls.get(key, "")
        found = re.search(pattern.replace("{}", NUMBER), text)
        return default if found is None else float(found[1])

    def compare(self, output, ours, kind):
        """Compare with the tolerance that the JSON gives to outputs of this kind, else relative 1e-4."""
        theirs = self.tensors[output]
        assert ours.shape == theirs.shape, f"{output}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        suggested = self.facts.get("suggested_tolerance", {})
        names = (f"{kind}_max_abs", f"{kind}_sample_max_abs", f"{kind}_abs", "max_abs")
        size = theirs.abs().max().item()
        bound = next((suggested[name] for name in names if name in suggested), suggested.get("relative", 1e-4) * size)
        bound = max(bound, FLOAT32 * size)  # samples of size 1e4 cannot be held to an absolute 2e-4
        error = (ours.detach().double() - theirs.double()).abs().max().item()
        assert error <= bound, f"{output}: largest error {error:.3g}, allowed {bound:.3g}"


def check_sizes(network, expected, derived):
    """The network that the converter made has every hyper-parameter that the JSON tells."""
    known = {**network.config["init_args"], **derived, "input_size": list(network.shape[1:])}
    wanted = dict(expected)
    side = wanted["input_size"]
    wanted["input_size"] = [side, side] if isinstance(side, int) else side
    if "mlp_ratio" in wanted:  # the files tell the width, from which the ratio comes back up to rounding
        known["mlp_ratio"] = network.blocks[0].mlp.fc1.out_features
        wanted["mlp_ratio"] = int(wanted["hidden_size"] * wanted["mlp_ratio"])
    assert {name: known[name] for name in wanted} == wanted


INSIDE = r"intermediate\.(?P<name>time_sinusoid|time_embedding|conditioning|tokens_\d+|final_tokens)"


def inside(network, x, t, condition):
    """What a DiT computes on its way, by the names of the JSON files (`INSIDE`)."""
    seen = {"time_sinusoid": network.t_embedder.sinusoid(t), "time_embedding": network.t_embedder(t)}
    seen["conditioning"] = network.embed_condition(t, condition, len(x))
    network.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(tokens_0=given[0]))
    for i, block in enumerate(network.blocks, start=1):
        block.register_forward_hook(lambda _, given, out, i=i: seen.update({f"tokens_{i}": out}))
    network.final_layer.register_forward_hook(lambda _, given, out: seen.update(final_tokens=out))
    network(x, t, condition)
    return seen


_CASES: dict[Path, Case] = {}


def case_of(json_file):
    """The one object of a case, so that its files are read once."""
    return _CASES.setdefault(json_file, Case(json_file))


def parameters(what, names, found):
    """Parametrizes a test with reference numbers; without their folder it is skipped, without a case it is no test.

    Args:
        what: id of the skipped test.
        names: of the test's parameters.
        found: called with the folder; pairs of an id and the values of ``names``.
    """
    folder, empty = os.environ.get(VARIABLE), [None] * len(names)
    if folder is None:
        missing = pytest.mark.skip(reason=f"{VARIABLE} does not name the folder of reference numbers")
        return pytest.mark.parametrize(names, [pytest.param(*empty, marks=missing, id=what)])
    values = [pytest.param(*value, id=name) for name, value in found(Path(folder))]
    return pytest.mark.parametrize(names, values or [pytest.param(*empty, id=NO_CASES)])


def every_output(family):
    """Parametrizes a test with ``(case, output)`` for every output of every case of a family."""

    def found(folder):
        cases = [case_of(file) for file in sorted((folder / family).glob("*.json"))]
        return [(f"{family}/{c.name}/{output}", (c, output)) for c in cases for output in c.outputs()]

    return parameters(family, ("case", "output"), found)


def every_case(family):
    """Parametrizes a test with every case of a family that has weights of its own."""

    def found(folder):
        cases = [case_of(file) for file in sorted((folder / family).glob("*.json"))]
        return [(f"{family}/{c.name}", (c,)) for c in cases if c.owner is c]

    return parameters(family, ("case",), found)


def answer(rules, case, output):
    """What the first fitting rule says: (our tensor, kind of tolerance)."""
    for pattern, rule in rules.items():
        found = re.fullmatch(pattern, output)
        if found is not None:
            with torch.no_grad():
                return rule(case, **found.groupdict())
    raise AssertionError(f"no rule covers the output {output!r} of {case.family}/{case.name}")
