"""Contestants in processes of their own, rounds interleaved, a gate before the clock."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import find
from bench.peers import Contestant
from bench.problem import solve

# Distance to the reference, relative and in norm: float32 eps times the root of a long chain.
GATE = {"float32": 2e-5, "float64": 1e-11}
_SECONDS_OF_LIMITS = 0.2
# Seconds that a contestant may take to compile a case.
_PATIENCE = 120
# The share of a round that a virtual machine's host may take for others, ticks of the clock that
# are nothing in any case, and how often a round that lost more is timed at most.
_STOLEN, _TICKS, _TRIES = 0.02, 2, 4
# How long the speed of the processors is looked at, which share of what it was they are to have,
# and how often and after how many seconds a round is timed again where they have not.
_GLANCE, _WHOLE, _WAITS, _PAUSE = 0.01, 0.8, 4, 0.3
# For how long nobody may use a processor before a round, and how often that is looked at.
_QUIET, _LOOKS = 0.03, 10


class Process:
    """A worker: the module `worker`, run with `module` and `threads` for arguments."""

    def __init__(
        self,
        module: str,
        python: str,
        threads: int,
        worker: str = "bench.worker",
        **environment: str,
    ) -> None:
        count = str(threads)
        counts = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count
        )
        self._process = subprocess.Popen(
            [python, "-m", worker, module, count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | counts | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        )

    def ask(self, patience: float = _PATIENCE, **request: Any) -> dict[str, Any]:
        """Send a request, wait for the answer; {"failed": why} if there is none in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], patience)[0]:
                self._process.kill()
                return {"failed": f"no answer within {patience} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": "the process has ended"}

    @property
    def ended(self) -> bool:
        """Whether it is there no more."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Close it and wait."""
        assert self._process.stdin is not None
        # If it has ended already, what it was never told cannot be sent.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def _right_answer(mode: str, case: str, cell: str) -> Iterator[str]:
    """A file with the reference's answer in float64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wanted.npz"
        np.savez(path, **solve(mode, find(case), cell, "float64"))
        yield str(path)


@contextlib.contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """Another process that keeps one processor busy."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        other.kill()
        other.wait()


def ticks(stat: str, processors: set[int]) -> tuple[int, int]:
    """(stolen by the host, used) of the processors since the start, from the text of /proc/stat."""
    stolen = used = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.removeprefix("cpu").isdecimal() and int(name.removeprefix("cpu")) in processors:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            stolen += steal
            used += user + nice + system + irq + softirq
    return stolen, used


def _ticks() -> tuple[int, int] | None:
    try:
        return ticks(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
    except (OSError, ValueError, AttributeError):
        return None


def settle() -> None:
    """Wait until the threads of the one before have stopped to spin, a third of a second at most.

    Some do for 60 ms after a call, and take a processor from whoever is timed next.
    """
    for _ in range(_LOOKS):
        before = _ticks()
        time.sleep(_QUIET)
        after = _ticks()
        if before is not None and after is not None and after[1] - before[1] < _TICKS:
            break


def start_worker(
    contestant: Contestant, pythons: dict[str, str], threads: int, **more: str
) -> Process:
    """A process of the contestant's own."""
    return Process(
        f"bench.peers.{contestant.name}",
        pythons.get(contestant.name, sys.executable),
        contestant.threads or threads,
        **contestant.environment,
        **more,
    )


def calm(process: Process, seconds: float) -> dict[str, Any]:
    """Times of a round, and the share of it that was stolen; None if nobody knows.

    One that lost too much is timed again; the calmest counts, not the fastest.
    """
    best: dict[str, Any] = {}
    for _ in range(_TRIES):
        before = _ticks()
        answer = process.ask(do="time", seconds=seconds)
        after = _ticks()
        if "failed" in answer:
            return answer
        if before is None or after is None:
            return answer | {"stolen": None}
        stolen, used = (new - old for old, new in zip(before, after, strict=True))
        answer["stolen"] = stolen / max(1, stolen + used)
        if not best or answer["stolen"] < best["stolen"]:
            best = answer
        if stolen <= max(_TICKS, _STOLEN * (stolen + used)):
            break
    return best


class Clock:
    """Times rounds while the machine has all of its processors.

    A host may put two virtual processors on one core for seconds or minutes. Nothing is stolen by
    that, but both together are as fast as one.
    """

    def __init__(self, threads: int) -> None:
        self._machine = Process("bench.machine", sys.executable, threads)
        self._fastest: dict[str, float] = {}

    def _ask(self, what: str, seconds: float, dtype: str) -> dict[str, Any]:
        settle()
        answer = self._machine.ask(do=what, seconds=seconds, dtype=dtype)
        if "failed" in answer:
            raise RuntimeError(f"bench.machine: {answer['failed']}")
        self._fastest[dtype] = max(answer["gflops"], self._fastest.get(dtype, 0.0))
        return answer

    def whole(self, dtype: str) -> bool:
        """Whether its processors are about as fast now as they ever were."""
        return self._ask("speed", _GLANCE, dtype)["gflops"] >= _WHOLE * self._fastest[dtype]

    def limits(self, dtype: str) -> dict[str, Any]:
        """Those of the whole machine, if it is that some time soon."""
        for _ in range(_WAITS):
            found = self._ask("limits", _SECONDS_OF_LIMITS, dtype)
            if found["gflops"] >= _WHOLE * self._fastest[dtype]:
                break
            time.sleep(_PAUSE)
        return found

    def time(self, process: Process, seconds: float, dtype: str) -> dict[str, Any]:
        """`calm` on the whole machine, if it is that some time soon: "whole" tells."""
        best: dict[str, Any] = {}
        for _ in range(_WAITS):
            before = self.whole(dtype)
            settle()
            answer = calm(process, seconds)
            if "failed" in answer:
                return answer
            answer["whole"] = before and self.whole(dtype)
            if not best or answer["whole"]:
                best = answer
            if answer["whole"]:
                break
            time.sleep(_PAUSE)
        return best

    def end(self) -> None:
        """End its process."""
        self._machine.end()


class Race:
    """Runs cases with the contestants it was given; `results` grows by one entry a case."""

    def __init__(
        self,
        contestants: list[Contestant],
        threads: int,
        rounds: int,
        seconds: float,
        pythons: dict[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self.rounds, self.seconds, self.tell = rounds, seconds, tell
        self.results: list[dict[str, Any]] = []
        self.failures = 0
        self._clock = Clock(threads)
        self._how = pythons, threads
        self._processes = {one: start_worker(one, *self._how) for one in contestants}

    def run(self, mode: str, case: str, cell: str, dtype: str) -> dict[str, Any]:
        """One case; for each contestant seconds, a median a round, or why it is missing."""
        found: dict[Contestant, dict[str, Any]] = {}
        with _right_answer(mode, case, cell) as wanted:
            for one, process in self._processes.items():
                if process.ended:
                    process.end()
                    process = self._processes[one] = start_worker(one, *self._how)
                own = one.dtype or dtype
                does = one.does(mode)
                answer = process.ask(
                    do="set", mode=does, case=case, cell=cell, dtype=own, wanted=wanted
                )
                if "failed" in answer:
                    found[one] = {"missing": answer["failed"][:200]}
                elif not answer["error"] <= GATE[own]:
                    found[one] = {"missing": f"wrong by {answer['error']:.1e}"}
                else:
                    found[one] = answer | {"rounds": [], "stolen": [], "whole": []}
                if "missing" in found[one]:
                    self._tell_missing(one, found[one])
        racing = [one for one in found if "rounds" in found[one]]
        limits = []
        for turn in range(self.rounds):
            limits.append(self._clock.limits(dtype))
            # Nobody always runs after the same one.
            for one in list(itertools.islice(itertools.cycle(racing), turn, turn + len(racing))):
                process = self._processes[one]
                if one.busy:
                    settle()
                    # Where one processor is another's, the machine is not whole.
                    with _busy(one.busy):
                        answer = calm(process, self.seconds) | {"whole": None}
                else:
                    answer = self._clock.time(process, self.seconds, dtype)
                if "failed" in answer:
                    found[one] = {"missing": answer["failed"][:200]}
                    racing.remove(one)
                    self._tell_missing(one, found[one])
                    continue
                found[one]["rounds"].append(statistics.median(answer["times"]))
                found[one]["stolen"].append(answer["stolen"])
                found[one]["whole"].append(answer["whole"])
        entry = {
            "mode": mode,
            "case": case,
            "cell": cell,
            "dtype": dtype,
            "contestants": {str(one): result for one, result in found.items()},
            "limits": {key: statistics.median(one[key] for one in limits) for key in limits[0]},
        }
        self.results.append(entry)
        return entry

    def _tell_missing(self, one: Contestant, found: dict[str, Any]) -> None:
        self.tell(f"  {one}: {found['missing'][:90]}")
        self.failures += one.name == "fastrnn"

    def end(self) -> None:
        """End all processes."""
        for process in (self._clock, *self._processes.values()):
            process.end()


def start(
    pythons: dict[str, str], threads: int, contestants: list[Contestant]
) -> dict[str, dict[str, float]]:
    """Seconds to import, and from there to the end of the first training step of a small LSTM.

    In a fresh process each; of fastrnn with an empty cache ("cold") and with a full one. What a
    contestant imports when it is first used counts as its first step.
    """
    found: dict[str, dict[str, float]] = {}
    with (
        _right_answer("training", "small", "lstm") as wanted,
        tempfile.TemporaryDirectory() as cache,
    ):
        cold = {"fastrnn (cold)": Contestant("fastrnn")}
        plain = {str(one): one for one in contestants if not one.option}
        for name, one in (cold | plain).items():
            process = start_worker(one, pythons, threads, NUMBA_CACHE_DIR=cache)
            answer = process.ask(
                do="set", mode="training", case="small", cell="lstm", dtype="float32", wanted=wanted
            )
            process.end()
            if "failed" not in answer:
                found[name] = {key: answer[key] for key in ("import", "first")}
    return found


def memory(
    pythons: dict[str, str], threads: int, contestants: list[Contestant], **work: str
) -> dict[str, dict[str, int]]:
    """Resident bytes of a fresh process each, before the work is set up and at most; Linux only."""
    found = {}
    for one in contestants:
        process = start_worker(one, pythons, threads)
        answer = process.ask(do="memory", **(work | ({"dtype": one.dtype} if one.dtype else {})))
        process.end()
        if "failed" not in answer:
            found[str(one)] = answer
    return found
