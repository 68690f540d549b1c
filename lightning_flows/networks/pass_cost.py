"""What passes over some tokens of a flow block cost: the overhead of a pass, and its arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_flows.networks.block_run import BlockRun

# operations in the overhead of a pass, and of each layer; on a CPU, of each thread: about 40 and 80 microseconds
OVERHEAD = {"cpu": (4e6, 8e6), "cuda": (2e10, 2e10)}


class Cost(NamedTuple):
    """What passes over a block cost, in operations.

    Attributes:
        fixed: of a pass, whatever it computes: its overhead times operations in that time.
        work: of one token of all rows.
    """

    fixed: float
    work: float

    @classmethod
    def of(cls, run: BlockRun) -> Cost:
        """That of a run."""
        rows = len(run.inputs) * (2 if run.guidance else 1)
        layers = run.block.attn_blocks
        once, each = OVERHEAD.get(run.inputs.device.type, OVERHEAD["cuda"])
        threads = torch.get_num_threads() if run.inputs.device.type == "cpu" else 1
        work = 2 * rows * sum(parameter.numel() for parameter in layers.parameters())
        return cls(threads * (once + len(layers) * each), work)

    def passes(self, count: float, tokens: int) -> float:
        """Of that many passes over ``tokens``."""
        return count * (self.fixed + tokens * self.work)

    def worth(self, tokens: int) -> int:
        """Most passes over ``tokens`` that cost no more than one pass over each, at least one."""
        return max(1, int(self.passes(tokens, 1) / self.passes(1, tokens)))

    def cheap(self) -> int:
        """Tokens whose work is hidden by the overhead of a pass.

        If a segment of so many does not settle while it pays, it has cost at most 1.3 times what they cost one by one.
        """
        return int(0.7 * self.fixed / self.work)
