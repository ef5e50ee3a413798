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
from bench.problem import problem, solve

# Distance to the reference, relative and in norm: float32 eps times the root of a long chain.
GATE = {"float32": 2e-5, "float64": 1e-11}
_SECONDS_OF_LIMITS = 0.2
# Seconds that a contestant may take to compile a case.
_PATIENCE = 120


class Process:
    """A worker."""

    def __init__(self, module: str, python: str, threads: int, **environment: str) -> None:
        count = str(threads)
        counts = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count
        )
        self._process = subprocess.Popen(
            [python, "-m", "bench.worker", module, count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | counts | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, wait for the answer; {"failed": why} if there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
                self._process.kill()
                return {"failed": f"no answer within {_PATIENCE} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": "the process has ended"}

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
def _right_answer(case: str, cell: str) -> Iterator[str]:
    """A file with the reference's answer in float64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wanted.npz"
        answer = solve(problem(find(case), cell, "float64"), cell)
        np.savez(path, y=answer.y, d_x=answer.d_x, **(answer.grads or {}))
        del answer
        yield str(path)


class Race:
    """Runs cases with the contestants it was given; `results` grows by one entry a case."""

    def __init__(
        self,
        contestants: list[str],
        threads: int,
        rounds: int,
        seconds: float,
        pythons: dict[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self.rounds, self.seconds, self.tell = rounds, seconds, tell
        self.results: list[dict[str, Any]] = []
        self.failures = 0
        self._machine = Process("bench.machine", sys.executable, threads)
        self._processes = {
            name: Process(f"bench.peers.{name}", pythons.get(name, sys.executable), threads)
            for name in contestants
        }

    def run(self, mode: str, case: str, cell: str, dtype: str) -> dict[str, Any]:
        """One case; for each contestant seconds, a median a round, or why it is missing."""
        found: dict[str, dict[str, Any]] = {}
        with _right_answer(case, cell) as wanted:
            for name, process in self._processes.items():
                answer = process.ask(
                    do="set", mode=mode, case=case, cell=cell, dtype=dtype, wanted=wanted
                )
                if "failed" in answer:
                    found[name] = {"missing": answer["failed"][:200]}
                elif not answer["error"] <= GATE[dtype]:
                    found[name] = {"missing": f"wrong by {answer['error']:.1e}"}
                else:
                    found[name] = answer | {"rounds": []}
                if "missing" in found[name]:
                    self._tell_missing(name, found[name])
        racing = [name for name in found if "rounds" in found[name]]
        limits = []
        for turn in range(self.rounds):
            limits.append(self._machine.ask(do="limits", seconds=_SECONDS_OF_LIMITS, dtype=dtype))
            if "failed" in limits[-1]:
                raise RuntimeError(f"bench.machine: {limits[-1]['failed']}")
            # Nobody always runs after the same one.
            for name in list(itertools.islice(itertools.cycle(racing), turn, turn + len(racing))):
                # The threads of the one before may still spin.
                time.sleep(0.05)
                answer = self._processes[name].ask(do="time", seconds=self.seconds)
                if "failed" in answer:
                    found[name] = {"missing": answer["failed"][:200]}
                    racing.remove(name)
                    self._tell_missing(name, found[name])
                    continue
                found[name]["rounds"].append(statistics.median(answer["times"]))
        entry = {
            "mode": mode,
            "case": case,
            "cell": cell,
            "dtype": dtype,
            "contestants": found,
            "limits": {key: statistics.median(one[key] for one in limits) for key in limits[0]},
        }
        self.results.append(entry)
        return entry

    def _tell_missing(self, name: str, found: dict[str, Any]) -> None:
        self.tell(f"  {name}: {found['missing'][:90]}")
        self.failures += name == "fastrnn"

    def end(self) -> None:
        """End all processes."""
        for process in (self._machine, *self._processes.values()):
            process.end()


def start(
    pythons: dict[str, str], threads: int, contestants: list[str]
) -> dict[str, dict[str, float]]:
    """Seconds to import, and from there to the end of the first training step of a small LSTM.

    In a fresh process each; of fastrnn with an empty cache ("cold") and with a full one. What a
    contestant imports when it is first used counts as its first step.
    """
    found: dict[str, dict[str, float]] = {}
    with _right_answer("small", "lstm") as wanted, tempfile.TemporaryDirectory() as cache:
        for name in ["fastrnn (cold)", *contestants]:
            peer = name.split()[0]
            python = pythons.get(peer, sys.executable)
            process = Process(f"bench.peers.{peer}", python, threads, NUMBA_CACHE_DIR=cache)
            answer = process.ask(
                do="set", mode="training", case="small", cell="lstm", dtype="float32", wanted=wanted
            )
            process.end()
            if "failed" not in answer:
                found[name] = {key: answer[key] for key in ("import", "first")}
    return found
