"""Parts of a call: who runs them, how many there are, and what an interrupt finds."""

from __future__ import annotations

import dis
import functools
import os
import sys
import threading
import time
import weakref
from queue import SimpleQueue

import pytest

import fastrnn
from fastrnn import parallel


class Recorder:
    """A function for `parallel.run` that notes its calls and raises in some of its parts."""

    def __init__(self, raises=(), pause=0.0):
        self.raises = raises
        self.pause = pause
        self.ended = []

    def __call__(self, part, parts, *arguments):
        try:
            time.sleep(self.pause * (part > 0))
            if part in self.raises:
                raise KeyError(part)
        finally:
            self.ended.append((part, parts))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_every_part_runs_once(pool, parts):
    for _ in range(50):
        work = Recorder()
        parallel.run(work, parts)
        assert sorted(work.ended) == [(part, parts) for part in range(parts)]
    assert pool._started == min(2, parts - 1)


def test_parts_run_at_once(pool):
    barrier = threading.Barrier(3)
    parallel.run(lambda part, parts: barrier.wait(30), 3)


def test_parts_without_threads(pool, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work = Recorder()
    parallel.run(work, 4)
    assert len(set(work.ended)) == len(work.ended) == 4
    assert pool._started == 0


def test_threads_that_do_not_wake(pool):
    asleep = [parallel._Thread(), parallel._Thread()]
    pool._free.update(dict.fromkeys(asleep))
    pool._started = 2
    work = Recorder()
    parallel.run(work, 4)
    assert sorted(work.ended) == [(part, 4) for part in range(4)]
    # What it left there must not be done again.
    for thread in asleep:
        thread.tasks.get().run()
    assert len(work.ended) == 4


@pytest.mark.parametrize("part", [0, 1, 2, 5])
def test_exceptions_propagate(pool, part):
    for _ in range(20):
        work = Recorder(raises=(part,), pause=0.001)
        with pytest.raises(KeyError, match=str(part)):
            parallel.run(work, 6)
        ended = len(work.ended)
        time.sleep(0.002)
        assert len(work.ended) == ended, "a part ran on after the call"
    work = Recorder()
    parallel.run(work, 6)
    assert len(work.ended) == 6


def test_arguments_are_let_go(pool):
    # Memory is used again as soon as nobody refers to it: a thread must not hold on to arrays.
    class Array:
        pass

    for asleep in (0, 1, 2):
        pool._free.update({parallel._Thread(): None for _ in range(asleep)})
        pool._started = len(pool._free)
        argument, freed = Array(), threading.Event()
        weakref.finalize(argument, freed.set)
        parallel.run(Recorder(pause=0.001), 4, argument)
        del argument
        assert freed.is_set()
    task = parallel._Task(Recorder(), (1, 2), SimpleQueue())
    task.run()
    assert (task.finished, task.arguments) == (True, ())


# Python runs signal handlers after these instructions, and where a function begins.
CHECKED = ("CALL", "JUMP_BACKWARD", "RESUME")


class InterruptAt:
    """Raises KeyboardInterrupt at the n'th place in parallel.py where a signal could."""

    def __init__(self, n):
        self.left = n
        self.last = {}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != parallel.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            last = self.last.get(frame, "RESUME")
            self.last[frame] = instructions(frame.f_code)[frame.f_lasti]
            self.left -= last.startswith(CHECKED)
            if not self.left and self.last:
                self.last = {}
                self.left = -1
                raise KeyboardInterrupt
        return self


@functools.cache
def instructions(code):
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


def test_interrupt_anywhere(pool):
    """Wherever Ctrl-C comes: the call ends, no part runs on, no thread is lost."""
    for n in range(1, 1000):
        work, interrupt = Recorder(pause=0.001), InterruptAt(n)
        sys.settrace(interrupt)
        try:
            parallel.run(work, 4)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        ended = len(work.ended)
        assert interrupted == (interrupt.left < 0), f"swallowed at {n}"
        assert interrupted or ended == 4
        time.sleep(0.003)
        assert len(work.ended) == ended, f"a part ran on after the call: {n}"
        work = Recorder(pause=0.001)
        parallel.run(work, 3)
        assert len(set(work.ended)) == len(work.ended) == 3
        assert len(pool._free) == pool._started
        if not interrupted:
            break
    assert n > 50


def test_call_anywhere_inside_a_call(pool):
    """A signal handler that uses the library, wherever in a call it is run."""
    results = []

    class CallAt(InterruptAt):
        def __call__(self, frame, event, argument):
            try:
                return super().__call__(frame, event, argument)
            except KeyboardInterrupt:
                work = Recorder()
                parallel.run(work, 3)
                results.append(sorted(work.ended))
                return self

    def work():
        for n in range(1, 1000):
            work, call = Recorder(pause=0.001), CallAt(n)
            sys.settrace(call)
            parallel.run(work, 4)
            sys.settrace(None)
            results.append(sorted(work.ended))
            if call.left >= 0:
                break

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a call waits for itself"
    assert len(results) > 100
    assert {tuple(ended) for ended in results} == {
        tuple((part, parts) for part in range(parts)) for parts in (3, 4)
    }


@pytest.fixture
def machine(monkeypatch):
    """A machine with eight CPUs, all of them ours, and no settings."""
    for name in ("FASTRNN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(parallel, "_quota", lambda: float("inf"))
    return monkeypatch


def test_default_number_of_threads(machine):
    assert parallel._default_threads() == 8
    machine.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert parallel._default_threads() == 1
    machine.delattr(os, "sched_getaffinity")
    assert parallel._default_threads() == 32
    machine.setattr(os, "cpu_count", lambda: None)
    assert parallel._default_threads() == 1


@pytest.mark.parametrize(
    ("own", "omp", "count"),
    [
        ("3", None, 3),
        (None, "5", 5),
        ("3", "5", 3),
        ("20", None, 20),
        ("", "5", 5),
        ("0", None, 8),
        ("-2", None, 8),
        ("two", "5", 5),
        ("1.5", None, 8),
        (None, "0", 8),
        (None, "", 8),
    ],
)
def test_threads_from_the_environment(machine, own, omp, count):
    for name, value in (("FASTRNN_NUM_THREADS", own), ("OMP_NUM_THREADS", omp)):
        if value is not None:
            machine.setenv(name, value)
    assert parallel._default_threads() == count


@pytest.mark.parametrize(("quota", "count"), [(0.5, 1), (1.0, 1), (2.5, 2), (64.0, 8)])
def test_threads_from_the_quota(machine, quota, count):
    machine.setattr(parallel, "_quota", lambda: quota)
    assert parallel._default_threads() == count
    machine.setenv("FASTRNN_NUM_THREADS", "6")
    assert parallel._default_threads() == 6


@pytest.mark.parametrize(
    ("content", "quota"),
    [
        ("150000 100000\n", 1.5),
        ("max 100000\n", float("inf")),
        ("", float("inf")),
        ("nonsense", float("inf")),
        (None, float("inf")),
    ],
)
def test_quota_of_a_container(tmp_path, content, quota):
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert parallel._quota(tmp_path) == quota


def test_set_num_threads(monkeypatch):
    monkeypatch.setattr(parallel, "_threads", 1)
    for count in (1, 2, 1000):
        fastrnn.set_num_threads(count)
        assert fastrnn.get_num_threads() == count
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"^n: expected at least 1 thread, got {wrong}$"):
            fastrnn.set_num_threads(wrong)
    for wrong in (1.0, "2", None):
        with pytest.raises(TypeError, match=r"^n: expected an integer, got"):
            fastrnn.set_num_threads(wrong)
    assert fastrnn.get_num_threads() == 1000


def test_parts_for(monkeypatch):
    monkeypatch.setattr(parallel, "_threads", 4)
    monkeypatch.setattr(parallel, "_SMALL", 1000)
    assert parallel.parts_for(999, 8) == 1
    assert parallel.parts_for(1000, 8) == 4
    assert parallel.parts_for(1000, 3) == 3
    assert parallel.parts_for(1000, 0) == 1
