"""What a cell is: its arithmetic for one register of hidden units at one step, and a few counts.

A cell knows nothing of time, batch, threads or memory. Its module has three compiled functions:

    gates(s, h, carry) -> tape, carry
    output(tape, h, carry) -> h, tape
    backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry) -> d_tape, d_h_prev, d_carry_prev

s     what the products give, a tuple of `tape` registers: the first of them have received
      W_x x_t + b_x, those from `tail` on W_h h_{t-1} + b_h; where they overlap, the sum
h     the hidden state, before (argument) and after (result) the step
carry a tuple of the further states, for the LSTM (c,); in `output` it is that after the step
tape  a tuple of what backward needs; it returns there the gradients of s
`d_h_prev` is only what flows to h_{t-1} past the matrix W_h.

Forward has two halves since one tanh waits for another's result: all gates of a row are computed
before the first output, so that the processor has enough to do.

Two things a cell may have beside:

A *late* product, of an operand m that `gates` leaves in register `operand` of the tape: some rows
of W_h multiply m instead of h, between the halves of forward, and are added to register `into`.
There `backward` is that of what comes after that product; the gradient of register `into` goes back
through it to d_m, and a fourth function goes on from there:

    backward_operand(d_tape, h_prev, d_m) -> d_tape, what is added to d_h_prev

*Vectors*, of a number for each unit, trained (peepholes) or not (a bound): `gates`, `output` and
`backward` receive them as a last argument, a tuple v. The gradients of the trained ones, which come
first, are summed up step by step by

    backward_vectors(d_v, d_tape, h_prev, h, carry_prev, carry) -> d_v
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.extending import overload, register_model, unbox
from numba.core.pythonapi import NativeValue

from fastrnn.jit import intrinsic
from fastrnn.simd import Vec, address, read, write


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell as kernels see it.

    name     what kernels and caches know it by
    gates    products per unit: rows of the weights are `gates * H`
    tape     registers of s and of the tape per unit
    tail     where in s the part of the state begins
    carries  states beyond h
    order_x, order_h   which gate of the weights each register of the two parts is
    order_late   which gates have a late product; one at most
    operand, into      its registers
    vectors, trained   how many there are, and how many of them have gradients
    """

    name: str
    gates: int
    tape: int
    tail: int
    carries: int
    order_x: tuple[int, ...]
    order_h: tuple[int, ...]
    gates_of: Callable
    output: Callable
    backward: Callable
    order_late: tuple[int, ...] = ()
    operand: int = 0
    into: int = 0
    backward_operand: Callable | None = None
    vectors: int = 0
    trained: int = 0
    backward_vectors: Callable | None = None

    @functools.cached_property
    def _numba_type_(self) -> CellType:
        # Numba finds a type that is an attribute much faster than one that has to be asked for.
        return CellType(self)

    def __getstate__(self) -> dict[str, Any]:
        # The type holds the cell: a cached kernel that held both could not be loaded.
        return {key: value for key, value in vars(self).items() if key != "_numba_type_"}


class CellType(types.Type):
    """A cell as a Numba type: kernels choose its functions when they are compiled."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        super().__init__(name=f"Cell({cell.name})")


@register_model(CellType)
class _CellModel(models.OpaqueModel):
    pass


@unbox(CellType)
def _unbox_cell(kind: Any, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


def gates(cell, s, h, carry, v):
    """The cell's `gates`, chosen at compile time."""


def output(cell, tape, h, carry, v):
    """The cell's `output`, chosen at compile time."""


def backward(cell, tape, h_prev, h, carry_prev, carry, d_h, d_carry, v):
    """The cell's `backward`, chosen at compile time."""


def backward_operand(cell, tape, h_prev, d_m):
    """The cell's `backward_operand`; cells without a late product change nothing."""


def backward_vectors(cell, d_v, tape, h_prev, h, carry_prev, carry):
    """The cell's `backward_vectors`."""


@overload(gates)
def _gates(cell, s, h, carry, v):
    function = cell.cell.gates_of
    if cell.cell.vectors:
        return lambda cell, s, h, carry, v: function(s, h, carry, v)
    return lambda cell, s, h, carry, v: function(s, h, carry)


@overload(output)
def _output(cell, tape, h, carry, v):
    function = cell.cell.output
    if cell.cell.vectors:
        return lambda cell, tape, h, carry, v: function(tape, h, carry, v)
    return lambda cell, tape, h, carry, v: function(tape, h, carry)


@overload(backward)
def _backward(cell, tape, h_prev, h, carry_prev, carry, d_h, d_carry, v):
    function = cell.cell.backward
    if cell.cell.vectors:
        return lambda cell, tape, h_prev, h, carry_prev, carry, d_h, d_carry, v: function(
            tape, h_prev, h, carry_prev, carry, d_h, d_carry, v
        )
    return lambda cell, tape, h_prev, h, carry_prev, carry, d_h, d_carry, v: function(
        tape, h_prev, h, carry_prev, carry, d_h, d_carry
    )


@overload(backward_operand)
def _backward_operand(cell, tape, h_prev, d_m):
    function = cell.cell.backward_operand
    if function is None:
        return lambda cell, tape, h_prev, d_m: (tape, d_m)
    return lambda cell, tape, h_prev, d_m: function(tape, h_prev, d_m)


@overload(backward_vectors)
def _backward_vectors(cell, d_v, tape, h_prev, h, carry_prev, carry):
    function = cell.cell.backward_vectors
    return lambda cell, d_v, tape, h_prev, h, carry_prev, carry: function(
        d_v, tape, h_prev, h, carry_prev, carry
    )


def _count(count_of: Callable[[Cell], int]) -> Any:
    """A count of a cell, known when a kernel is compiled."""

    @intrinsic
    def count(typingctx, cell):
        number = count_of(cell.cell)

        def codegen(context, builder, sig, args):
            return context.get_constant(types.intp, number)

        return types.intp(cell), codegen

    return count


tape_of = _count(lambda cell: cell.tape)
tail_of = _count(lambda cell: cell.tail)
# Registers that receive products of x and of h.
of_x = _count(lambda cell: len(cell.order_x))
of_h = _count(lambda cell: len(cell.order_h))
# Registers that receive any.
sums_of = _count(lambda cell: max(cell.tail + len(cell.order_h), cell.into + len(cell.order_late)))
# 1 with a late product, else 0, and its registers.
late_of = _count(lambda cell: len(cell.order_late))
operand_of = _count(lambda cell: cell.operand)
into_of = _count(lambda cell: cell.into)


def _runs(count_of: str) -> Any:
    @intrinsic
    def load_runs(typingctx, cell, array, at, distance):
        vec = Vec(array.dtype)
        result = types.UniTuple(vec, getattr(cell.cell, count_of))
        i = types.intp

        def codegen(context, builder, sig, args):
            _, value, at, distance = args
            parts = []
            for run in range(result.count):
                offset = builder.add(at, builder.mul(distance, ir.Constant(at.type, run)))
                parts.append(read(builder, vec, address(context, builder, array, value, offset)))
            return context.make_tuple(builder, result, parts)

        return result(cell, array, i, i), codegen

    return load_runs


load_tape = _runs("tape")
load_carry = _runs("carries")
load_vectors = _runs("vectors")
load_trained = _runs("trained")


@intrinsic
def store_runs(typingctx, array, at, distance, values):
    """Store each register of a tuple, `distance` elements apart."""
    i = types.intp

    def codegen(context, builder, sig, args):
        value, at, distance, values = args
        for run in range(len(sig.args[3])):
            offset = builder.add(at, builder.mul(distance, ir.Constant(at.type, run)))
            pointer = address(context, builder, array, value, offset)
            write(builder, Vec(array.dtype), builder.extract_value(values, run), pointer)
        return context.get_dummy_value()

    return types.void(array, i, i, values), codegen
