"""Who runs which part: a pool of threads of our own, for kernels that hold no GIL.

Numba's layers die after a fork (OpenMP) or abort when two Python threads launch at once
(workqueue). These threads survive both: a fork starts a new pool, and a caller that finds no free
thread does all parts itself. Parts are cut by the caller, so results never depend on who ran them.

A kernel's parts are handed over in compiled code (see `fastrnn.crew`), those of a Python function
through a queue.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastrnn import crew
from fastrnn.memory import address_of

# Multiply-adds below which calling a thread costs more than it saves, and how many of them reading
# and writing an element lasts.
_SMALL = 3_000_000
ELEMENT = 32


class _Task:
    """One part of a call: a function, its arguments, who does it and what became of it."""

    __slots__ = ("arguments", "dismiss", "done", "error", "finished", "function", "owner")

    def __init__(
        self,
        function: Callable,
        arguments: tuple,
        done: SimpleQueue,
        dismiss: np.ndarray | None = None,
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.done = done
        self.dismiss = dismiss
        self.owner: dict[str, str] = {}
        self.finished = False
        self.error: BaseException | None = None

    def claim(self, who: str) -> bool:
        """Whether `who` does this part: the first that asked."""
        # One step, which neither a thread nor an interrupt can cut in two; asking again is safe.
        return self.owner.setdefault("who", who) == who

    def run(self) -> None:
        if not self.claim("thread"):
            return
        try:
            self.function(*self.arguments)
        except BaseException as error:
            self.error = error
            if self.dismiss is not None:
                self.dismiss[0] = 1
        self.arguments = ()
        self.finished = True
        self.done.put(None)


class _Thread:
    """A thread that waits for tasks, or with a slot for parts of kernels.

    The scheduler may put who is woken behind who wakes it, on one processor, although others are
    idle, and leave both there. So a thread stays off its caller's.
    """

    def __init__(self) -> None:
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self.slot = crew.new_slot()
        self._thread = threading.Thread(target=self._work, name="fastrnn", daemon=True)
        self._off = -1
        self._others: set[int] = set()

    def start(self) -> None:
        crew.ready()
        self._thread.start()

    def _work(self) -> None:
        while True:
            task = self.tasks.get()
            if task is not None:
                task.run()
                del task
            # Before it is asked whether it ends: who ends waits for those that are awake.
            self.slot[crew.AWAKE] = 1
            if self.tasks.empty() and not _ending:
                crew.serve(self.slot)
            else:
                self.slot[crew.AWAKE] = 0

    def put(self, task: _Task) -> None:
        """Have it run the task."""
        self._stay_off(crew.processor(), asleep=True)
        self.tasks.put(task)
        self.leave()

    def wake(self) -> None:
        """Have it look at its slot."""
        asleep = not crew.call(self.slot)
        self._stay_off(crew.processor(), asleep)
        if asleep:
            self.tasks.put(None)

    def leave(self) -> None:
        """Have it look at its tasks, if it is awake."""
        self.slot[crew.LEAVE] = bool(self.slot[crew.AWAKE])

    def _stay_off(self, processor: int, asleep: bool) -> None:
        """Keep it off a processor; what the caller may use is asked anew if it is asleep."""
        if processor < 0 or (processor == self._off and not asleep):
            return
        self._off = processor
        # Where there are no others, or the system does not let us: anywhere.
        with contextlib.suppress(OSError):
            others = os.sched_getaffinity(0) - {processor}
            number = self._thread.native_id
            if others and number and others != self._others:
                os.sched_setaffinity(number, others)
                self._others = others


class _Pool:
    """Idle threads, in the order in which they became so."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may call the library from inside.
        self._lock = threading.RLock()
        self._free: dict[_Thread, None] = {}
        self._all: list[_Thread] = []
        self._started = 0

    def take(self, taken: list[_Thread], limit: int) -> bool:
        """Add a free thread, or a new one if fewer than `limit` exist; False if there is none."""
        with self._lock:
            if self._free:
                # In this order no interrupt can lose the thread.
                taken.append(next(reversed(self._free)))
                self._free.pop(taken[-1], None)
                return True
            if self._started >= limit:
                return False
            thread = _Thread()
            try:
                thread.start()
            except RuntimeError:
                # The system's limit, or an interpreter that is shutting down.
                return False
            self._started += 1
            self._all.append(thread)
            taken.append(thread)
            return True

    def give_back(self, threads: list[_Thread]) -> None:
        with self._lock:
            self._free.update(dict.fromkeys(threads))

    def rest(self) -> None:
        """Have all threads leave compiled code, whose memory goes with the interpreter."""
        for thread in self._all:
            thread.leave()
        end = time.monotonic() + 1
        while any(thread.slot[crew.AWAKE] for thread in self._all) and time.monotonic() < end:
            time.sleep(0.0001)


_pool = _Pool()


def _forget_threads() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

_ending = False


@atexit.register
def _end() -> None:
    global _ending
    _ending = True
    _pool.rest()


def run(function: Callable, parts: int, *arguments: Any) -> None:
    """Call `function(part, parts, *arguments)` for every part, and return when all are done."""
    if parts == 1:
        function(0, 1, *arguments)
    else:
        launch(function, parts, arguments)


def run_all(function: Callable, parts: int, calls: list[tuple]) -> None:
    """`run` with each of `calls` for arguments, at the same time if there are several parts.

    parts  of all calls together
    """
    if parts == 1 or len(calls) == 1:
        for arguments in calls:
            run(function, parts, *arguments)
    else:
        each = -(-parts // len(calls))
        launch(_one_of, each * len(calls), (function, each, calls))


def _one_of(part: int, _: int, function: Callable, parts: int, calls: list[tuple]) -> None:
    function(part % parts, parts, *calls[part // parts])


def launch(
    function: Callable, parts: int, arguments: tuple, dismiss: np.ndarray | None = None
) -> None:
    """`run`; with `dismiss`, for parts that wait for each other (see `fastrnn.meeting`).

    Those run on threads of their own, as many as there are; if one of them fails, the first number
    of `dismiss` becomes 1, which tells the others that they wait in vain.
    """
    if parts == 1:
        function(0, 1, *arguments)
        return
    pool = _pool
    done: SimpleQueue = SimpleQueue()
    tasks: list[_Task] = []
    threads: list[_Thread] = []
    ended = False
    try:
        while len(threads) < parts - 1 and pool.take(threads, _threads - 1):
            pass
        if dismiss is not None:
            parts = len(threads) + 1
        if crew.divides(function):
            for thread in threads:
                thread.wake()
            team = crew.new_team([thread.slot for thread in threads], dismiss)
            function(-address_of(team), parts, *arguments)
        else:
            for thread in threads:
                tasks.append(_Task(function, (len(tasks) + 1, parts, *arguments), done, dismiss))
                thread.put(tasks[-1])
            for part in (0, *range(len(tasks) + 1, parts)):
                function(part, parts, *arguments)
            for part, task in enumerate(tasks, 1):
                # Its thread has not woken up yet.
                if dismiss is None and task.claim("caller"):
                    task.arguments = ()
                    function(part, parts, *arguments)
        ended = True
    finally:
        # The threads write into the caller's arrays: an interrupt waits for them too, wherever it
        # comes. Each of these steps may be done twice.
        interrupt = None
        while True:
            try:
                if dismiss is not None and not ended:
                    dismiss[0] = 1
                begun = [task for task in tasks if not task.claim("caller")]
                while not all(task.finished for task in begun):
                    done.get()
                pool.give_back(threads)
                break
            except BaseException as error:
                interrupt = error
    for failure in (interrupt, *(task.error for task in tasks)):
        if failure is not None:
            raise failure


def parts_for(work: float, limit: int) -> int:
    """Into how many parts to cut `work` multiply-adds of which `limit` are independent."""
    if work < _SMALL:
        return 1
    return max(1, min(_threads, limit))


def get_num_threads() -> int:
    """How many threads a call uses at most."""
    return _threads


def set_num_threads(n: int) -> None:
    """Use at most `n` threads in a call (from 1). Results have the same bits for any number."""
    global _threads
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n: expected an integer, got {n!r}") from None
    if count < 1:
        raise ValueError(f"n: expected at least 1 thread, got {count}")
    _threads = count


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that a container grants, which the affinity mask does not show."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return float(limit) / float(period)
    except (OSError, ValueError):
        return float("inf")


def _default_threads() -> int:
    for name in ("FASTRNN_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, int(min(count, _quota())))


_threads = _default_threads()
