"""One contestant in a process of its own: answers requests, a JSON line each.

{"do": "set", mode, case, cell, dtype, wanted}   set up; the file `wanted` has the right answer
{"do": "time", seconds}                          steps for so long, each timed
{"do": "memory", mode, case, cell, dtype}        bytes that setting up and steps take at most
{"do": "limits", seconds, dtype}                 of the machine (`bench.machine`)
{"do": "begin", case, cell, path, size, **more}  a language model learns a text (`bench.loss`)
{"do": "learn", rates}                           a timed step at each; the mean loss
{"do": "validate"}                               the loss on the text's end
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from bench.cases import find
from bench.peers import Missing
from bench.problem import error
from bench.resident import most_from_now, resident

# Steps before the clock, since the first ones compile, allocate and start threads; fewer of them
# if they take so many seconds.
_WARM, _LONG = 2, 0.5


class Worker:
    """What the process keeps between requests."""

    def __init__(self, name: str, threads: int) -> None:
        self.threads = threads
        start = time.perf_counter()
        self.module = importlib.import_module(name)
        self.importing = time.perf_counter() - start
        self.step: Any = None
        self.learner: Any = None
        self.windows: Any = None
        self.kept: Any = None

    def set(self, mode: str, case: str, cell: str, dtype: str, wanted: str) -> dict[str, Any]:
        """Set up a case, compare it with what is right."""
        self.step = None
        start = time.perf_counter()
        step, read = self._begin(mode, case, cell, dtype)
        found = step()
        first = time.perf_counter() - start
        with np.load(wanted) as file:
            distance = error(read(found), dict(file))
        warm = 0.0
        for _ in range(_WARM):
            if warm < _LONG:
                warm += self._lasts(step)
        self.step = step
        return {"first": first, "error": distance, "import": self.importing}

    def _begin(self, mode: str, case: str, cell: str, dtype: str) -> Any:
        if not hasattr(self.module, mode):
            raise Missing(f"no {mode}")
        return getattr(self.module, mode)(find(case), cell, dtype, self.threads)

    def memory(self, mode: str, case: str, cell: str, dtype: str) -> dict[str, Any]:
        """Resident bytes of the process, before and at most."""
        # What is compiled, and what the library sets up once, is not the case's.
        tiny, _ = self._begin(mode, "T2B2I8H8", cell, dtype)
        for _ in range(_WARM):
            tiny()
        before = most_from_now()
        step, _ = self._begin(mode, case, cell, dtype)
        for _ in range(_WARM):
            step()
        return {"before": before, "most": resident("VmHWM")}

    @staticmethod
    def _lasts(step: Any) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def time(self, seconds: float) -> dict[str, Any]:
        """Seconds of each step."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return {"times": times}

    def begin(self, case: str, cell: str, path: str, size: int, **more: Any) -> dict[str, Any]:
        """Set up the model, read the text; windows of another model warm up."""
        # Others must not carry the reference, which their memory is measured without.
        from bench.language import Lesson

        if not hasattr(self.module, "Learner"):
            raise Missing("no race to a loss")
        with np.load(path) as file:
            params = dict(file)
        train, self.kept = params.pop("train"), params.pop("kept")
        sizes = find(case)._replace(I=size)
        for warming in (True, False):
            copies = {key: value.copy() for key, value in params.items()}
            lesson = Lesson(sizes, cell, copies, threads=self.threads, **more)
            self.learner = self.module.Learner(lesson)
            self.windows = self._windows(train, sizes.T)
            if warming:
                self.learn([0.0] * _WARM)
        return {}

    def _windows(self, train: np.ndarray, length: int) -> Any:
        """Over and over: each (tokens, targets); the state begins anew with the text."""
        while True:
            self.learner.state = None
            for start in range(0, len(train) - length, length):
                yield train[start : start + length], train[start + 1 : start + length + 1]

    def learn(self, rates: list[float]) -> dict[str, Any]:
        """A step of training at each of the rates."""
        total = seconds = 0.0
        for rate in rates:
            tokens, targets = next(self.windows)
            start = time.perf_counter()
            self.learner.set_rate(rate)
            total += self.learner.learn(tokens, targets)[0]
            seconds += time.perf_counter() - start
        return {"seconds": seconds, "loss": total / len(rates)}

    def validate(self) -> dict[str, Any]:
        """The loss on what was kept."""
        return {"loss": self.learner.loss(self.kept[:-1], self.kept[1:])}

    def limits(self, seconds: float, dtype: str) -> dict[str, Any]:
        """The machine's."""
        return self.module.limits(self.threads, seconds, dtype)

    def speed(self, seconds: float, dtype: str) -> dict[str, Any]:
        """Of them, that of the processors."""
        return self.module.speed(self.threads, seconds, dtype)


def main() -> None:
    # What a contestant or a compiler prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(sys.argv[1], int(sys.argv[2]))
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as failure:
            answer = {"failed": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
