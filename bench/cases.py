"""The named shapes that are timed."""

from __future__ import annotations

from typing import NamedTuple

CELLS = ("rnn", "gru", "lstm")


class Case(NamedTuple):
    """One layer over T steps, B sequences, I inputs, H hidden units."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def operations(self, cell: str) -> int:
        """Floating-point operations of the products of one training step."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
        return 3 * 2 * self.T * self.B * gates * self.H * (self.I + self.H)


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
QUICK = ("small", "speech")
