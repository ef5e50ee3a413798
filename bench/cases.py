"""The named shapes that are timed."""

from __future__ import annotations

import re
from typing import NamedTuple

# How many products of H rows a cell has.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
CELLS = tuple(GATES)


class Case(NamedTuple):
    """One layer over T steps, B sequences, I inputs, H hidden units."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def operations(self, cell: str, mode: str = "training") -> int:
        """Floating-point operations of the products of one step; training does each three times."""
        once = 2 * self.T * self.B * GATES[cell] * self.H * (self.I + self.H)
        return 3 * once if mode == "training" else once


CASES = {
    case.name: case
    for case in (
        Case("small", 64, 32, 64, 64),
        Case("stream", 100, 1, 64, 128),
        Case("char", 50, 50, 128, 128),
        Case("speech", 100, 32, 128, 128),
        Case("medium", 128, 64, 256, 256),
        Case("ptb", 35, 20, 650, 650),
        Case("large", 50, 64, 512, 512),
        Case("pixels", 784, 64, 1, 128),
        Case("huge", 50, 128, 1024, 1024),
    )
}
QUICK = ("small",)
# One size at a time.
SWEEP = tuple(
    dict.fromkeys(
        [f"T64B32I{H}H{H}" for H in (32, 64, 128, 256, 512, 1024)]
        + [f"T64B{B}I128H128" for B in (1, 8, 32, 128, 512)]
        + [f"T{T}B32I128H128" for T in (16, 64, 256, 1024, 4096)]
    )
)


def find(name: str) -> Case:
    """A named case, or any other: T64B32I128H128."""
    if name in CASES:
        return CASES[name]
    sizes = re.fullmatch(r"T(\d+)B(\d+)I(\d+)H(\d+)", name)
    if sizes is None:
        raise ValueError(f"case: expected one of {', '.join(CASES)} or T64B32I64H64, got {name!r}")
    return Case(name, *map(int, sizes.groups()))
