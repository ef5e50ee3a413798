"""Who runs which part: a pool of threads of our own, for kernels that hold no GIL.

Numba's layers die after a fork (OpenMP) or abort when two Python threads launch at once
(workqueue). These threads survive both: a fork starts a new pool, and a caller that finds no free
thread does all parts itself. Parts are cut by the caller, so results never depend on who ran them.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

# Multiply-adds below which waking a thread costs more than it saves.
_SMALL = 1_000_000


class _Task:
    """One part of a call: a function, its arguments and what became of it."""

    __slots__ = ("arguments", "done", "error", "finished", "function")

    def __init__(self, function: Callable, arguments: tuple, done: SimpleQueue) -> None:
        self.function = function
        self.arguments = arguments
        self.done = done
        self.finished = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.function(*self.arguments)
        except BaseException as error:
            self.error = error
        self.finished = True
        self.done.put(None)


def _work(tasks: SimpleQueue[_Task]) -> None:
    while True:
        tasks.get().run()


class _Pool:
    """Idle threads, each known by the queue it waits on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[SimpleQueue[_Task]] = []
        self._started = 0

    def take(self, limit: int) -> SimpleQueue[_Task] | None:
        """A free thread, a new one if fewer than `limit` exist, or None."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._started >= limit:
                return None
            tasks: SimpleQueue[_Task] = SimpleQueue()
            try:
                threading.Thread(target=_work, args=(tasks,), name="fastrnn", daemon=True).start()
            except RuntimeError:
                # The system's limit, or an interpreter that is shutting down.
                return None
            self._started += 1
            return tasks

    def give_back(self, threads: list[SimpleQueue[_Task]]) -> None:
        with self._lock:
            self._free.extend(threads)


_pool = _Pool()


def _forget_threads() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(function: Callable, parts: int, *arguments: Any) -> None:
    """Call `function(part, parts, *arguments)` for every part, and return when all are done."""
    if parts == 1:
        function(0, 1, *arguments)
        return
    pool = _pool
    done: SimpleQueue = SimpleQueue()
    tasks: list[_Task] = []
    threads: list[SimpleQueue[_Task]] = []
    try:
        while len(tasks) < parts - 1 and (thread := pool.take(_threads - 1)) is not None:
            threads.append(thread)
            tasks.append(_Task(function, (len(tasks) + 1, parts, *arguments), done))
            thread.put(tasks[-1])
        for part in (0, *range(len(tasks) + 1, parts)):
            function(part, parts, *arguments)
    finally:
        # The threads write into the caller's arrays: an interrupt waits for them too.
        interrupt = None
        while not all(task.finished for task in tasks):
            try:
                done.get()
            except BaseException as error:
                interrupt = error
        pool.give_back(threads)
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
