"""How the parts of a kernel get to threads that wait for them in compiled code.

To wake a thread takes as long as a small layer, tens of microseconds, on virtual machines a
hundred. So a thread that has done its part stays awake for a moment, without the GIL, and looks
for the next; a training step finds it there. Who calls a kernel gives it a *team* in place of its
part, and `divided`, its first line, posts the parts:

slot  of a thread, (SLOT,) int64: its STATE, whether it is AWAKE and whether it has been called,
      whether it is to LEAVE, and its part
team  of a call, int64: how many slots, what to set to 1 if a part fails, the status and the error
      of the first that failed, slots

The caller does the first part and those that nobody has begun, and waits for the others.
"""

from __future__ import annotations

import os

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import RETCODE_NONE, RETCODE_OK

from fastrnn.atomic import look, moment, rest, say, swap
from fastrnn.jit import helper, intrinsic, kernel
from fastrnn.memory import address_of

# Lines of the cache come in pairs.
SLOT = 16
STATE, AWAKE, LEAVE, _WORK, _DATA, _PART, _PARTS = range(7)
_FREE, _POSTED, _TAKEN, _DONE = range(4)
# Of AWAKE: who is called does not go to sleep before it has had its part.
_SLEEPS, _LOOKS, _CALLED = range(3)
_COUNT, _DISMISS, _FAILED, _ERROR, _SLOTS = range(5)
# Looks of a thread before it goes to sleep: on x86, where a pause takes 10 to 50 nanoseconds, up to
# a millisecond, longer than what Python does between two kernels of a step.
_LINGER = 20000


def new_slot() -> np.ndarray:
    """A slot in cache lines of its own."""
    raw = np.zeros(2 * SLOT, np.int64)
    skip = -address_of(raw) % (SLOT * raw.itemsize) // raw.itemsize
    return raw[skip : skip + SLOT]


def new_team(slots: list[np.ndarray], dismiss: np.ndarray | None) -> np.ndarray:
    """A team of threads; dismiss: whose first number is set to 1 if one fails.

    Who calls a kernel with it must hold on to both.
    """
    told = 0 if dismiss is None else address_of(dismiss)
    return np.array([len(slots), told, 0, 0, *map(address_of, slots)], np.int64)


def divides(function: object) -> bool:
    """Whether a kernel takes a team, `-address_of(team)`, for a part."""
    code = getattr(getattr(function, "py_func", None), "__code__", None)
    return code is not None and divided.__name__ in code.co_names


@intrinsic
def _at(typingctx, address):
    """Numbers from where they are in memory."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(types.int64)(types.intp), codegen


_PART_OF = ir.FunctionType(
    ir.VoidType(), [ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(64)]
)


@intrinsic
def _call(typingctx, work, data, part, parts):
    """A part, by the addresses of what `divided` has made."""

    def codegen(context, builder, sig, args):
        function = builder.inttoptr(args[0], _PART_OF.as_pointer())
        data = builder.inttoptr(args[1], _PART_OF.args[0])
        builder.call(function, [data, *args[2:]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i), codegen


@intrinsic
def _here(typingctx):
    """See `processor`."""
    kind = ir.FunctionType(ir.IntType(32), [])

    def codegen(context, builder, sig, args):
        if not hasattr(os, "sched_setaffinity"):
            return ir.Constant(kind.return_type, -1)
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "sched_getcpu"), []
        )

    return types.int32(), codegen


@kernel
def processor():
    """The processor that the caller runs on; -1 where threads cannot be kept off one."""
    return _here()


@kernel
def call(slot):
    """Have a thread that is awake wait for its part; whether it is."""
    return swap(slot, AWAKE, _LOOKS, _CALLED) or look(slot, AWAKE) == _CALLED


@kernel
def serve(slot):
    """Do the parts that are posted, until there has been none for a moment."""
    swap(slot, AWAKE, _SLEEPS, _LOOKS)
    looks = 0
    while True:
        if look(slot, STATE) == _POSTED:
            if swap(slot, STATE, _POSTED, _TAKEN):
                swap(slot, AWAKE, _CALLED, _LOOKS)
                _call(look(slot, _WORK), look(slot, _DATA), look(slot, _PART), look(slot, _PARTS))
                say(slot, STATE, _DONE)
            looks = 0
        elif looks == _LINGER or look(slot, LEAVE) != 0:
            if swap(slot, AWAKE, _LOOKS, _SLEEPS):
                break
            if looks == _LINGER:
                # Called, and not yet given a part; once more.
                swap(slot, AWAKE, _CALLED, _LOOKS)
                looks = 0
            moment()
            looks += 1
        else:
            moment()
            looks += 1
    say(slot, LEAVE, 0)


def ready() -> None:
    """Have what threads and callers need compiled."""
    slot = new_slot()
    slot[LEAVE] = 1
    processor()
    call(slot)
    serve(slot)


@helper
def _divide(address, parts, work, data):
    """Have the parts done by the team at an address, and return when all are."""
    team = _at(address)
    count = min(look(team, _COUNT), parts - 1)
    for i in range(count):
        slot = _at(look(team, _SLOTS + i))
        say(slot, _WORK, work)
        say(slot, _DATA, data)
        say(slot, _PART, i + 1)
        say(slot, _PARTS, parts)
        say(slot, STATE, _POSTED)
    _call(work, data, 0, parts)
    for part in range(count + 1, parts):
        _call(work, data, part, parts)
    for i in range(count):
        slot = _at(look(team, _SLOTS + i))
        if swap(slot, STATE, _POSTED, _FREE):
            _call(work, data, i + 1, parts)
            continue
        looks = 0
        while look(slot, STATE) != _DONE:
            rest(looks)
            looks += 1
        say(slot, STATE, _FREE)


def _outlined(builder, data):
    """A function that does a part of the kernel that is being compiled, with arguments in `data`.

    If it fails, the team hears of the first failure.
    """
    kernel = builder.function
    function = ir.Function(builder.module, _PART_OF, f"{kernel.name}.part")
    function.linkage = "internal"
    inside = ir.IRBuilder(function.append_basic_block("entry"))
    arguments, part, parts = function.args
    packed = inside.bitcast(arguments, data.as_pointer())
    team, *others = (
        inside.load(inside.gep(packed, [ir.IntType(32)(0), ir.IntType(32)(i)]))
        for i in range(len(data.elements))
    )
    result, error = (inside.alloca(arg.type.pointee) for arg in kernel.args[:2])
    inside.store(ir.Constant(error.type.pointee, None), error)
    code = inside.call(kernel, [result, error, part, parts, *others])
    failed = inside.and_(
        inside.icmp_signed("!=", code, RETCODE_OK), inside.icmp_signed("!=", code, RETCODE_NONE)
    )
    with inside.if_then(failed, likely=False):
        number = ir.IntType(64)
        place = inside.inttoptr(team, number.as_pointer())
        found = inside.gep(place, [number(_FAILED)])
        code = inside.sext(code, number)
        first = inside.cmpxchg(found, number(0), code, "acq_rel", "acquire")
        with inside.if_then(inside.extract_value(first, 1)):
            value = inside.ptrtoint(inside.load(error), number)
            inside.store(value, inside.gep(place, [number(_ERROR)]))
        dismiss = inside.load(inside.gep(place, [number(_DISMISS)]))
        with inside.if_then(inside.icmp_signed("!=", dismiss, number(0))):
            told = inside.inttoptr(dismiss, number.as_pointer())
            inside.store_atomic(number(1), told, "release", 8)
    inside.ret_void()
    return function


@intrinsic
def divided(typingctx, part, parts):
    """Whether a team has done all parts of the kernel that begins with this, or only one is to do.

    `part` is then `-address_of(team)`. If a part fails, the kernel fails.
    """
    called = types.Dispatcher(_divide)
    call = called.get_call_type(typingctx, (types.intp,) * 4, {})

    def codegen(context, builder, sig, args):
        kernel, number = builder.function, ir.IntType(64)
        part, parts = args
        # All arguments but the part and its number, which come after the result and the error.
        others = kernel.args[4:]
        data = ir.LiteralStructType([number, *(arg.type for arg in others)])
        memory = cgutils.alloca_once(builder, data)
        work = _outlined(builder, data)
        given = builder.icmp_signed("<", part, number(0))
        with cgutils.if_unlikely(builder, given):
            team = builder.neg(part)
            for i, value in enumerate([team, *others]):
                place = builder.gep(memory, [ir.IntType(32)(0), ir.IntType(32)(i)])
                builder.store(value, place)
            divide = context.get_function(called, call)
            context.add_linking_libs(getattr(divide, "libs", ()))
            addresses = builder.ptrtoint(work, number), builder.ptrtoint(memory, number)
            divide(builder, [team, parts, *addresses])
            found = builder.inttoptr(team, number.as_pointer())
            code = builder.load(builder.gep(found, [number(_FAILED)]))
            with cgutils.if_unlikely(builder, builder.icmp_signed("!=", code, number(0))):
                error = builder.load(builder.gep(found, [number(_ERROR)]))
                slot = kernel.args[1]
                builder.store(builder.inttoptr(error, slot.type.pointee), slot)
                builder.ret(builder.trunc(code, RETCODE_OK.type))
        return given

    return types.boolean(types.intp, types.intp), codegen
