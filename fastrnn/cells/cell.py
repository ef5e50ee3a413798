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

Four things a cell may have beside:

A *late* product, of an operand m that `gates` leaves in register `operand` of the tape: some rows
of W_h multiply m instead of h, between the halves of forward, and are added to register `into`.
(With recurrent dropout m is multiplied by its mask there.)
There `backward` is that of what comes after that product; the gradient of register `into` goes back
through it to d_m, and a fourth function goes on from there:

    backward_operand(d_tape, h_prev, d_m) -> d_tape, what is added to d_h_prev

*Vectors*, of a number for each unit, trained (peepholes) or not (a bound): `gates`, `output` and
`backward` receive them as a last argument, a tuple v. The gradients of the trained ones, which come
first, are summed up step by step by

    backward_vectors(d_v, d_tape, h_prev, h, carry_prev, carry) -> d_v

*Normalisation* (Ba et al. 2016, arXiv:1607.06450): the G products of x, the first registers, and
those of h, the next, are normalised, each row of G*H numbers together; gains and biases are
vectors, first the G gains of x, then those of h. Registers 2 G to 3 G - 1 of what backward returns
are the gradients of what gains and biases make of the products of x, and, if there is one, register
3 G that of the last product of h instead. With `normed_carry` the first carry is normalised between
the halves into the last register but one, gradients of it go back by

    backward_normed(tape, d_h, v) -> tape, gradient of that register

which is called before `backward` and leaves in the last register what it needs itself.

A *projection*: the result of `output` stands in the last register of the tape, too, and goes
through a matrix of its own, whose result is h. Such a cell does not look at h: it reads zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.core.extending import register_model, unbox
from numba.core.pythonapi import NativeValue

from fastrnn.cells.fingerprint import fingerprint
from fastrnn.jit import intrinsic, overload
from fastrnn.simd import Vec, address, read, write


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell as kernels see it.

    name     what it is called
    gates    products per unit: rows of the weights are `gates * H`
    tape     registers of s and of the tape per unit
    tail     where in s the part of the state begins
    carries  states beyond h
    order_x, order_h   which gate of the weights each register of the two parts is
    order_late   which gates have a late product; one at most
    operand, into      its registers
    vectors, trained   how many there are, and how many of them have gradients
    projected          whether there is a projection
    normed, normed_carry   what is normalised
    gate_names         of the registers of the tape that are worth a look, "" for others
    carry_names        of the further states
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
    projected: bool = False
    normed: bool = False
    normed_carry: bool = False
    backward_normed: Callable | None = None
    gate_names: tuple[str, ...] = ()
    carry_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        registers = {
            "tail": self.tail + len(self.order_h),
            "order_x": len(self.order_x),
            "into": self.into + len(self.order_late),
            "operand": self.operand + len(self.order_late),
        }
        for name in ("gates", "tape", "tail", "carries", "operand", "into", "vectors"):
            least = 1 if name in ("gates", "tape") else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, end in registers.items():
            if end > self.tape:
                raise ValueError(
                    f"{name}: expected registers below tape = {self.tape}, got {end - 1}"
                )
        for name, order in (
            ("order_x", self.order_x),
            ("order_h and order_late", (*self.order_h, *self.order_late)),
        ):
            if sorted(order) != list(range(self.gates)):
                raise ValueError(
                    f"{name}: expected each gate from 0 to {self.gates - 1} once, got {order}"
                )
        ways = {
            "order_late": len(self.order_late) > 0,
            "projected": self.projected,
            "normed": self.normed,
        }
        chosen = [name for name, there in ways.items() if there]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]}: expected one of {', '.join(ways)}, got {chosen}")
        if self.normed and (self.tail, len(self.order_x)) != (self.gates, self.gates):
            raise ValueError(f"tail: expected gates = {self.gates} beside normed, got {self.tail}")
        if self.normed_carry and not (self.normed and self.carries and self.backward_normed):
            raise ValueError("normed_carry: expected normed, a carry and backward_normed beside it")
        if len(self.order_late) > 1 or (self.order_late and self.backward_operand is None):
            raise ValueError(
                "order_late: expected one gate at most, with backward_operand beside it, "
                f"got {self.order_late}"
            )
        if not 0 <= self.trained <= self.vectors:
            raise ValueError(f"trained: expected 0 to vectors = {self.vectors}, got {self.trained}")
        if self.trained and self.backward_vectors is None:
            raise ValueError("backward_vectors: expected a function, since vectors are trained")
        for name, count in (("gate_names", self.tape), ("carry_names", self.carries)):
            if getattr(self, name) and len(getattr(self, name)) != count:
                raise ValueError(f"{name}: expected {count} names, got {getattr(self, name)}")
        named = [name for name in ("h", *self.gate_names, *self.carry_names) if name]
        if len(set(named)) < len(named):
            raise ValueError(
                f"gate_names: expected names that differ, also from h and carry_names, got {named}"
            )
        if not self.carry_names:
            names = ("c",) if self.carries == 1 else tuple(f"c{i}" for i in range(self.carries))
            object.__setattr__(self, "carry_names", names)

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
        functions = cell.gates_of, cell.output, cell.backward
        more = cell.backward_operand, cell.backward_vectors, cell.backward_normed
        own = fingerprint((*functions, *more))
        counts = cell.gates, cell.tape, cell.tail, cell.carries, cell.order_x, cell.order_h
        late = cell.order_late, cell.operand, cell.into
        ways = cell.vectors, cell.trained, cell.projected, cell.normed, cell.normed_carry
        self.fingerprint = own
        super().__init__(name=f"Cell({cell.name} {own} {counts, late, ways})")


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


def backward_normed(cell, tape, d_h, v):
    """The cell's `backward_normed`; other cells have none."""


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


@overload(backward_normed)
def _backward_normed(cell, tape, d_h, v):
    function = cell.cell.backward_normed
    if function is None:
        return lambda cell, tape, d_h, v: (tape, d_h)
    return lambda cell, tape, d_h, v: function(tape, d_h, v)


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
# 1 with a projection, else 0.
projected_of = _count(lambda cell: int(cell.projected))
# 1 with normalisation, else 0; 1 if the last product of h has a gradient of its own.
normed_of = _count(lambda cell: int(cell.normed))
normed_carry_of = _count(lambda cell: int(cell.normed_carry))
apart_of = _count(lambda cell: int(cell.tape - 2 * cell.normed_carry > 3 * cell.gates))


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


def _store(count_of: str, what: str) -> Any:
    @intrinsic
    def store_runs(typingctx, cell, array, at, distance, values):
        """Store each register of a tuple, `distance` elements apart."""
        wanted, i = getattr(cell.cell, count_of), types.intp
        if len(values) != wanted:
            raise TypingError(
                f"{cell.cell.name}: expected {wanted} registers as the {what} that its functions "
                f"return, got {len(values)}"
            )

        def codegen(context, builder, sig, args):
            _, value, at, distance, values = args
            for run in range(wanted):
                offset = builder.add(at, builder.mul(distance, ir.Constant(at.type, run)))
                pointer = address(context, builder, array, value, offset)
                write(builder, Vec(array.dtype), builder.extract_value(values, run), pointer)
            return context.get_dummy_value()

        return types.void(cell, array, i, i, values), codegen

    return store_runs


store_tape = _store("tape", "tape")
store_carry = _store("carries", "carry")
store_trained = _store("trained", "gradients of vectors")
