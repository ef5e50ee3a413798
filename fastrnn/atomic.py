"""Numbers that threads read and write at the same time, and what to do between two looks at one.

They are 64-bit integers of an array, or behind a pointer, by their index.
"""

from __future__ import annotations

import os

from llvmlite import ir
from numba import types
from numba.core import cgutils

from fastrnn.jit import intrinsic
from fastrnn.simd import address, machine

# Looks before the processor is offered to others between two, some tens of microseconds.
_EAGER = 1000
# What offers the processor to others.
_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


@intrinsic
def look(typingctx, place, index):
    """The number; what was written before it was said is there."""

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(place, types.intp), codegen


@intrinsic
def say(typingctx, place, index, number):
    """Write the number, after all that was written before."""

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args[:2])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(place, types.intp, types.int64), codegen


@intrinsic
def swap(typingctx, place, index, old, new):
    """Put `new` where `old` is; whether it was."""

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args[:2])
        done = builder.cmpxchg(pointer, *args[2:], "seq_cst", "seq_cst")
        return builder.extract_value(done, 1)

    return types.boolean(place, types.intp, types.int64, types.int64), codegen


@intrinsic
def rest(typingctx, looks):
    """Between two looks: a moment, or, after many looks, others' turn."""

    def codegen(context, builder, sig, args):
        eager = builder.icmp_signed("<", args[0], ir.Constant(args[0].type, _EAGER))
        with builder.if_else(eager) as (soon, later):
            with soon:
                _pause(builder)
            with later:
                kind = ir.FunctionType(ir.IntType(32), [])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _pause(builder: ir.IRBuilder) -> None:
    """Some tens of cycles that leave the core to the other thread on it."""
    if machine().x86:
        kind = ir.FunctionType(ir.VoidType(), [])
        name = "llvm.x86.sse2.pause"
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])


@intrinsic
def moment(typingctx):
    """Some tens of cycles, to be spent between two looks."""

    def codegen(context, builder, sig, args):
        _pause(builder)
        return context.get_dummy_value()

    return types.void(), codegen
