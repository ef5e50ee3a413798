"""Parts of kernels that are handed over in compiled code: each is done once, whoever comes."""

from __future__ import annotations

import os
import sys
import threading
import time

import numpy as np
import pytest
from test_parallel import InterruptAt, Recorder
from test_processes import Program, posix

from fastrnn import crew, meeting, parallel
from fastrnn.crew import divided
from fastrnn.jit import kernel


@kernel
def count(part, parts, wrong, seen):
    """Counts each part of `parts`, and fails in one of them."""
    if divided(part, parts):
        return
    if part == wrong:
        raise ValueError("a part failed")
    seen[part] += parts


@kernel
def count_long(part, parts, turns, seen):
    """The same after a while."""
    if divided(part, parts):
        return
    number = 1.0
    for _ in range(turns):
        number = number * 0.999 + 0.1
    seen[part] += parts if number > 0 else 0


@kernel
def meet(part, parts, place, wrong, seen):
    """Two parts that wait for each other, unless one fails."""
    if divided(part, parts):
        return
    parts = meeting.gather(place, part, parts)
    if parts == 0:
        return
    if part == wrong and parts > 1:
        raise ValueError("a part failed")
    if parts > 1:
        meeting.arrive(place, part, 1)
        meeting.wait(place, parts, 1)
    seen[part] += parts


def counted(parts, turns=0):
    seen = np.zeros(parts)
    parallel.run(count_long, parts, turns, seen)
    return seen.tolist()


def test_what_divides():
    assert crew.divides(count)
    assert not any(crew.divides(other) for other in (crew.serve, print, Recorder(), counted))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("turns", [0, 20_000])
def test_every_part_runs_once(pool, parts, turns):
    for _ in range(200):
        assert counted(parts, turns) == [parts] * parts
    assert pool._started == min(2, parts - 1)


def test_threads_that_do_not_come(pool):
    asleep = [parallel._Thread(), parallel._Thread()]
    pool._free.update(dict.fromkeys(asleep))
    pool._started = 2
    seen = np.zeros(4)
    parallel.run(count, 4, -1, seen)
    assert seen.tolist() == [4] * 4
    # Who comes later finds nothing to do.
    for thread in asleep:
        crew.serve(thread.slot)
    assert seen.tolist() == [4] * 4


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_part_that_fails(pool, parts):
    for wrong in range(parts):
        for _ in range(20):
            seen = np.zeros(parts)
            with pytest.raises(ValueError, match="a part failed"):
                parallel.run(count, parts, wrong, seen)
            assert seen.tolist() == [parts * (part != wrong) for part in range(parts)]
    assert counted(parts) == [parts] * parts


@pytest.mark.parametrize("wrong", [-1, 0, 1])
def test_parts_that_wait_for_each_other(pool, wrong):
    failed = both = 0
    for _ in range(50):
        seen = np.zeros(2)
        try:
            meeting.together(meet, 2, wrong, seen)
        except ValueError:
            failed += 1
        else:
            # Both, or the first alone.
            assert seen.tolist() in ([2, 2], [1, 0])
            both += seen[1] > 0
    assert bool(failed) == (wrong >= 0)
    assert bool(both) == (wrong < 0)


def test_python_functions_between_kernels(pool):
    for _ in range(100):
        assert counted(3, 1000) == [3] * 3
        work = Recorder()
        parallel.run(work, 3)
        assert sorted(work.ended) == [(part, 3) for part in range(3)]


def test_threads_go_to_sleep_and_wake(pool):
    assert counted(3) == [3] * 3
    time.sleep(0.2)
    assert not any(thread.slot[crew.AWAKE] for thread in pool._free)
    assert counted(3, 100_000) == [3] * 3


def test_threads_come_whether_they_sleep_or_not(pool):
    # Pauses around those after which threads go to sleep.
    pauses, both = np.linspace(0, 0.002, 200), 0
    for pause in pauses:
        seen = np.zeros(2)
        meeting.together(meet, 2, -1, seen)
        both += seen[1] > 0
        time.sleep(pause)
    assert both > len(pauses) / 2


def test_who_is_called_does_not_go_to_sleep():
    slot = crew.new_slot()
    slot[crew.AWAKE] = 1
    assert crew.call(slot)
    assert crew.call(slot)
    # It is to leave, but has been called: first it waits for its part.
    slot[crew.LEAVE] = 1
    start = time.perf_counter()
    crew.serve(slot)
    long = time.perf_counter() - start
    assert (slot[crew.AWAKE], slot[crew.LEAVE]) == (0, 0)
    slot[crew.LEAVE] = 1
    start = time.perf_counter()
    crew.serve(slot)
    assert time.perf_counter() - start < long
    assert not crew.call(slot)


def test_many_callers(pool):
    wrong = []

    def work():
        for _ in range(200):
            if counted(4, 200) != [4] * 4:
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_interrupt_anywhere(pool):
    for n in range(1, 1000):
        seen, interrupt = np.zeros(4), InterruptAt(n)
        sys.settrace(interrupt)
        try:
            parallel.run(count, 4, -1, seen)
        except KeyboardInterrupt:
            pass
        else:
            assert seen.tolist() == [4] * 4
        finally:
            sys.settrace(None)
        assert seen.tolist() in ([0] * 4, [4] * 4)
        assert len(pool._free) == pool._started
        assert counted(3) == [3] * 3
        if interrupt.left >= 0:
            break
    assert n > 30


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_stay_off_the_processor_of_the_caller(pool):
    all_of_them = os.sched_getaffinity(0)
    try:
        for processor in sorted(all_of_them)[:2] * 2:
            os.sched_setaffinity(0, {processor})
            # Here there is no other.
            assert counted(3) == [3] * 3
            time.sleep(0.01)
            os.sched_setaffinity(0, all_of_them)
            thread = next(iter(pool._free))
            thread.wake()
            off = thread._off
            assert os.sched_getaffinity(thread._thread.native_id) == all_of_them - {off}
        # The caller is left alone.
        assert os.sched_getaffinity(0) == all_of_them
    finally:
        os.sched_setaffinity(0, all_of_them)


# ---- in processes of their own


@pytest.fixture
def run(tmp_path):
    def run(body):
        return Program(tmp_path, body).lines()

    return run


TRAIN = "use_pool(); want = train('GRU'); assert train('GRU') == want\n"


@posix
def test_fork_while_threads_look_for_parts(run):
    body = """
for _ in range(20):
    assert train("GRU") == want
    wait(in_child(lambda: report(train("GRU") == want)))
"""
    assert run(TRAIN + body) == ["True"] * 20


@pytest.mark.parametrize("delay", [0, 0.0002, 0.0008])
def test_the_end_while_threads_look_for_parts(run, delay):
    assert run(TRAIN + f"report('end'); time.sleep({delay})\n") == ["end"]
