"""Time training steps: contestants in processes of their own, rounds interleaved, medians.

A contestant is timed only after its output and every gradient agree with the NumPy reference in
float64. `--python jax=PATH` runs a contestant with another interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

from bench.cases import CASES, CELLS, QUICK
from bench.contestants import CONTESTANTS

# Norm-relative distance to the reference; float32 eps times the square root of a long chain.
GATE = {"float32": 2e-5, "float64": 1e-11}


class Contestant:
    """A worker process."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        self.name = name
        count = str(threads)
        environment = os.environ | {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", name, count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": "the process has ended"}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--cases", default="small,speech,medium,large", help=",".join(CASES))
    parser.add_argument("--cells", default="gru,lstm", help=",".join(CELLS))
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--dtype", default="float32", choices=tuple(GATE))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round")
    parser.add_argument("--quick", action="store_true", help="two small cases, two rounds")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    cases = list(QUICK) if options.quick else options.cases.split(",")
    rounds, seconds = (2, 0.2) if options.quick else (options.rounds, options.seconds)
    pythons = dict(pair.split("=", 1) for pair in options.python)
    contestants = [
        Contestant(name, pythons.get(name, sys.executable), options.threads)
        for name in options.contestants.split(",")
    ]
    print(f"{_cpu()}, {options.threads} threads, {options.dtype}, {time.strftime('%Y-%m-%d')}")
    print("milliseconds of a training step: median (lowest to highest round); GFLOP/s of products")
    results, failures = [], 0
    for case in cases:
        for cell in options.cells.split(","):
            rows: dict[str, list[float]] = {}
            for contestant in contestants:
                answer = contestant.ask(do="set", case=case, cell=cell, dtype=options.dtype)
                if "failed" in answer:
                    print(f"{case:8} {cell:5} {contestant.name:8} missing: {answer['failed'][:70]}")
                elif not answer["error"] <= GATE[options.dtype]:
                    print(f"{case:8} {cell:5} {contestant.name:8} wrong by {answer['error']:.1e}")
                    failures += contestant.name == "fastrnn"
                else:
                    rows[contestant.name] = []
            for _ in range(rounds):
                for contestant in contestants:
                    if contestant.name in rows:
                        time.sleep(0.05)
                        times = contestant.ask(do="time", seconds=seconds)["times"]
                        rows[contestant.name].append(statistics.median(times))
            medians = {name: statistics.median(times) for name, times in rows.items()}
            peers = [value for name, value in medians.items() if name != "fastrnn"]
            for name, times in rows.items():
                speed = CASES[case].operations(cell) / medians[name] / 1e9
                line = f"{case:8} {cell:5} {name:8} {medians[name] * 1e3:9.2f} "
                line += f"({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}) {speed:6.0f} GFLOP/s"
                if name == "fastrnn" and peers:
                    line += f"   {min(peers) / medians[name]:.2f} x the best peer"
                print(line, flush=True)
            results.append({"case": case, "cell": cell, "rounds": rows, "median": medians})
    if options.json:
        record = {"cpu": _cpu(), "threads": options.threads, "dtype": options.dtype}
        with open(options.json, "w") as file:
            json.dump(record | {"date": time.strftime("%Y-%m-%d"), "results": results}, file)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
