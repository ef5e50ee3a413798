"""What a training step will take: its large arrays, made and given up in the order of the step.

Memory that is given up stays with the process for the next array that it does for (see
`fastrnn.memory`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fastrnn.cells import Cell
from fastrnn.gemm import scratch_size
from fastrnn.memory import SMALLEST, fitting
from fastrnn.simd import padded
from fastrnn.single import scratch_rows

# Numbers of 8 bytes that a row of a layout has, about.
_INDICES = 6


class Work(NamedTuple):
    """A stack of layers and how much it is given.

    width   of h
    widths  of the input of each layer
    dropout whether there is dropout of x, and between layers
    masked  whether products see something else than h
    thinned whether some of weight_hh are dropped
    tokens  whether x are tokens
    params  numbers in all parameters
    places  steps times sequences, of the caller's arrays
    pieces  (rows, columns) of each layout
    every   steps of a piece at most
    plain   whether these rows are the caller's
    anew    whether a sequence may begin anew with a piece, which then has memory of its own
    flow    whether backward returns it
    """

    cell: Cell
    size: int
    width: int
    widths: list[int]
    output: int
    sides: int
    dropout: tuple[bool, bool]
    masked: bool
    thinned: bool
    tokens: bool
    params: int
    dtype: np.dtype
    batch: int
    places: int
    pieces: list[tuple[int, int]]
    every: int
    plain: bool
    anew: bool
    flow: bool


class _Memory:
    """Numbers in use and idle."""

    def __init__(self, itemsize: int) -> None:
        self.smallest = SMALLEST // itemsize
        self.used = self.most = 0
        self.idle: dict[int, int] = {}

    def take(self, *counts: int) -> list[int]:
        """Arrays of so many numbers; returns them to be given back."""
        taken = []
        for count in counts:
            fit = None
            if count >= self.smallest:
                fit = count if count in self.idle else fitting(self.idle, count)
            if fit is None:
                fit = count
                self.used += count
            else:
                self.idle[fit] -= 1
                if not self.idle[fit]:
                    del self.idle[fit]
            taken.append(fit)
        self.most = max(self.most, self.used)
        return taken

    def give(self, counts: list[int]) -> None:
        """Give them up."""
        for count in counts:
            if count < self.smallest:
                self.used -= count
            else:
                self.idle[count] = self.idle.get(count, 0) + 1

    def make(self, *counts: int) -> list[int]:
        """Arrays of NumPy's own."""
        self.used += sum(counts)
        self.most = max(self.most, self.used)
        return list(counts)

    def free(self, counts: list[int]) -> None:
        """The opposite."""
        self.used -= sum(counts)


class _Step:
    """A training step."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads
        self.cell, self.sides = work.cell, work.sides
        self.hidden = padded(work.size, work.dtype)
        self.row = self.cell.tape * self.hidden
        self.memory = _Memory(np.dtype(work.dtype).itemsize)
        self.count = sum(rows for rows, _ in work.pieces)
        self.pieces = work.pieces
        self.whole = len(self.pieces) == 1

    def packed(self, width: int) -> list[int]:
        """Weights for forward."""
        cell, out = self.cell, self.work.width
        numbers = self.hidden * (cell.gates * (width + out) + cell.tape + cell.vectors)
        if cell.projected:
            numbers += (self.work.size + 1) * padded(out, self.work.dtype)
        return [numbers] * self.sides

    @property
    def thinned(self) -> list[int]:
        """Of weight_hh what is left of it."""
        work = self.work
        return [self.cell.gates * work.size * work.width] * (self.sides * work.thinned)

    def states(self, rows: int, columns: int) -> int:
        return (rows + columns) * self.work.width

    def rows(self, width: int) -> list[int]:
        """Of all pieces, one array where they follow one another."""
        if self.work.plain:
            return [self.count * width]
        return [rows * width for rows, _ in self.pieces]

    def run(self, rows: int, columns: int) -> list[int]:
        """Carry, tape and what products see of both sides."""
        carry = (rows + columns) * self.cell.carries * self.hidden
        masked = self.states(rows, columns) * self.work.masked
        return [n for n in (carry, rows * self.row, masked) if n] * self.sides

    def forward(self, width: int, last: bool) -> tuple[list[int], list[int], list[int]]:
        """A layer: (what it holds until its backward, until the first turn of it, its output).

        last  whether it is the last layer
        """
        memory, work, sides = self.memory, self.work, self.sides
        output: list[int] = []
        if sides == 1 and work.plain and not work.anew:
            output = memory.take(self.states(self.count, work.batch))
        elif sides == 1:
            output = memory.take(*[self.states(*piece) for piece in self.pieces])
        thinned = memory.take(*self.thinned)
        packed = memory.take(*self.packed(width))
        held: list[int] = []
        kept: list[int] = []
        own: list[int] = []
        turns = self.pieces[:-1] if last else self.pieces
        most = work.every * max(columns for _, columns in self.pieces)
        for rows, columns, alike in _runs([] if self.whole else turns):
            state = work.width + self.cell.carries * work.size
            held += memory.take(*[work.batch * state * sides] * alike)
            if sides > 1:
                own += memory.take(*[self.states(rows, columns)] * (sides * alike))
            turned = memory.take(rows * width) if sides > 1 else []
            carry = columns * self.cell.carries * self.hidden
            chunk = scratch_rows(self.row, columns, most, work.dtype, self.threads) * self.row
            memory.give(memory.take(*[n for n in (carry, chunk) if n] * sides) + turned)
        if self.whole or last:
            rows, columns = self.pieces[-1]
            kept = memory.take(rows * width) if sides > 1 else []
            kept += memory.take(*[self.states(rows, columns)] * sides) if sides > 1 else []
            kept += memory.take(*self.run(rows, columns))
        if self.whole:
            held, kept = kept, []
        memory.give(packed + thinned)
        if sides > 1:
            output = memory.take(*self.rows(work.output))
        memory.give(own)
        return held, kept, output

    def backward(self, width: int, tokens: bool, kept: list[int]) -> list[int]:
        """A layer: its d_x; kept: what is given up after the first turn."""
        memory, work, sides = self.memory, self.work, self.sides
        if tokens:
            # No d_x, but sums of gradients by token.
            d_x = memory.take(*[self.cell.gates * self.hidden * width] * sides)
        else:
            d_x = memory.take(*self.rows(width))
        packed = [] if self.whole else memory.take(*self.packed(width))
        # Beside the weights their gradients, summed up apart and then once more.
        packed += memory.take(*self.thinned * 3)
        turns = self.pieces[:-1] if kept else self.pieces
        runs = [(*self.pieces[-1], 1)] if kept else []
        for rows, columns, _ in itertools.chain(runs, _runs(turns[::-1])):
            again, turned = [], []
            if kept:
                again, kept = kept, []
            elif not self.whole:
                again = memory.take(*self.run(rows, columns), *[self.states(rows, columns)] * sides)
                turned = memory.take(rows * width) if sides > 1 else []
            turned += memory.take(rows * work.width, rows * work.width) if sides > 1 else []
            apart = self.cell.projected + work.flow
            projected = memory.take(*[rows * work.width] * (sides * apart))
            for order in (self.cell.order_h, self.cell.order_late):
                back = len(order) * self.hidden * padded(work.width, work.dtype)
                memory.give(memory.take(*[back] * (sides if back else 0)))
            # Each side keeps its own until the end.
            back = self.cell.gates * self.hidden * padded(width, work.dtype)
            last = memory.take(*[0 if tokens else back] * sides)
            state = (work.width + self.cell.carries * self.hidden) * columns * sides
            scratch = self.threads * scratch_size(width, work.width, work.dtype)
            if sides > 1 and not tokens:
                last += memory.take(rows * width)
            memory.free(memory.make(scratch + state))
            memory.give(again + last + projected + turned)
        memory.give(packed)
        return d_x


def _runs(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, how many) of those that follow one another and are alike.

    The next one of a kind takes what the last one gave: two turns tell of all, so at most two runs.
    """
    for (rows, columns), group in itertools.groupby(pieces):
        alike = sum(1 for _ in group)
        if alike > 1:
            yield rows, columns, alike - 1
        yield rows, columns, 1


def step_numbers(work: Work, threads: int) -> int:
    """Numbers that forward and backward take at most, beside x, d_output and the parameters."""
    step = _Step(work, threads)
    memory, itemsize = step.memory, np.dtype(work.dtype).itemsize
    layers: list[tuple[list[int], list[int]]] = []
    below: list[int] = []
    # Which rows are whose.
    memory.make(_INDICES * step.sides * step.count * 8 // itemsize)
    if not work.plain and not work.tokens:
        below = memory.take(*step.rows(work.widths[0]))
    for layer, width in enumerate(work.widths):
        if work.dropout[layer > 0]:
            dropped = memory.take(*step.rows(width))
            # A whole layer holds its h, another only what the next one reads.
            if layer and step.whole and step.sides == 1:
                layers[-1][0].extend(below)
            else:
                memory.give(below)
            below = dropped
        held, kept, output = step.forward(width, layer == len(work.widths) - 1)
        layers.append((held + below, kept))
        below = output
    # What comes out of the last layer is held, too.
    if not work.plain or (work.anew and step.sides == 1):
        memory.take(work.places * work.output)
    memory.take(work.params)
    if work.flow:
        memory.make(len(work.widths) * step.sides * work.places * 8 // itemsize)
    above: list[int] = []
    for width in reversed(work.widths):
        held, kept = layers.pop()
        d_x = step.backward(width, work.tokens and not layers, kept)
        memory.give(above + held)
        above = d_x
    if not work.plain and not work.tokens:
        memory.take(work.places * work.widths[0])
    return memory.most


def piece_within(
    budget_mb: float, steps: int, batch: int, bytes_of: Callable[[int], int]
) -> int | None:
    """Steps of pieces, halves of halves of all, whose training stays within a budget; None: all.

    bytes_of  what it takes with pieces of so many steps
    """
    every, least = steps, None
    while True:
        found = bytes_of(every)
        if found <= budget_mb * 1e6:
            return None if every == steps else every
        least = found if least is None else min(least, found)
        # Shorter pieces take more and more states in between.
        if every == 1 or found > 2 * least:
            raise ValueError(
                f"budget_mb: expected at least {math.ceil(least / 1e5) / 10} for {steps} steps of "
                f"{batch} sequences, got {budget_mb:g}; take fewer sequences or shorter ones"
            )
        every = -(-every // 2)
