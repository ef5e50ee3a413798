"""Times layers against their peers, two threads each, and writes what was found.

Each contestant runs in a process of its own, rounds are interleaved, the figure of a contestant is
the median over the rounds. It is timed only after its results agree with the NumPy reference in
float64: outputs, every gradient, the first losses and norms of a training. Of what is drawn at
random, the likeliest tokens are compared. Of all peers the best one counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.cases import CASES, CELLS, MODES, QUICK, SWEEP, cells_of, find
from bench.machine import cpu
from bench.peers import NAMES, Contestant, contestant
from bench.runner import GATE, Race, memory, start


def _names(known: tuple[str, ...]) -> Any:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = set(chosen) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(known)}, got {','.join(sorted(unknown))}"
            )
        return chosen

    return names


def _cases(text: str) -> list[str]:
    try:
        return [find(name).name for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _contestants(text: str) -> list[Contestant]:
    try:
        return [contestant(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _interpreter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if name not in NAMES or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, NAME of {','.join(NAMES)}")
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--cases", type=_cases, help=",".join(CASES))
    parser.add_argument("--cells", type=_names(CELLS), default=list(CELLS), help=",".join(CELLS))
    modes = tuple(MODES)
    parser.add_argument(
        "--modes",
        type=_names(modes),
        help=f"{','.join(modes)}; all of them, or those that the chosen cases are for",
    )
    parser.add_argument(
        "--contestants",
        type=_contestants,
        default=[Contestant(name) for name in NAMES],
        help=f"{','.join(NAMES)}; also with an option, as in fastrnn:1 (threads), "
        "fastrnn:float64, fastrnn:haswell (a CPU), fastrnn:busy (one processor is busy)",
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(GATE))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a contestant in each round")
    parser.add_argument("--quick", action="store_true", help="a small case and three short rounds")
    parser.add_argument("--sweep", action="store_true", help="fastrnn over T, B and H, for plots")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step as well")
    parser.add_argument("--start", action="store_true", help="imports and first steps as well")
    parser.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another interpreter for a contestant",
    )
    parser.add_argument("--out", metavar="FOLDER", help="write JSON, a report and plots there")
    return parser


def _belongs(case: str, mode: str) -> bool:
    """Whether the case is one of the mode; without a name, whether it has as many layers."""
    if case in CASES:
        return CASES[case] in MODES[mode]
    return mode in (("training", "inference") if find(case).layers == 1 else ("language",))


def _line(entry: dict[str, Any]) -> str:
    ours = report.seconds(entry, "fastrnn")
    peer, theirs = report.best_peer(entry)
    text = f"{entry['mode']:9} {entry['case']:8} {entry['cell']:5}"
    if ours is not None:
        text += f"{ours * 1e3:10.3f} ms  {report.share(entry):4.0%} of the limit"
    if ours is not None and theirs is not None:
        text += f"  {theirs / ours:6.2f} x {peer}"
    for name, found in report.variants(entry).items():
        text += f"  {name} takes {found:.2f}"
    if lost := report.disturbed(entry):
        text += f"  (stolen: {lost})"
    return text


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    if options.quick:
        options.cases = options.cases or list(QUICK)
        options.rounds, options.seconds = 3, 0.15
    if options.sweep:
        options.cases, options.contestants = list(SWEEP), [Contestant("fastrnn")]
        options.modes = ["training"]
    cases_of = {mode: options.cases or [case.name for case in MODES[mode]] for mode in MODES}
    if options.modes is None:
        options.modes = list(MODES)
        if options.cases:
            cases_of = {mode: [c for c in options.cases if _belongs(c, mode)] for mode in MODES}
            options.modes = [mode for mode in MODES if cases_of[mode]]
    pythons = dict(options.python)
    about = {
        "cpu": cpu(),
        "threads": options.threads,
        "dtype": options.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "commit": report.commit(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    race = Race(
        options.contestants, options.threads, options.rounds, options.seconds, pythons, tell
    )
    sizes = []
    for mode in options.modes:
        for case in cases_of[mode]:
            for cell in cells_of(mode, options.cells):
                print(_line(race.run(mode, case, cell, options.dtype)), flush=True)
                if options.memory:
                    work = {"mode": mode, "case": case, "cell": cell}
                    found = memory(
                        pythons, options.threads, options.contestants, **work, dtype=options.dtype
                    )
                    sizes.append(work | {"found": found})
    race.end()
    record: dict[str, Any] = {"about": about, "results": race.results}
    if options.memory:
        record["memory"] = sizes
    for name, ratio in report.geometric_means(race.results).items():
        print(f"{name}: geometric mean {ratio:.2f} times the best peer")
    if options.start:
        record["start"] = start(pythons, options.threads, options.contestants)
        for name, found in record["start"].items():
            print(f"{name}: import {found['import']:.2f} s, first step {found['first']:.2f} s")
    if options.out:
        report.write(Path(options.out), record)
    return 1 if race.failures else 0


if __name__ == "__main__":
    sys.exit(main())
