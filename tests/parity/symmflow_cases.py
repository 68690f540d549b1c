"""Reference numbers of SymmFlow: files that describe several cases each, and `NAME.safetensors` for each case.

A test exists for every output tensor of every case of every JSON file in the folder. What no rule covers, a key that is
not known, and tensors that no JSON file describes are failures.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from tests.parity.parity_cases import parameters

FAMILY = "symmflow"
FILE_KEYS = {"about", "source", "environment", "conventions", "tolerance", "prefixes", "traps"}
FILE_TABLES = {"lr_schedule", "mask_colour_decoding"}  # lists of numbers, each with a test of its own
CASE_KEYS = {
    *("case", "kind", "constructor", "image_channels", "semantic_channels", "beta", "n_classes", "sigma_min"),
    *("parameters", "seed", "stats", "solver_calls", "bytes"),
}


@dataclass(frozen=True)
class SymmCase:
    """One case."""

    folder: Path
    entry: str  # JSON, so that a case can be hashed

    @cached_property
    def facts(self):
        return json.loads(self.entry)

    @property
    def name(self):
        return self.facts["case"]

    @cached_property
    def tensors(self):
        return load_file(self._file)

    @property
    def weights(self):
        return {n.removeprefix("state_dict/"): v for n, v in self.tensors.items() if n.startswith("state_dict/")}

    def input(self, name):
        return self.tensors[f"in/{name}"]

    def outputs(self):
        """Names of what must be reproduced, without reading a value."""
        with safe_open(self._file, "pt") as file:
            return sorted(name for name in file.keys() if name.startswith("out/"))  # noqa: SIM118

    @property
    def _file(self):
        return self.folder / f"{self.name}.safetensors"

    def hyper_parameters(self, table):
        """Arguments of the official constructor by our names; one that the table does not know fails."""
        unknown = sorted(set(self.facts) - CASE_KEYS)
        assert not unknown, f"keys {unknown} of the case {self.name} are not known"
        given = self.facts["constructor"]["kwargs"]
        unknown = sorted(set(given) - set(table))
        assert not unknown, f"hyper-parameters {unknown} of {self.name} have no place in the table"
        assert self.facts["constructor"]["cls"] == "UNetModel"
        return {table[name]: value for name, value in given.items()}

    def compare(self, output, ours):
        """Every number within 1e-4 of the largest one of its tensor, whatever the JSON would allow."""
        theirs = self.tensors[output]
        assert ours.shape == theirs.shape, f"{output}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        bound = 1e-4 * theirs.abs().max().item()
        error = (ours.detach().double() - theirs.double()).abs().max().item()
        assert error <= bound, f"{self.name} {output}: largest error {error:.3g}, allowed {bound:.3g}"


_CASES = {}


def cases_of(folder):
    """The cases of all JSON files of a folder."""
    entries = [entry for file in files_of(folder) for entry in json.loads(file.read_text())["cases"]]
    return [_CASES.setdefault((folder, e), SymmCase(folder, e)) for e in map(json.dumps, entries)]


def files_of(folder):
    return sorted(folder.glob("*.json"))


def every_output():
    return _each(
        ("case", "output"),
        lambda folder: [(f"{c.name}/{out}", (c, out)) for c in cases_of(folder) for out in c.outputs()],
    )


def every_case():
    return _each(("case",), lambda folder: [(case.name, (case,)) for case in cases_of(folder)])


def every_file():
    return _each(("file",), lambda folder: [(file.stem, (file,)) for file in files_of(folder)])


def every_table(name):
    """Parametrizes a test with every table of this name."""
    return _each(
        ("table",),
        lambda folder: [(f"{file.stem}/{name}", (content[name],))
                        for file in files_of(folder) if name in (content := json.loads(file.read_text()))],
    )  # fmt: skip


def _each(names, values):
    """`parameters` of this family: ``values`` is called with its folder."""
    return parameters(
        FAMILY, names, lambda folder: [(f"{FAMILY}/{name}", value) for name, value in values(folder / FAMILY)]
    )
