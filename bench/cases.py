"""The named shapes that are timed, for each kind of work."""

from __future__ import annotations

import re
from typing import NamedTuple

# How many products of H rows a cell has.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
CELLS = tuple(GATES)


class Case(NamedTuple):
    """T steps, B sequences, I inputs, H hidden units; of a linear layer H outputs.

    Of a language model I is the size of the vocabulary; its embedding is as wide as a layer.
    """

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1

    def operations(self, cell: str, mode: str) -> int:
        """Floating-point operations of the products of one step; training does each three times."""
        rows = self.T * self.B
        if mode == "projection":
            return 3 * 2 * rows * self.I * self.H
        if mode in ("language", "sampling"):
            # An embedding and the weights after it are one product for each token there is.
            once = 2 * rows * self.H * self.I
            once += 2 * GATES[cell] * self.H**2 * (self.I + rows * (2 * self.layers - 1))
            return 3 * once if mode == "language" else once
        once = 2 * rows * GATES[cell] * self.H * (self.I + self.H)
        return 3 * once if mode == "training" else once


GRID = (
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
# What is timed, and which cases of it unless others are asked for.
MODES = {
    # forward, backward, d_x and every weight gradient of a layer
    "training": GRID,
    # forward of a layer, with weights that stay
    "inference": GRID,
    # T calls of one step each, the state carried
    "stepping": (Case("step", 1000, 1, 64, 64),),
    # one step of a language model: embedding, layers, softmax, clipping, Adam
    "language": (Case("char-rnn", 50, 50, 65, 128, 2), Case("wide", 64, 64, 65, 512)),
    # T characters drawn from a language model, one after the other
    "sampling": (Case("sample", 200, 1, 65, 512),),
    # forward and backward of a linear layer
    "projection": (
        Case("words", 35, 20, 650, 10_000),
        Case("many-words", 35, 20, 650, 50_000),
    ),
}
CASES = {case.name: case for cases in MODES.values() for case in cases}
QUICK = ("small",)
# One size at a time.
SWEEP = tuple(
    dict.fromkeys(
        [f"T64B32I{H}H{H}" for H in (32, 64, 128, 256, 512, 1024)]
        + [f"T64B{B}I128H128" for B in (1, 8, 32, 128, 512)]
        + [f"T{T}B32I128H128" for T in (16, 64, 256, 1024, 4096)]
    )
)


def cells_of(mode: str, cells: list[str]) -> list[str]:
    """Those of the cells that make a difference; a linear layer has none."""
    return cells[:1] if mode == "projection" else cells


def find(name: str) -> Case:
    """A named case, or any other: T64B32I128H128, T64B32I65H256L2 of a language model."""
    if name in CASES:
        return CASES[name]
    sizes = re.fullmatch(r"T(\d+)B(\d+)I(\d+)H(\d+)(?:L([1-9]))?", name)
    if sizes is None:
        raise ValueError(
            f"case: expected one of {', '.join(CASES)} or T64B32I64H64 "
            f"(with L2: a language model of two layers), got {name!r}"
        )
    return Case(name, *(int(size) for size in sizes.groups("1")))
